"""Images of your own: a folder of each class, with or without a given split."""

import collections
import concurrent.futures
import hashlib
import itertools
import os
import pathlib
import re
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from awm_jax import validate
from awm_jax.data import decode, store
from awm_jax.data.store import Prepared

EXTENSIONS = frozenset(
    ".png .jpg .jpeg .ppm .pgm .bmp .webp .tif .tiff".split())
TEST_SHARE = 0.25  # of each class, where no split is given
MINIMUM = 8  # images of a class to be split: a quarter are two, one to draw and one to measure
MINIMUM_TEST = 2
SIDES = (8, 1024)  # pixels: three poolings need eight
BYTES = 8 << 30  # of all the images together: they are held in memory, and on the device
_SEED = 2022  # of the one fixed split; never a parameter
_GIVEN = ("test", "val")  # names of a given test set, the first one there

Files = tuple[tuple[pathlib.Path, ...], ...]  # of class 0, 1, ...


class Listing(NamedTuple):
    """What a folder of images holds.

    Args:
      root: the folder.
      class_names: names of the class folders, in order.
      train: files of each class, in order; all of them where ``test`` is None.
      test: files of each class of a given test set, or None.
      skipped: what was left out, and how many of each.
    """

    root: pathlib.Path
    class_names: tuple[str, ...]
    train: Files
    test: Files | None
    skipped: collections.Counter


def natural(name: str) -> tuple:
    """Sorts names as people do: '9' before '10', 'b' after 'A'.

    Example:
      >>> sorted(['sign10', 'sign9', 'Sign1', 'sign'], key=natural)
      ['sign', 'Sign1', 'sign9', 'sign10']
    """
    parts: list = re.split(r"([0-9]+)", name.casefold())
    # A number by its length first: Python reads no more than 4,300 digits into an int.
    parts[1::2] = [(len(digits), digits) for digits in (part.lstrip("0") for part in parts[1::2])]
    return parts, name


def slug(path: pathlib.Path) -> str:
    """A folder's name with nothing in it that a file name should not have.

    Example:
      >>> slug(pathlib.Path('/data/My signs: 2024/'))
      'My-signs-2024'
    """
    return re.sub(r"[^A-Za-z0-9_]+", "-", path.name).strip("-")[:40] or "images"


def find(path: str | os.PathLike) -> Listing:
    """Lists a folder of images and checks its layout; opens no image.

    Args:
      path: holds ``CLASS/*.png`` (or another of `EXTENSIONS`), or ``train/CLASS`` and
        ``test/CLASS`` (or ``val/CLASS``). Names that begin with a dot are left out.

    Returns:
      `Listing`; classes and files in `natural` order.

    Raises:
      FileNotFoundError: no such folder.
      ValueError: another layout, an empty class, a single one, or too few images; says which.
    """
    root = pathlib.Path(path).expanduser().resolve()
    if not root.is_dir():
        raise FileNotFoundError(f"Expected a folder of images at {root}; "
                                + ("it is a file: unpack it." if root.exists() else
                                   "nothing is there."))
    skipped: collections.Counter = collections.Counter()
    splits = _given_split(root, skipped)
    if splits is None:
        names, files = _classes(root, skipped)
        _check_counts(root, names, files, MINIMUM)
        return Listing(root, names, files, None, skipped)
    (names, train), (others, test) = (_classes(split, skipped) for split in splits)
    if names != others:
        lacking, extra = set(names) - set(others), set(others) - set(names)
        raise ValueError(f"Expected the same classes in {splits[0]} and {splits[1]}; only the "
                         f"first has {_some(lacking)}, only the second {_some(extra)}.")
    _check_counts(splits[0], names, train, 1)
    _check_counts(splits[1], names, test, MINIMUM_TEST)
    return Listing(root, names, train, test, skipped)


def _some(names) -> str:
    """A few names in order, and how many more there are."""
    names = sorted(names, key=natural)
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + more if names else "none"


def _sorted_entries(folder: pathlib.Path, skipped) -> tuple[list[pathlib.Path], list[pathlib.Path]]:
    """Folders and files of a folder in natural order, hidden ones left out and counted."""
    folders, files = [], []
    for entry in sorted(folder.iterdir(), key=lambda entry: natural(entry.name)):
        if entry.name.startswith(".") or entry.name == "__MACOSX":
            skipped["hidden"] += 1
        elif entry.is_dir():
            folders.append(entry)
        else:
            files.append(entry)
    return folders, files


