"""One record and one loader for every data set."""

import dataclasses
import hashlib
import os
import pathlib
from collections.abc import Callable, Iterable

import numpy as np

from awm_jax import validate
from awm_jax.data import store
from awm_jax.data.store import Prepared

_VERSION = 3  # raise it when preparation changes, so that stale arrays are not reused
FOLDER = "folder:"  # and a path: images of one's own


@dataclasses.dataclass(frozen=True)
class Dataset:
    """Training and test images of one data set.

    Args:
      name: one of `NAMES`, or, of images that the name does not decide, a name with a digest of
        them: no other data set has it, and it is fit for a file name.
      train_images: ``[N, H, W, C]`` uint8.
      train_labels: ``[N]`` int32.
      test_images: ``[M, H, W, C]`` uint8.
      test_labels: ``[M]`` int32.
      num_classes: how many classes.
      flip: whether a horizontal flip keeps the label.
      class_names: of class 0, 1, ...; empty where nobody named them.
    """

    name: str
    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray
    num_classes: int
    flip: bool
    class_names: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class _Source:
    """How to prepare a data set from a directory of its files (None: it comes with a package)."""

    flip: bool
    prepare: Callable[[pathlib.Path | None, pathlib.Path], Prepared]
    subfolder: str | None
    """Where the files lie when the directory holds several data sets; None: no files needed."""
    files: Callable[[pathlib.Path], Iterable[pathlib.Path]]
    """The files in a directory that it is prepared from; where one changes, so do the arrays."""
    class_names: tuple[str, ...] | None
    """None: the files say."""


_DIGITS = tuple("0123456789")
_CIFAR10 = tuple("airplane automobile bird cat deer dog frog horse ship truck".split())
_GTSRB = tuple(map(str, range(43)))  # the official class numbers


def _digits(data_dir, cache):
    """scikit-learn's 1,797 handwritten digits, 8x8 in 0..16, upscaled."""
    del data_dir, cache
    from PIL import Image
    from sklearn.datasets import load_digits

    source = load_digits()
    images = np.stack([
        np.asarray(Image.fromarray(np.uint8(np.round(image * 255 / 16))).resize(
            (32, 32), Image.Resampling.BILINEAR))
        for image in source.images
    ])
    images = np.repeat(images[..., None], 3, axis=-1)
    labels = source.target.astype(np.int32)
    order = np.random.default_rng(0).permutation(len(labels))
    train, test = order[:1100], order[1100:]
    return Prepared((images[train], labels[train], images[test], labels[test]), _DIGITS)


def _gtsrb(data_dir, cache):
    from awm_jax.data import gtsrb

    return Prepared(gtsrb.prepare(data_dir, cache), _GTSRB)


def _cifar10(data_dir, cache):
    from awm_jax.data import official

    return Prepared(official.cifar10(data_dir, cache), _CIFAR10)


def _mnist(data_dir, cache):
    from awm_jax.data import official

    arrays = official.mnist(data_dir, cache)
    found = store.digest(arrays)
    if found == official.MNIST_DIGEST:
        return Prepared(arrays, _DIGITS)
    # Fashion-MNIST and others come in files of the same names.
    print(f"The images in {data_dir} are not MNIST's: the data set is called mnist-{found[:8]}.",
          flush=True)
    return Prepared(arrays, _DIGITS, found)


def _tiny_imagenet(data_dir, cache):
    from awm_jax.data import tiny_imagenet

    return tiny_imagenet.prepare(data_dir, cache)


def _tiny_imagenet_files(data_dir):
    from awm_jax.data import tiny_imagenet

    return [tiny_imagenet.archive_in(data_dir)]


_SOURCES = {
    "digits": _Source(False, _digits, None, lambda _: (), _DIGITS),
    "gtsrb": _Source(False, _gtsrb, "gtsrb", lambda folder: folder.glob("GTSRB_*.zip"), _GTSRB),
    "cifar10": _Source(True, _cifar10, "tfds", lambda folder: folder.glob("cifar10/*/*"),
                       _CIFAR10),
    "mnist": _Source(False, _mnist, "mnist", lambda folder: folder.glob("*-ubyte.gz"), _DIGITS),
    "tiny_imagenet": _Source(True, _tiny_imagenet, "tiny_imagenet", _tiny_imagenet_files, None),
}
NAMES = tuple(_SOURCES)


def cache_directory() -> pathlib.Path:
    """Where prepared arrays and networks are kept: ``$AWM_CACHE_DIR`` or ``~/.cache/awm_jax``."""
    return pathlib.Path(os.environ.get("AWM_CACHE_DIR", "~/.cache/awm_jax")).expanduser()


