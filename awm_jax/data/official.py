"""CIFAR-10 and MNIST as their publishers and TFDS give them."""

import gzip
import http.client
import pathlib
import urllib.request
import zlib

import numpy as np

from awm_jax.data.dataset import Arrays

MNIST_URL = "https://storage.googleapis.com/cvdf-datasets/mnist/"
MNIST_FILES = {
    "train_images": "train-images-idx3-ubyte.gz", "train_labels": "train-labels-idx1-ubyte.gz",
    "test_images": "t10k-images-idx3-ubyte.gz", "test_labels": "t10k-labels-idx1-ubyte.gz",
}


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
    out = {}
    for field, name in MNIST_FILES.items():
        if not (folder / name).exists():
            _download(name, folder)
        out[field] = _idx(folder / name, field.endswith("images"))
    for split in ("train", "test"):
        if len(out[f"{split}_images"]) != len(out[f"{split}_labels"]):
            raise OSError(f"Expected as many {split} images as labels in {folder}.")
        images = np.pad(out[f"{split}_images"], ((0, 0), (2, 2), (2, 2)))
        out[f"{split}_images"] = np.repeat(images[..., None], 3, axis=-1)
    return (out["train_images"], out["train_labels"].astype(np.int32),
            out["test_images"], out["test_labels"].astype(np.int32))


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


def _download(name: str, folder: pathlib.Path) -> None:
    """Fetches one file to a temporary name and renames it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with urllib.request.urlopen(MNIST_URL + name, timeout=10) as reply:
            temporary = folder / f"{name}.part"
            temporary.write_bytes(reply.read())
        temporary.replace(folder / name)
    except (http.client.HTTPException, OSError) as error:
        raise FileNotFoundError(
            f"Expected {name} in {folder}; it is not there and could not be downloaded ({error}). "
            f"Download the four MNIST files from {MNIST_URL} into {folder}, or name the directory "
            "that holds them with --data_dir or AWM_DATA_DIR."
        ) from error
