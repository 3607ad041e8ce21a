"""Data sets, their cache, and who sees which image."""

import csv
import gzip
import hashlib
import http.client
import io
import time
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from tensorflow_datasets.core.utils import tqdm_utils

from awm_jax import data
from awm_jax.data import augment, download, gtsrb, mixing, official, splits


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache and no data directory from outside."""
    monkeypatch.setenv("AWM_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("AWM_DATA_DIR", raising=False)
    return tmp_path / "cache"


@pytest.fixture
def offline(monkeypatch):
    """A machine without internet."""
    def refuse(*args, **kwargs):
        raise OSError("no route to host")

    monkeypatch.setattr("urllib.request.urlopen", refuse)


def _row(name, label, size, roi):
    return dict(zip(("Filename", "Width", "Height", "Roi.X1", "Roi.Y1", "Roi.X2", "Roi.Y2",
                     "ClassId"), (name, *size, *roi, label), strict=True))


def _archive(folder):
    """Tiny archives in the official layout, at original sizes: a red sign on blue."""
    folder.mkdir()
    rng = np.random.default_rng(0)

    def picture():
        pixels = np.zeros((60, 50, 3), np.uint8)
        pixels[..., 2] = 255
        pixels[6:54, 5:45] = (255, rng.integers(0, 50), 0)
        out = io.BytesIO()
        Image.fromarray(pixels).save(out, "PPM")
        return out.getvalue()

    def table(rows):
        out = io.StringIO()
        writer = csv.DictWriter(out, rows[0], delimiter=";")
        writer.writeheader()
        writer.writerows(rows)
        return out.getvalue()

    with zipfile.ZipFile(folder / "GTSRB_Final_Training_Images.zip", "w") as archive:
        for label in (0, 7):
            base = f"GTSRB/Final_Training/Images/{label:05d}"
            rows = [_row(f"0_{i}.ppm", label, (50, 60), (5, 6, 45, 54)) for i in range(2)]
            for row in rows:
                archive.writestr(f"{base}/{row['Filename']}", picture())
            archive.writestr(f"{base}/GT-{label:05d}.csv", table(rows))
    rows = [_row(f"{i:05d}.ppm", 7, (50, 60), (5, 6, 45, 54)) for i in range(3)]
    with zipfile.ZipFile(folder / "GTSRB_Final_Test_Images.zip", "w") as archive:
        for row in rows:
            archive.writestr(f"GTSRB/Final_Test/Images/{row['Filename']}", picture())
    with zipfile.ZipFile(folder / "GTSRB_Final_Test_GT.zip", "w") as archive:
        archive.writestr("GT-final_test.csv", table(rows))
    return folder


def test_gtsrb_builder_crops_and_caches(tmp_path, cache, monkeypatch, capsys, caplog):
    folder = _archive(tmp_path / "archives")
    monkeypatch.setattr(gtsrb, "COUNTS", {"train": 4, "test": 3})
    first = data.load("gtsrb", folder)
    # Where nobody watches a terminal, a line of ours, none of TFDS's bars and nothing of OpenCV.
    said = capsys.readouterr()
    assert f"TFDS makes gtsrb of the archives in {folder}: about a minute for 50,000" in said.out
    assert "examples" not in said.err and "OpenCV" not in caplog.text
    assert tqdm_utils._active  # and they are as they were
    assert first.train_images.shape == (4, 32, 32, 3) and first.train_images.dtype == np.uint8
    assert sorted(first.train_labels.tolist()) == [0, 0, 7, 7]
    assert first.test_labels.tolist() == [7, 7, 7] and first.num_classes == 43
    # The region of interest is the red sign: no blue is left but what the bilinear filter, whose
    # support is over a pixel wide when it shrinks, draws in along the border.
    inside = first.train_images[:, 1:-1, 1:-1]
    assert inside[..., 0].min() == 255 and inside[..., 2].max() == 0
    assert first.train_images[..., 2].max() < 100
    for archive in folder.iterdir():
        archive.unlink()
    started = time.perf_counter()
    again = data.load("gtsrb", folder)  # from the cache: the archives are gone
    assert time.perf_counter() - started < 2
    np.testing.assert_array_equal(first.train_images, again.train_images)


def test_region_of_interest_scales_with_a_resized_picture():
    pixels = np.zeros((30, 25, 3), np.uint8)
    pixels[3:27, 2:23] = 200  # the same sign at half the size
    row = _row("a", 0, (50, 60), (4, 6, 46, 54))
    out = np.asarray(gtsrb.crop(Image.fromarray(pixels), row))
    assert out.shape == (32, 32, 3) and out[2:-2, 2:-2].min() == 200
    uncropped = np.asarray(Image.fromarray(pixels).resize((32, 32)))
    assert uncropped[2:-2, 2:-2].min() < 200  # the test can fail


def test_incomplete_gtsrb_is_refused_and_leaves_nothing(tmp_path, cache):
    folder = _archive(tmp_path / "archives")
    with pytest.raises(OSError, match="39209 train images"):
        data.load("gtsrb", folder)
    assert not list(cache.iterdir())


def test_whole_archives_work_after_incomplete_ones(tmp_path, cache, monkeypatch):
    incomplete, whole = _archive(tmp_path / "incomplete"), _archive(tmp_path / "whole")
    name = "GTSRB_Final_Training_Images.zip"
    with zipfile.ZipFile(whole / name) as source, zipfile.ZipFile(incomplete / name, "w") as target:
        for member in source.namelist():
            if "00007" not in member:
                target.writestr(member, source.read(member))
    monkeypatch.setattr(gtsrb, "COUNTS", {"train": 4, "test": 3})
    with pytest.raises(OSError, match="found 2"):
        data.load("gtsrb", incomplete)
    (whole / name).replace(incomplete / name)  # as the message asks
    assert len(data.load("gtsrb", incomplete).train_labels) == 4


def test_damage_inside_an_archive_names_it(tmp_path, cache):
    folder = _archive(tmp_path / "archives")
    path = folder / "GTSRB_Final_Training_Images.zip"
    raw = bytearray(path.read_bytes())
    raw[500] ^= 255  # a pixel of the first picture: its checksum no longer holds
    path.write_bytes(raw)
    with pytest.raises(OSError, match=r"Training_Images\.zip is damaged"):
        data.load("gtsrb", folder)
    folder = _archive(tmp_path / "empty")
    with zipfile.ZipFile(folder / "GTSRB_Final_Test_Images.zip", "w") as archive:
        archive.writestr("readme.txt", "")
    with pytest.raises(OSError, match=r"Test_Images\.zip is damaged.*no \.ppm"):
        data.load("gtsrb", folder)
    assert not list(cache.iterdir())


@pytest.mark.parametrize("name, first", [
    ("gtsrb", r"Training_Images\.zip"), ("mnist", r"train-images-idx3-ubyte\.gz")])
@pytest.mark.parametrize("broken, error", [(True, FileNotFoundError), (False, OSError)])
def test_a_failed_download_leaves_nothing(broken, error, name, first, cache, monkeypatch):
    class Reply(io.BytesIO):
        def read(self, *args):
            if broken:
                raise http.client.IncompleteRead(b"")
            return super().read(*args)

    monkeypatch.setattr("urllib.request.urlopen", lambda *a, **k: Reply(b"not the archive"))
    with pytest.raises(error, match=first):
        data.load(name)
    assert not list((cache / "downloads" / name).iterdir())


def test_a_download_with_the_right_sum_is_kept_and_not_made_twice(tmp_path, monkeypatch):
    asked = []

    def urlopen(url, timeout):
        asked.append(url)
        return io.BytesIO(b"some bytes")

    monkeypatch.setattr("urllib.request.urlopen", urlopen)
    files = {"a.gz": hashlib.md5(b"some bytes").hexdigest()}
    for _ in range(2):
        download.fetch_missing("https://example.org/", files, tmp_path / "new")
    assert asked == ["https://example.org/a.gz"]
    assert (tmp_path / "new" / "a.gz").read_bytes() == b"some bytes"
    assert len(list((tmp_path / "new").iterdir())) == 1


def test_damaged_archive_is_named(tmp_path, cache):
    folder = _archive(tmp_path / "archives")
    path = folder / "GTSRB_Final_Training_Images.zip"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(OSError, match=r"Training_Images\.zip is no whole zip"):
        data.load("gtsrb", folder)


@pytest.mark.parametrize("name, words", [
    ("gtsrb", ["GTSRB_Final_Training_Images.zip", gtsrb.URL, "--data_dir"]),
    ("mnist", ["train-images-idx3-ubyte.gz", official.MNIST_URL, "--data_dir"]),
    ("cifar10", ["dataset_info.json", "--data_dir"])])
def test_missing_data_is_said_at_once(name, words, cache, offline):
    started = time.perf_counter()
    with pytest.raises(FileNotFoundError) as caught:
        data.load(name)
    assert time.perf_counter() - started < 20
    assert all(word in str(caught.value) for word in words)


def test_cifar10_without_its_records_is_refused(shared_data, tmp_path, cache):
    prepared = tmp_path / "cifar10" / "3.0.2"
    prepared.mkdir(parents=True)
    for path in (shared_data / "tfds" / "cifar10" / "3.0.2").iterdir():
        if "array_record" not in path.name:
            (prepared / path.name).write_bytes(path.read_bytes())
    with pytest.raises(OSError, match=r"3\.0\.2 is no whole prepared CIFAR-10"):
        data.load("cifar10", tmp_path)


def test_unknown_names_and_directories(cache):
    with pytest.raises(ValueError, match="gtsrb"):
        data.load("gtsrbb")
    with pytest.raises(FileNotFoundError, match="/nowhere"):
        data.load("gtsrb", "/nowhere")


def test_digits_are_real_and_whole(cache):
    digits = data.load("digits")
    assert digits.train_images.shape == (1100, 32, 32, 3)
    assert len(digits.test_labels) == 697 and set(digits.test_labels) == set(range(10))
    assert digits.test_images.max() == 255 and digits.test_images.min() == 0


def test_mnist_files(shared_data, cache):
    mnist = data.load("mnist", shared_data)
    assert mnist.train_images.shape == (60000, 32, 32, 3)
    assert mnist.test_labels[:4].tolist() == [7, 2, 1, 0]  # as every copy of MNIST begins
    assert mnist.train_images[:, :2].max() == 0  # the padding
    assert mnist.name == "mnist"


def test_damaged_mnist_is_named(tmp_path, cache):
    for name in official.MNIST_FILES:
        (tmp_path / name).write_bytes(gzip.compress(b"nonsense"))
    with pytest.raises(OSError, match="train-images"):
        data.load("mnist", tmp_path)


@pytest.mark.parametrize("count, pool", [(12630, 5000), (697, 232)])
def test_pool_and_evaluation_share_nothing(count, pool):
    dataset = data.Dataset("x", np.zeros(0), np.zeros(0), np.zeros((count, 1)), np.zeros(count),
                           2, False)
    split, again = splits.defender_split(dataset), splits.defender_split(dataset)
    assert len(split.pool_indices) == pool
    both = np.concatenate(split)
    np.testing.assert_array_equal(np.sort(both), np.arange(count))
    np.testing.assert_array_equal(both, np.concatenate(again))


@pytest.mark.parametrize("samples, per_class", [("one-shot", [1, 1, 1]), (3, [1, 1, 1]),
                                                (6, [2, 2, 2]), (11, [5, 4, 2])])
def test_draws_are_stratified(samples, per_class):
    labels = np.array([0] * 8 + [1] * 4 + [2] * 2)
    chosen = splits.draw_clean(1, labels, 3, samples)
    assert len(np.unique(chosen)) == sum(per_class)
    assert np.bincount(labels[chosen], minlength=3).tolist() == per_class
    np.testing.assert_array_equal(chosen, splits.draw_clean(1, labels, 3, samples))


def test_impossible_draws_are_refused():
    with pytest.raises(ValueError, match="none of \\[1\\]"):
        splits.draw_clean(0, np.array([0, 2]), 3)
    with pytest.raises(ValueError, match="samples=9"):
        splits.draw_clean(0, np.array([0, 1]), 2, 9)


@pytest.mark.parametrize("flip", [False, True])
def test_crops_are_shifts(flip):
    """A ramp of columns stays a ramp: shifted, clamped at the border, mirrored or not."""
    ramp = np.broadcast_to(np.arange(8.0, dtype=np.float32)[None, None, :, None], (32, 8, 8, 1))
    key = jax.random.key(0)
    out = np.asarray(augment.crop_flip(key, ramp, pad=2, flip=flip))
    np.testing.assert_array_equal(
        out, jax.jit(augment.crop_flip, static_argnames="flip")(key, ramp, pad=2, flip=flip))
    mirrored = 0
    for image in out[..., 0]:
        row = image[0]
        assert (image == row).all()
        mirrored += row[0] > row[-1]
        row = row[::-1] if row[0] > row[-1] else row
        shift = row[4] - 4
        np.testing.assert_array_equal(row, np.clip(np.arange(8) + shift, 0, 7))
        assert abs(shift) <= 3 if flip else abs(shift) <= 2
    assert (mirrored > 0) == flip


def test_mixing_stays_in_range_and_keeps_some_images():
    images = np.random.default_rng(0).random((30, 8, 8, 3), np.float32)
    out = np.asarray(mixing.mix(jax.random.key(0), images))
    same = (out == images).all(axis=(1, 2, 3))
    assert 0 < same.sum() < 30 and out.min() >= 0 and out.max() <= 1
    np.testing.assert_array_equal(out, mixing.mix(jax.random.key(0), images))


def test_boxes_are_rectangles_of_a_partner():
    """On images of one value each a cut one has two values, the second in a rectangle."""
    images = np.broadcast_to(np.arange(60, dtype=np.float32)[:, None, None, None], (60, 16, 8, 1))
    out = np.asarray(mixing.mix(jax.random.key(0), images, boxes=True))[..., 0]
    rectangles = 0
    for i, image in enumerate(out):
        inside = image != i
        if len(np.unique(image)) == 2:
            rows, columns = np.flatnonzero(inside.any(axis=1)), np.flatnonzero(inside.any(axis=0))
            assert inside[rows[0]:rows[-1] + 1, columns[0]:columns[-1] + 1].all()
            assert 3 <= len(rows) <= 15 and 1 <= len(columns) <= 8
            assert len(np.unique(image[inside])) == 1 and image[inside][0] % 1 == 0
            rectangles += 1
    assert 10 < rectangles < 30


def test_mixup_mixes_images_and_labels_alike():
    """Each image is a one-hot vector of its label, so both parts must come out the same."""
    labels = jnp.arange(8) % 5
    images = jax.nn.one_hot(labels, 5)[:, None, None, :]
    mixed, probabilities = mixing.mixup(jax.random.key(0), images, labels, 5)
    np.testing.assert_allclose(mixed[:, 0, 0], probabilities, rtol=1e-6)
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, rtol=1e-6)
    share = np.take_along_axis(np.asarray(probabilities), np.asarray(labels)[:, None], 1)[:, 0]
    assert ((share > 0) & (share <= 1)).all() and share.std() > 0.1
    assert (np.count_nonzero(np.asarray(probabilities) > 1e-6, axis=1) == 2).any()