def _is_image(path: pathlib.Path) -> bool:
    """Whether a file's name says that it is an image."""
    return path.suffix.lower() in EXTENSIONS and path.is_file()


def _given_split(root: pathlib.Path, skipped) -> tuple[pathlib.Path, pathlib.Path] | None:
    """The folders of a given split; None where ``root`` holds the classes themselves.

    A folder of that name with images in it is a class: there are data sets of trains.
    """
    ignored: collections.Counter = collections.Counter()
    folders, _ = _sorted_entries(root, ignored)
    found = {}
    for folder in folders:
        if folder.name in ("train", *_GIVEN):
            inner, files = _sorted_entries(folder, ignored)
            if inner and not any(map(_is_image, files)):
                found[folder.name] = folder
    tests = [name for name in _GIVEN if name in found]
    if "train" not in found:
        return None
    if not tests:
        raise ValueError(f"Expected {root}/test (or val) beside {root}/train, found none. Add it, "
                         f"or name {root}/train itself to have it split.")
    used = {"train", tests[0]}
    skipped["folders beside train and " + tests[0]] += sum(f.name not in used for f in folders)
    return found["train"], found[tests[0]]


def _classes(folder: pathlib.Path, skipped) -> tuple[tuple[str, ...], Files]:
    """Names and files of the class folders in a folder."""
    folders, loose = _sorted_entries(folder, skipped)
    skipped["files outside class folders"] += len(loose)
    if len(folders) < 2:
        raise ValueError(
            f"Expected a folder of each class in {folder}, two at least, found {len(folders)}"
            + (f" ({folders[0].name})" if folders else "")
            + (f", and {len(loose)} files that are in none" if loose else "") + ".")
    every = []
    for inside in folders:
        deeper, files = _sorted_entries(inside, skipped)
        images = tuple(filter(_is_image, files))
        if not images:
            raise ValueError(
                f"Expected images ({', '.join(sorted(EXTENSIONS))}) in the class folder {inside}, "
                f"found none, but {len(files)} other files and {len(deeper)} folders. Images lie "
                "right in their class's folder; a given split is called train and test (or val).")
        skipped["folders inside class folders"] += len(deeper)
        skipped.update(f"{path.suffix or 'no suffix'}" for path in files if not _is_image(path))
        every.append(images)
    return tuple(inside.name for inside in folders), tuple(every)


def _check_counts(folder: pathlib.Path, names, files: Files, minimum: int) -> None:
    """ValueError unless every class has so many images."""
    few = [f"{name} ({len(own)})" for name, own in zip(names, files, strict=True)
           if len(own) < minimum]
    if few:
        raise ValueError(f"Expected at least {minimum} images of every class in {folder}; fewer "
                         f"have: {_some(few)}.")


def signature(listing: Listing) -> dict[str, str]:
    """What changes when a file comes, goes, or is written anew: a digest of names, sizes, times."""
    found = hashlib.sha256()
    for path in itertools.chain(*listing.train, *(listing.test or ())):
        stat = path.stat()
        found.update(f"{path}\0{stat.st_size}\0{stat.st_mtime_ns}\0".encode(errors="replace"))
    return {"listing": found.hexdigest()}


def split(files: Files) -> tuple[Files, Files]:
    """Splits files without a given split: of each class a quarter is for testing, by fixed lot.

    Args:
      files: of each class.

    Returns:
      ``(train, test)``, of each class in the order given.

    Example:
      >>> names = tuple(pathlib.Path(f'{i}.png') for i in range(8))
      >>> [len(own) for part in split((names, names)) for own in part]
      [6, 6, 2, 2]
    """
    rng = np.random.default_rng(_SEED)
    train, test = [], []
    for own in files:
        chosen = set(rng.permutation(len(own))[: round(TEST_SHARE * len(own))].tolist())
        train.append(tuple(path for i, path in enumerate(own) if i not in chosen))
        test.append(tuple(path for i, path in enumerate(own) if i in chosen))
    return tuple(train), tuple(test)