def num_classes(name: str) -> int:
    """How many classes a data set has whose name decides them, without loading it.

    Example:
      >>> num_classes('gtsrb')
      43
    """
    fixed = {known: source.class_names for known, source in _SOURCES.items() if source.class_names}
    validate.choice(fixed, dataset=name)
    return len(fixed[name])


def flips(name: str) -> bool:
    """Whether a horizontal flip keeps the labels of a data set, without loading it.

    Args:
      name: one of `NAMES`; of a folder, who loads it says so.

    Raises:
      ValueError: another name.

    Example:
      >>> flips('gtsrb'), flips('cifar10')
      (False, True)
    """
    validate.choice(_SOURCES, dataset=name)
    return _SOURCES[name].flip


def load(name: str, data_dir: str | os.PathLike | None = None, *,
         image_size: int | tuple[int, int] | None = None, flip: bool = False) -> Dataset:
    """Loads a data set, preparing and caching it the first time and whenever its files change.

    Args:
      name: one of `NAMES`: ``'digits'`` needs no files, ``'gtsrb'`` takes the official archives,
        ``'cifar10'`` a prepared TFDS directory, ``'mnist'`` the four official files,
        ``'tiny_imagenet'`` the official archive or one of fewer classes laid out alike; or
        ``'folder:PATH'``, images of your own, see `awm_jax.data.folder.find`.
      data_dir: directory of the files, or of one folder a data set; by default ``$AWM_DATA_DIR``,
        and without that the cache, into which GTSRB, MNIST and Tiny ImageNet are downloaded where
        there is internet.
      image_size: of ``folder:PATH``: a side, or ``(height, width)``, in 8..1024, to resize to; None
        for the images' own size, if they have one.
      flip: of ``folder:PATH``: whether a horizontal flip keeps the label.

    Returns:
      `Dataset`.

    Raises:
      ValueError: an unknown name, options of ``folder:PATH`` beside another, or a folder that is
        laid out otherwise.
      FileNotFoundError: files are missing and could not be downloaded; says which, from where, and
        where to put them.
      OSError: a file is damaged.

    Example:
      >>> load('digits').train_images.shape
      (1100, 32, 32, 3)
    """
    if name.startswith(FOLDER):
        if data_dir is not None:
            raise ValueError(f"Expected no data_dir={data_dir} beside {name}: the path is in it.")
        return _load_folder(name.removeprefix(FOLDER), image_size, flip)
    validate.choice([*NAMES, f"{FOLDER}PATH"], dataset=name)
    if image_size is not None or flip:
        raise ValueError(f"Expected image_size={image_size} and flip={flip} beside {FOLDER}PATH "
                         f"only; those of {name} are known.")
    source = _SOURCES[name]
    where = _resolve(source, data_dir)
    found = store.fetch(
        _kept_in(name, str(where)), name,
        lambda: {} if where is None else store.stats(source.files(where)),
        lambda: source.prepare(where, cache_directory()), aloud=where is not None)
    full_name = f"{name}-{found.digest[:8]}" if found.digest else name
    return Dataset(full_name, *found.arrays, len(found.class_names), source.flip,
                   found.class_names)


def _load_folder(path: str, image_size: int | tuple[int, int] | None, flip: bool) -> Dataset:
    """A data set of one's own images."""
    from awm_jax.data import folder

    size = (image_size, image_size) if isinstance(image_size, int) else image_size
    if size is not None:
        folder.check_sides(size)
    listing = folder.find(path)
    name = f"folder-{folder.slug(listing.root)}"
    found = store.fetch(
        _kept_in(name, f"{listing.root}:{size}"), str(listing.root),
        lambda: folder.signature(listing), lambda: folder.prepare(listing, size))
    # The images decide what a network learns, and whether they are mirrored.
    full_name = f"{name}-{found.digest[:8]}" + ("-flip" if flip else "")
    return Dataset(full_name, *found.arrays, len(found.class_names), flip, found.class_names)


def _kept_in(name: str, origin: str) -> pathlib.Path:
    """Where the arrays of an origin are kept."""
    tag = hashlib.sha256(f"{_VERSION}:{origin}".encode()).hexdigest()[:10]
    return cache_directory() / "arrays" / f"{name}-{tag}"


def _resolve(source: _Source, data_dir: str | os.PathLike | None) -> pathlib.Path | None:
    """The directory that should hold the files; None when a package brings them."""
    if source.subfolder is None:
        return None
    given = data_dir or os.environ.get("AWM_DATA_DIR")
    if given is None:
        return cache_directory() / "downloads" / source.subfolder
    folder = pathlib.Path(given).expanduser().resolve()
    if not folder.is_dir():
        raise FileNotFoundError(f"Expected data_dir={folder} to be a directory; it is not there.")
    return folder / source.subfolder if (folder / source.subfolder).is_dir() else folder
