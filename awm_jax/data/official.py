"""CIFAR-10 and MNIST as their publishers and TFDS give them."""

import gzip
import pathlib
import zlib

import numpy as np

from awm_jax.data import download
from awm_jax.data.store import Arrays

MNIST_URL = "https://storage.googleapis.com/cvdf-datasets/mnist/"
# md5 of the official files.
MNIST_FILES = {
    "train-images-idx3-ubyte.gz": "f68b3c2dcbeaaa9fbdd348bbdeb94873",
    "train-labels-idx1-ubyte.gz": "d53e105ee54ea40749a09fcbcd1e9432",
    "t10k-images-idx3-ubyte.gz": "9fb629c4189551a2d022fa330f9573f3",
    "t10k-labels-idx1-ubyte.gz": "ec29112dd5afa0611ce80d1b7f02629c",
}
# `awm_jax.data.store.digest` of what `mnist` makes of them, however they are compressed.
MNIST_DIGEST = "535df3c9ab93d9e70cda1e4499be7f93a6fa3d0f766c523520760daf5cd534c0"


def cifar10(folder: pathlib.Path, cache: pathlib.Path) -> Arrays:
    """CIFAR-10 from a prepared TFDS directory (array_record).

    Args:
      folder: a TFDS data_dir: it holds ``cifar10/3.0.2/dataset_info.json``.
      cache: not used.

    Returns:
      ``(train_images, train_labels, test_images, test_labels)``.

    Raises:
      FileNotFoundError: no prepared data set there.
      OSError: a file of it is missing or damaged.
    """
    del cache
    found = sorted(folder.glob("cifar10/*/dataset_info.json")) if folder.is_dir() else []
    if not found:
        raise FileNotFoundError(
            f"Expected {folder}/cifar10/3.0.2/dataset_info.json, found none. Prepare CIFAR-10 on a "
            "machine with internet and TensorFlow: `pip install tensorflow tensorflow-datasets && "
            "python -c \"import tensorflow_datasets as tfds; tfds.builder('cifar10', "
            "data_dir='DIR', file_format='array_record').download_and_prepare()\"`, copy DIR "
            "here, and name it with --data_dir or AWM_DATA_DIR."
        )
    import tensorflow_datasets as tfds

    from awm_jax.data import tfds_arrays

    prepared = found[-1].parent
    try:
        return tfds_arrays.read(tfds.builder_from_directory(prepared))
    except (RuntimeError, OSError, ValueError, KeyError) as error:
        raise OSError(
            f"{prepared} is no whole prepared CIFAR-10 ({error}). Copy the whole directory anew."
        ) from error


def mnist(folder: pathlib.Path, cache: pathlib.Path) -> Arrays:
    """MNIST from its four official files, padded to 32x32 and repeated to three channels.

    The official TFDS builder reads prepared data but does not prepare without TensorFlow, and the
    files need no more than a header check.

    Args:
      folder: where the files are, or are to be.
      cache: not used.

    Returns:
      ``(train_images, train_labels, test_images, test_labels)``.

    Raises:
      FileNotFoundError: a file is missing and could not be downloaded.
      OSError: a file is damaged.
    """
    del cache
    download.fetch_missing(MNIST_URL, MNIST_FILES, folder)
    return (*_mnist_split(folder, "train"), *_mnist_split(folder, "t10k"))


def _mnist_split(folder: pathlib.Path, prefix: str) -> tuple[np.ndarray, np.ndarray]:
    """Images ``[n, 32, 32, 3]`` and labels of one split."""
    images = _idx(folder / f"{prefix}-images-idx3-ubyte.gz", images=True)
    labels = _idx(folder / f"{prefix}-labels-idx1-ubyte.gz", images=False)
    if len(images) != len(labels):
        raise OSError(f"Expected as many {prefix} images as labels in {folder}, found "
                      f"{len(images)} and {len(labels)}.")
    images = np.pad(images, ((0, 0), (2, 2), (2, 2)))
    return np.repeat(images[..., None], 3, axis=-1), labels.astype(np.int32)


def _idx(path: pathlib.Path, images: bool) -> np.ndarray:
    """Reads one IDX file of uint8."""
    try:
        raw = gzip.decompress(path.read_bytes())
        rank = 3 if images else 1
        if raw[:4] != bytes([0, 0, 8, rank]):
            raise ValueError(f"it begins with {raw[:4].hex()}")
        shape = np.frombuffer(raw, ">i4", rank, 4)
        return np.frombuffer(raw, np.uint8, offset=4 + 4 * rank).reshape(shape)
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise OSError(
            f"{path} is no whole MNIST file ({error}). Delete it and get it anew from {MNIST_URL}."
        ) from error
