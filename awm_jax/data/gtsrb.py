"""German Traffic Sign Recognition Benchmark: a TFDS builder for the official archives."""

import csv
import io
import pathlib
import zipfile
from collections.abc import Iterator

import tensorflow_datasets as tfds
from PIL import Image

from awm_jax.data import archives, download, tfds_arrays

URL = "https://sid.erda.dk/public/archives/daaeac0d7ce1152aea9b61d9f1e19370/"
# md5 of the official files.
ARCHIVES = {
    "GTSRB_Final_Training_Images.zip": "f33fd80ac59bff73c82d25ab499e03a3",
    "GTSRB_Final_Test_Images.zip": "c7e4e6327067d32654124b0fe9e82185",
    "GTSRB_Final_Test_GT.zip": "fe31e9c9270bbcd7b84b7f21a9d9d9e5",
}
COUNTS = {"train": 39_209, "test": 12_630}
SIZE = 32


def crop(image: Image.Image, row: dict[str, str]) -> Image.Image:
    """Cuts out the region of interest and resizes it to 32x32, bilinearly.

    Args:
      image: the picture, of its original size or already resized.
      row: its line of the CSV; ``Roi.*`` are in pixels of a ``Width`` x ``Height`` picture, so they
        are scaled to the picture at hand.

    Returns:
      A 32x32 RGB picture.
    """
    x = image.size[0] / int(row["Width"])
    y = image.size[1] / int(row["Height"])
    box = (int(row["Roi.X1"]) * x, int(row["Roi.Y1"]) * y,
           int(row["Roi.X2"]) * x, int(row["Roi.Y2"]) * y)
    return image.convert("RGB").resize((SIZE, SIZE), Image.Resampling.BILINEAR, box=box)


def _rows(archive: zipfile.ZipFile, member: str) -> list[dict[str, str]]:
    """Lines of a semicolon-separated CSV inside an archive."""
    return list(csv.DictReader(io.StringIO(archive.read(member).decode()), delimiter=";"))


def examples(folder: pathlib.Path, split: str) -> Iterator[tuple[str, bytes, int]]:
    """Yields ``(name, png bytes, class)`` of every image of a split."""
    if split == "train":
        with archives.opened(folder / "GTSRB_Final_Training_Images.zip", URL) as archive:
            tables = sorted(n for n in archive.namelist() if n.endswith(".csv"))
            for table in tables:
                for row in _rows(archive, table):
                    name = f"{table.rsplit('/', 1)[0]}/{row['Filename']}"
                    yield name, *_encoded(archive, name, row)
        return
    with archives.opened(folder / "GTSRB_Final_Test_GT.zip", URL) as truth:
        rows = _rows(truth, archives.member(truth, "GT-final_test.csv"))
    with archives.opened(folder / "GTSRB_Final_Test_Images.zip", URL) as archive:
        pictures = [n for n in archive.namelist() if n.endswith(".ppm")]
        if not pictures:
            raise OSError("it holds no .ppm image")
        parent = pictures[0].rsplit("/", 1)[0]
        for row in rows:
            name = f"{parent}/{row['Filename']}"
            yield name, *_encoded(archive, name, row)


def _encoded(archive: zipfile.ZipFile, name: str, row: dict[str, str]) -> tuple[bytes, int]:
    """One cropped image as PNG bytes, and its class."""
    buffer = io.BytesIO()
    crop(Image.open(io.BytesIO(archive.read(name))), row).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue(), int(row["ClassId"])


class Gtsrb(tfds.core.GeneratorBasedBuilder):
    """43 classes of traffic signs, region of interest cropped, 32x32 RGB."""

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "Region of interest cropped, then resized to 32x32."}  # noqa: RUF012
    MANUAL_DOWNLOAD_INSTRUCTIONS = f"Put {', '.join(ARCHIVES)} from {URL} into the directory."

    def _info(self) -> tfds.core.DatasetInfo:
        """Features and provenance."""
        return tfds.core.DatasetInfo(
            builder=self,
            description="German Traffic Sign Recognition Benchmark, cropped to 32x32.",
            homepage="https://benchmark.ini.rub.de/gtsrb_news.html",
            features=tfds.features.FeaturesDict({
                "image": tfds.features.Image(shape=(SIZE, SIZE, 3)),
                "label": tfds.features.ClassLabel(num_classes=43)}),
            supervised_keys=("image", "label"),
        )

    def _split_generators(self, dl_manager):
        """The official split."""
        folder = pathlib.Path(dl_manager.manual_dir)
        return {split: self._generate_examples(folder, split) for split in ("train", "test")}

    def _generate_examples(self, folder, split):
        """Encoded images as they are, so that nothing is decoded twice."""
        for name, png, label in examples(folder, split):
            yield name, {"image": png, "label": label}


def prepare(folder: pathlib.Path, cache: pathlib.Path):
    """Arrays of GTSRB from archives in ``folder``, downloaded if they are missing.

    Args:
      folder: where the three archives are, or are to be.
      cache: where TFDS writes while it prepares.

    Returns:
      ``(train_images, train_labels, test_images, test_labels)``.
    """
    download.fetch_missing(URL, ARCHIVES, folder)
    for path in (folder / name for name in ARCHIVES):
        archives.check_whole(path, URL)
    arrays = tfds_arrays.prepare_and_read(Gtsrb, folder, cache)
    for split, labels in (("train", arrays[1]), ("test", arrays[3])):
        if len(labels) != COUNTS[split]:
            raise OSError(
                f"Expected {COUNTS[split]} {split} images in {folder}, found {len(labels)}: the "
                f"archives are not the whole of GTSRB. Get them anew from {URL}."
            )
    return arrays
