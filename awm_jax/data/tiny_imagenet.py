"""Tiny ImageNet: a TFDS builder for the official archive, or one of fewer classes."""

import functools
import io
import pathlib
import zipfile
from collections.abc import Iterator

import tensorflow_datasets as tfds
from PIL import Image

from awm_jax.data import archives, download, store, tfds_arrays
from awm_jax.data.store import Prepared

URL = "http://cs231n.stanford.edu/"
OFFICIAL = "tiny-imagenet-200.zip"
# As ten public loaders have it for the file of 248,100,043 bytes; its publisher gives no sum.
MD5 = "90528d7ca1a48142e341f4ef8d21d0de"
COUNTS = {"train": 100_000, "test": 10_000}
SIZE = 64


def archive_in(folder: pathlib.Path) -> pathlib.Path:
    """The archive that a directory holds: the official one, or the only other of its kind.

    Args:
      folder: where ``tiny-imagenet-200.zip`` is or is to be, or one ``tiny-imagenet-*.zip`` with
        fewer classes.

    Returns:
      Its path; the official one's where there is none.

    Raises:
      ValueError: several others.
    """
    official = folder / OFFICIAL
    others = [] if official.exists() else sorted(folder.glob("tiny-imagenet-*.zip"))
    if len(others) > 1:
        raise ValueError(f"Expected {OFFICIAL} or one other tiny-imagenet-*.zip in {folder}, found "
                         f"{', '.join(path.name for path in others)}. Leave one there.")
    return others[0] if others else official


def _classes(path: pathlib.Path) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Identifiers and names of the classes of an archive."""
    with archives.opened(path, URL) as archive:
        wnids = tuple(archive.read(archives.member(archive, "wnids.txt")).decode().split())
        if len(wnids) < 2 or len(set(wnids)) != len(wnids):
            raise OSError(f"wnids.txt lists {len(wnids)} classes, {len(set(wnids))} of them "
                          "different; expected two or more, all different")
        lines = archive.read(archives.member(archive, "words.txt")).decode().splitlines()
        words = dict(line.split("\t", 1) for line in lines if "\t" in line)
    # The first of several words for the same thing.
    return wnids, tuple(words.get(wnid, wnid).split(",")[0].strip() for wnid in wnids)


def examples(path: pathlib.Path, wnids: tuple[str, ...],
             split: str) -> Iterator[tuple[str, bytes, int]]:
    """Yields ``(name, encoded image, class)`` of every image of a split; 'test' is ``val/``."""
    label_of = {wnid: label for label, wnid in enumerate(wnids)}
    with archives.opened(path, URL) as archive:
        root = archives.member(archive, "wnids.txt").removesuffix("wnids.txt")
        if split == "train":
            labels = {}
            for name in archive.namelist():
                parts = name.removeprefix(f"{root}train/").split("/")
                if name.startswith(f"{root}train/") and name.lower().endswith(".jpeg"):
                    labels[name] = parts[0]
        else:
            rows = archive.read(f"{root}val/val_annotations.txt").decode().splitlines()
            cells = [row.split("\t") for row in rows if row.strip()]
            labels = {f"{root}val/images/{row[0]}": row[1] for row in cells}
        lacking = sorted(set(wnids) - set(labels.values()))
        unknown = sorted(set(labels.values()) - set(wnids))
        if lacking or unknown:
            raise OSError(f"its {split} images are of other classes than wnids.txt lists: none of "
                          f"{', '.join(lacking[:5]) or '-'}, and unknown "
                          f"{', '.join(unknown[:5]) or '-'}")
        for name in sorted(labels):
            yield name, _encoded(archive, name), label_of[labels[name]]


def _encoded(archive: zipfile.ZipFile, name: str) -> bytes:
    """The JPEG as it is, or, where that is grey or CMYK, a PNG of it in RGB."""
    raw = archive.read(name)
    with Image.open(io.BytesIO(raw)) as image:
        if image.size != (SIZE, SIZE):
            raise OSError(f"{name} has {image.size[0]}x{image.size[1]} pixels, expected 64x64")
        if image.mode == "RGB":
            return raw
        buffer = io.BytesIO()
        image.convert("RGB").save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


class TinyImagenet(tfds.core.GeneratorBasedBuilder):
    """Classes of ImageNet at 64x64 RGB; the test split is the official validation set.

    Args:
      archive: its file name.
      wnids: its classes by WordNet's identifiers, as in ``wnids.txt``: the place is the label.
    """

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "As published; greyscale images as RGB."}  # noqa: RUF012
    MANUAL_DOWNLOAD_INSTRUCTIONS = f"Put {OFFICIAL} from {URL} into the directory."

    def __init__(self, *, archive: str, wnids: tuple[str, ...], **options):
        self._archive, self._wnids = archive, wnids  # `_info` reads them
        super().__init__(**options)

    def _info(self) -> tfds.core.DatasetInfo:
        """Features and provenance."""
        return tfds.core.DatasetInfo(
            builder=self,
            description="Tiny ImageNet: 200 classes of ImageNet at 64x64 pixels.",
            homepage="http://cs231n.stanford.edu/",
            features=tfds.features.FeaturesDict({
                "image": tfds.features.Image(shape=(SIZE, SIZE, 3)),
                "label": tfds.features.ClassLabel(names=list(self._wnids))}),
            supervised_keys=("image", "label"),
        )

    def _split_generators(self, dl_manager):
        """The official training and validation sets; the published test set has no labels."""
        path = pathlib.Path(dl_manager.manual_dir) / self._archive
        return {split: self._generate_examples(path, split) for split in ("train", "test")}

    def _generate_examples(self, path, split):
        """Encoded images as they are, so that nothing is decoded twice."""
        for name, encoded, label in examples(path, self._wnids, split):
            yield name, {"image": encoded, "label": label}


def prepare(folder: pathlib.Path, cache: pathlib.Path) -> Prepared:
    """Arrays of Tiny ImageNet from the archive in ``folder``, downloaded if there is none.

    Args:
      folder: where the archive is, or is to be; see `archive_in`.
      cache: where TFDS writes while it prepares.

    Returns:
      `Prepared`; with a digest unless the archive is the official one.

    Raises:
      FileNotFoundError: no archive, and it could not be downloaded.
      OSError: it is damaged, or not what its name says.
      ValueError: several archives, none the official one.
    """
    path = archive_in(folder)
    if path.name == OFFICIAL:
        download.fetch_missing(URL, {OFFICIAL: MD5}, folder)
    archives.check_whole(path, URL)
    wnids, names = _classes(path)
    arrays = tfds_arrays.prepare_and_read(
        functools.partial(TinyImagenet, archive=path.name, wnids=wnids), folder, cache)
    if path.name != OFFICIAL:
        print(f"{path} has {len(wnids)} of the 200 classes of Tiny ImageNet.", flush=True)
        return Prepared(arrays, names, store.digest(arrays))
    for split, labels in (("train", arrays[1]), ("test", arrays[3])):
        if len(labels) != COUNTS[split]:
            raise OSError(
                f"Expected {COUNTS[split]} {split} images in {path}, found {len(labels)}: it is "
                f"not the whole of Tiny ImageNet. Get it anew from {URL}, or give a part of it "
                "another name, tiny-imagenet-*.zip."
            )
    return Prepared(arrays, names)
