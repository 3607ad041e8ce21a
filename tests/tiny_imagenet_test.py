"""Tiny ImageNet from archives of the official layout, and arrays that follow their files."""

import collections
import gzip
import hashlib
import io
import os
import zipfile

import numpy as np
import pytest
from PIL import Image

from awm_jax import data
from awm_jax.data import store, tiny_imagenet

WNIDS = ("n03", "n01")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache and no data directory from outside."""
    monkeypatch.setenv("AWM_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("AWM_DATA_DIR", raising=False)
    return tmp_path / "cache"


def _picture(seed, mode="RGB", size=64):
    noise = np.random.default_rng(seed).integers(0, 256, (size, size, 3), np.uint8)
    out = io.BytesIO()
    Image.fromarray(noise).convert(mode).save(out, "JPEG")
    return out.getvalue()


def _members():
    """Two classes of two and one images; one is grey, one CMYK."""
    return {
        "wnids.txt": "\n".join(WNIDS), "words.txt": "n01\tfish, Piscis\nn02\tx\nn03\tblack stork\n",
        "train/n01/images/n01_0.JPEG": _picture(0), "train/n01/images/n01_1.JPEG": _picture(1, "L"),
        "train/n01/n01_boxes.txt": "n01_0.JPEG\t0\t0\t9\t9\n",
        "train/n03/images/n03_0.JPEG": _picture(2, "CMYK"),
        "train/n03/images/n03_1.JPEG": _picture(3),
        "val/val_annotations.txt": "val_1.JPEG\tn01\t0\t0\t9\t9\nval_0.JPEG\tn03\t0\t0\t9\t9\n",
        "val/images/val_0.JPEG": _picture(4), "val/images/val_1.JPEG": _picture(5),
        "test/images/test_0.JPEG": _picture(6)}


def _archive(folder, name="tiny-imagenet-2.zip", changes=()):
    """An archive of `_members`, some of them changed or (None) left out."""
    folder.mkdir(exist_ok=True)
    with zipfile.ZipFile(folder / name, "w") as archive:
        for member, content in {**_members(), **dict(changes)}.items():
            if content is not None:
                archive.writestr(f"tiny-imagenet-200/{member}", content)
    return folder / name


def _by_pillow(encoded):
    return np.asarray(Image.open(io.BytesIO(encoded)).convert("RGB"))


def test_reads_every_image_of_a_part_under_a_name_of_its_own(tmp_path, cache, capsys):
    _archive(tmp_path / "tiny_imagenet")
    found = data.load("tiny_imagenet", tmp_path)
    assert found.class_names == ("black stork", "fish") and found.num_classes == 2 and found.flip
    assert "2 of the 200 classes" in capsys.readouterr().out
    members = _members()
    expected = {_by_pillow(content).tobytes(): WNIDS.index(name.split("/")[1])
                for name, content in members.items() if name.startswith("train") and "JPEG" in name}
    assert {image.tobytes(): label for image, label in zip(
        found.train_images, found.train_labels.tolist(), strict=True)} == expected
    for name, label in (("val_0", 0), ("val_1", 1)):
        image = found.test_images[found.test_labels == label]
        np.testing.assert_array_equal(image[0], _by_pillow(members[f"val/images/{name}.JPEG"]))
    assert len(found.test_labels) == 2  # the published test set has no labels
    assert found.name == "tiny_imagenet-" + store.digest(
        (found.train_images, found.train_labels, found.test_images, found.test_labels))[:8]


def test_the_shared_sample(shared_data, cache):
    found = data.load("tiny_imagenet", shared_data)
    assert found.class_names == ("goldfish", "centipede", "black stork", "tabby")
    assert np.bincount(found.train_labels).tolist() == [500] * 4
    assert np.bincount(found.test_labels).tolist() == [50] * 4
    path = shared_data / "tiny_imagenet" / "tiny-imagenet-4-classes.zip"
    read = collections.Counter(image.tobytes() for image in found.train_images)
    greys = 0
    with zipfile.ZipFile(path) as archive:
        names = [name for name in archive.namelist() if "/train/n02123045/" in name]
        for name in names:
            encoded = archive.read(name)
            greys += Image.open(io.BytesIO(encoded)).mode == "L"
            assert read[_by_pillow(encoded).tobytes()]
    assert len(names) == 500 and greys
    with pytest.raises(ValueError, match="gtsrb"):
        data.num_classes("tiny_imagenet")  # the archive says


@pytest.mark.parametrize("changes, words", [
    ({"val/val_annotations.txt": "val_0.JPEG\tn03\n"}, "test images.*none of n01"),
    ({"train/n09/images/a.JPEG": b""}, "train images.*unknown n09"),
    ({"train/n01/images/n01_0.JPEG": _picture(0, size=32)}, "n01_0.JPEG has 32x32 pixels"),
    ({"val/images/val_1.JPEG": None}, "val_1.JPEG"), ({"wnids.txt": "n01"}, "lists 1 classes"),
    ({"train/n01/images/n01_0.JPEG": b"nonsense"}, "cannot identify"),
    ({"wnids.txt": None}, "Expected one wnids.txt")])
def test_damage_names_the_archive(changes, words, tmp_path, cache):
    path = _archive(tmp_path / "tiny", changes=changes)
    with pytest.raises(OSError, match=rf"(?s)tiny-imagenet-2\.zip is damaged.*{words}.*stanford"):
        data.load("tiny_imagenet", path.parent)
    assert not list(cache.glob("*"))


def test_the_official_name_promises_the_whole(tmp_path, cache, monkeypatch):
    path = _archive(tmp_path / "tiny", tiny_imagenet.OFFICIAL)
    with pytest.raises(OSError, match=r"100000 train images.*found 4.*another name"):
        data.load("tiny_imagenet", path.parent)
    monkeypatch.setattr(tiny_imagenet, "COUNTS", {"train": 4, "test": 2})
    assert data.load("tiny_imagenet", path.parent).name == "tiny_imagenet"
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(OSError, match="no whole zip"):
        data.load("tiny_imagenet", path.parent)


def test_which_archive(tmp_path, cache, monkeypatch):
    for name in ("tiny-imagenet-2.zip", "tiny-imagenet-3.zip"):
        (tmp_path / name).write_text("")
    with pytest.raises(ValueError, match=r"found tiny-imagenet-2\.zip, tiny-imagenet-3\.zip"):
        data.load("tiny_imagenet", tmp_path)
    (tmp_path / tiny_imagenet.OFFICIAL).write_text("")
    assert tiny_imagenet.archive_in(tmp_path).name == tiny_imagenet.OFFICIAL


@pytest.mark.parametrize("content, error, word", [
    (None, FileNotFoundError, "--data_dir"), (b"page", OSError, tiny_imagenet.MD5)])
def test_a_download_that_fails_is_said(content, error, word, cache, monkeypatch):
    def urlopen(url, timeout):
        assert url == "http://cs231n.stanford.edu/tiny-imagenet-200.zip"
        if content is None:
            raise OSError("no route to host")
        return io.BytesIO(content)

    monkeypatch.setattr("urllib.request.urlopen", urlopen)
    with pytest.raises(error, match=word):
        data.load("tiny_imagenet")


def test_a_downloaded_archive_is_prepared_once(tmp_path, cache, monkeypatch, capsys):
    raw = _archive(tmp_path / "from", tiny_imagenet.OFFICIAL).read_bytes()
    monkeypatch.setattr("urllib.request.urlopen", lambda url, timeout: io.BytesIO(raw))
    monkeypatch.setattr(tiny_imagenet, "MD5", hashlib.md5(raw).hexdigest())
    monkeypatch.setattr(tiny_imagenet, "COUNTS", {"train": 4, "test": 2})
    first, second = data.load("tiny_imagenet"), data.load("tiny_imagenet")
    np.testing.assert_array_equal(first.train_images, second.train_images)
    assert capsys.readouterr().out.count("Preparing tiny_imagenet") == 1


def _mnist(folder, value, count=3):
    """The four files, with images of one grey value."""
    folder.mkdir(exist_ok=True)
    for prefix in ("train", "t10k"):
        images = bytes([0, 0, 8, 3]) + np.array([count, 28, 28], ">i4").tobytes()
        labels = bytes([0, 0, 8, 1]) + np.array([count], ">i4").tobytes() + bytes(count)
        (folder / f"{prefix}-images-idx3-ubyte.gz").write_bytes(
            gzip.compress(images + bytes([value]) * (count * 784)))
        (folder / f"{prefix}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(labels))


def test_changed_files_are_prepared_anew_and_lost_ones_are_not_missed(tmp_path, cache, capsys):
    folder = tmp_path / "mnist"
    _mnist(folder, 7)
    sevens = data.load("mnist", tmp_path)
    assert sevens.train_images.max() == 7
    _mnist(folder, 9)
    os.utime(folder / "train-images-idx3-ubyte.gz", ns=(1, 1))  # however fast this test is
    nines = data.load("mnist", tmp_path)
    assert nines.train_images.max() == 9
    told = capsys.readouterr().out
    # Not MNIST's own images: networks trained on the one are not taken for the other's.
    assert sevens.name != nines.name and nines.name.startswith("mnist-") and nines.name in told
    assert "this happens once" in told and "mnist; its files have changed" in told
    for path in folder.iterdir():
        path.unlink()
    assert data.load("mnist", tmp_path).train_images.max() == 9
    assert capsys.readouterr().out == ""


def test_a_preparation_that_fails_leaves_what_was_there(tmp_path):
    arrays = tuple(np.full(2, value, np.uint8) for value in range(4))
    target = tmp_path / "kept"
    made = store.fetch(target, "x", lambda: {"a": 1}, lambda: store.Prepared(arrays, ("p", "q")))
    assert made.class_names == ("p", "q")

    def fail():
        raise OSError("no")

    with pytest.raises(OSError, match="no"):
        store.fetch(target, "x", lambda: {"a": 2}, fail)
    again = store.fetch(target, "x", lambda: {"a": 1}, fail)
    assert [a.tolist() for a in again.arrays] == [[0, 0], [1, 1], [2, 2], [3, 3]]
    assert again.class_names == ("p", "q") and not again.digest