def prepare(listing: Listing, size: tuple[int, int] | None) -> Prepared:
    """Decodes a listed folder.

    Args:
      listing: from `find`.
      size: ``(height, width)`` to resize to; None for the images' own, if they have one.

    Returns:
      `Prepared`, with a digest.

    Raises:
      ValueError: images of several sizes and no ``size``, too small, or too many for the memory.
      OSError: images that cannot be read; names them.
    """
    for what, count in sorted(listing.skipped.items()):
        if count:
            print(f"Skipped in {listing.root}: {count} {what}", flush=True)
    parts = split(listing.train) if listing.test is None else (listing.train, listing.test)
    paths = [path for part in parts for own in part for path in own]
    size = _own_size(listing.root, paths) if size is None else size
    _check_size(listing.root, len(paths), size)
    images = np.stack(each(paths, lambda path: decode.rgb(path, size)))
    labels = [np.repeat(np.arange(len(part), dtype=np.int32), [len(own) for own in part])
              for part in parts]
    count = len(labels[0])
    arrays = images[:count], labels[0], images[count:], labels[1]
    return Prepared(arrays, listing.class_names, store.digest(arrays))


def _own_size(root: pathlib.Path, paths: Sequence[pathlib.Path]) -> tuple[int, int]:
    """The size that all images have; ValueError tells the sizes if there are several."""
    sizes = collections.Counter(each(paths, decode.size_of))
    if len(sizes) == 1:
        return next(iter(sizes))
    (often, count), *_ = sizes.most_common()
    small, large = (f(sizes, key=lambda size: size[0] * size[1]) for f in (min, max))
    raise ValueError(
        f"Expected images of one size in {root}, found {len(sizes)} sizes, from {_text(small)} to "
        f"{_text(large)}, most often {_text(often)} ({count} of {len(paths)}; height x width). "
        "Choose one to resize them to: --image_size 32 is what most networks and attacks here are "
        "made for, --image_size HEIGHTxWIDTH need not be square.")


def _text(size: tuple[int, int]) -> str:
    """A size in words."""
    return f"{size[0]}x{size[1]}"


def check_sides(size: tuple[int, int]) -> None:
    """Raises ValueError unless both sides are within `SIDES`."""
    height, width = size
    validate.between(*SIDES, image_height=height, image_width=width)


def _check_size(root: pathlib.Path, count: int, size: tuple[int, int]) -> None:
    """ValueError unless networks can take images of this size, and the memory all of them."""
    if not all(SIDES[0] <= side <= SIDES[1] for side in size):
        raise ValueError(f"Expected images of {SIDES[0]} to {SIDES[1]} pixels a side in {root}, "
                         f"they have {_text(size)}. Resize them with --image_size 32.")
    needed = count * size[0] * size[1] * 3
    if needed > BYTES:
        raise ValueError(f"Expected images that fit into {BYTES >> 30} GiB; the {count} in {root} "
                         f"need {needed / (1 << 30):.0f} at {_text(size)}. Choose a smaller "
                         "--image_size.")


def each(paths: Sequence[pathlib.Path], read: Callable[[pathlib.Path], Any]) -> list:
    """``read`` of every file, several at a time; those that cannot be read are named together.

    Args:
      paths: the files.
      read: raises ValueError for a file that it cannot read.

    Returns:
      What ``read`` gave, in the order of ``paths``.

    Raises:
      OSError: names five of the files that cannot be read, with the reason, and says how many more.

    Example:
      >>> each([pathlib.Path('a.png'), pathlib.Path('b.bmp')], lambda path: path.suffix)
      ['.png', '.bmp']
    """
    broken: dict[int, str] = {}

    def one(item):
        index, path = item
        try:
            return read(path)
        except ValueError as error:
            broken[index] = f"{path} ({error})"

    Image.init()  # loads Pillow's formats here, not in several threads at once
    out, last = [], time.monotonic()
    pool = concurrent.futures.ThreadPoolExecutor(os.cpu_count())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # it is refused instead
        try:
            for result in pool.map(one, enumerate(paths)):
                out.append(result)
                if time.monotonic() - last > 10:
                    last = time.monotonic()
                    print(f"{len(out)}/{len(paths)} images", flush=True)
        finally:
            pool.shutdown(cancel_futures=True)
    if broken:
        first = [broken[index] for index in sorted(broken)]
        more = f"; and {len(first) - 5} more" if len(first) > 5 else ""
        raise OSError(f"Expected whole images, {len(first)} of {len(paths)} cannot be read: "
                      f"{'; '.join(first[:5])}{more}. Repair or remove them.")
    return out
