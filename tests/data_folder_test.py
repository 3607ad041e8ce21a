"""Folders of one's own images: layouts, pixels, the split, the cache, and what is refused."""

import os
import pathlib

import numpy as np
import pytest
from PIL import Image

from awm_jax import data
from awm_jax.data import decode, folder, splits
from experiments import networks


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache."""
    monkeypatch.setenv("AWM_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


def _pixels(seed, size=(16, 12)):
    return np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)


def _write(root, classes=("a", "b"), count=8, size=(16, 12)):
    """Noise as PNG files, each class with other seeds."""
    for c, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for i in range(count):
            Image.fromarray(_pixels(100 * c + i, size)).save(root / name / f"{i}.png")
    return root


def _load(root, **options):
    return data.load(f"folder:{root}", **options)


def test_counts_classes_and_pixels_without_a_given_split(tmp_path, cache):
    """A quarter of each class is for testing; every pixel is the file's, every file is there."""
    found = _load(_write(tmp_path / "set", ("sign10", "sign9", "Sign1"), 12))
    assert found.class_names == ("Sign1", "sign9", "sign10") and found.num_classes == 3
    assert found.train_images.shape == (27, 16, 12, 3) and found.train_images.dtype == np.uint8
    assert np.bincount(found.train_labels).tolist() == [9, 9, 9]
    assert np.bincount(found.test_labels).tolist() == [3, 3, 3] and not found.flip
    seed_of = {"sign10": 0, "sign9": 100, "Sign1": 200}
    whole = [(image.tobytes(), label) for images, labels in (
        (found.train_images, found.train_labels), (found.test_images, found.test_labels))
        for image, label in zip(images, labels.tolist(), strict=True)]
    expected = {(_pixels(seed_of[name] + i).tobytes(), label)
                for label, name in enumerate(found.class_names) for i in range(12)}
    assert len(whole) == 36 and set(whole) == expected  # disjoint, and nothing is lost


def test_the_split_is_fixed_and_by_lot():
    files = tuple(tuple(pathlib.Path(f"{c}/{i}") for i in range(40)) for c in range(2))
    train, test = folder.split(files)
    assert (train, test) == folder.split(files)
    assert [len(own) for own in test] == [10, 10]
    assert test[0] != files[0][:10] and sorted(train[1] + test[1]) == sorted(files[1])
    assert [path.name for path in test[0]] != [path.name for path in test[1]]


@pytest.mark.parametrize("name", ["test", "val"])
def test_a_given_split_is_kept(name, tmp_path, cache):
    _write(tmp_path / "set" / "train", count=3)
    _write(tmp_path / "set" / name, count=2)
    found = _load(tmp_path / "set")
    assert found.train_labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert found.test_labels.tolist() == [0, 0, 1, 1]
    np.testing.assert_array_equal(found.train_images[4], _pixels(101))
    np.testing.assert_array_equal(found.test_images[3], _pixels(101))


def test_of_test_and_val_the_first_is_taken_aloud(tmp_path, cache, capsys):
    for part, count in (("train", 4), ("test", 2), ("val", 3)):
        _write(tmp_path / "set" / part, count=count)
    assert len(_load(tmp_path / "set").test_labels) == 4
    assert "1 folders beside train and test" in capsys.readouterr().out


def test_a_class_may_be_called_train(tmp_path, cache):
    assert _load(_write(tmp_path / "set", ("car", "train"))).class_names == ("car", "train")


def _save(path, array, mode=None, **options):
    Image.fromarray(array, mode).save(path, **options)


@pytest.mark.parametrize("suffix", ["png", "PNG", "bmp", "ppm", "tiff"])
def test_lossless_files_keep_their_pixels(suffix, tmp_path):
    path = tmp_path / f"image.{suffix}"
    _save(path, _pixels(0))
    np.testing.assert_array_equal(decode.rgb(path, (16, 12)), _pixels(0))


@pytest.mark.parametrize("suffix", ["jpg", "webp"])
def test_lossy_files_are_as_pillow_reads_them(suffix, tmp_path):
    path = tmp_path / f"image.{suffix}"
    _save(path, _pixels(0))
    np.testing.assert_array_equal(decode.rgb(path, (16, 12)), np.asarray(Image.open(path)))
    resized = Image.open(path).resize((8, 32), Image.Resampling.BILINEAR)
    np.testing.assert_array_equal(decode.rgb(path, (32, 8)), np.asarray(resized))


@pytest.mark.parametrize("suffix", ["png", "tif", "pgm"])
def test_sixteen_bits_become_eight(suffix, tmp_path):
    path = tmp_path / f"image.{suffix}"
    _save(path, np.array([[0, 257, 128 * 257, 65535], [1, 128, 129, 65407]], np.uint16))
    found = decode.rgb(path, (2, 4))
    # By 257 and rounded: 128 / 257 is .498, 129 / 257 is .502, 65407 / 257 is 254.502.
    assert found[..., 0].tolist() == [[0, 1, 128, 255], [0, 0, 1, 255]]
    assert (found == found[..., :1]).all()


def test_grey_palette_and_transparency_become_rgb(tmp_path):
    grey = np.array([[0, 100, 255]], np.uint8)
    _save(tmp_path / "l.png", grey)
    assert decode.rgb(tmp_path / "l.png", (1, 3))[0].tolist() == [[v] * 3 for v in (0, 100, 255)]
    clear = np.array([[[255, 0, 0, 255], [255, 0, 0, 0], [254, 0, 0, 51]]], np.uint8)
    _save(tmp_path / "rgba.png", clear)
    # Opaque red, nothing but the ground of 128, and a fifth of red on four fifths of ground.
    assert decode.rgb(tmp_path / "rgba.png", (1, 3))[0].tolist() == [
        [255, 0, 0], [128, 128, 128], [153, 102, 102]]
    palette = Image.fromarray(grey).convert("P")
    palette.save(tmp_path / "p.png", transparency=int(np.asarray(palette)[0, 0]))
    assert decode.rgb(tmp_path / "p.png", (1, 3))[0].tolist() == [
        [128, 128, 128], [100, 100, 100], [255, 255, 255]]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_are_turned_as_exif_says(orientation, tmp_path):
    """By EXIF 2.3's table: what the first row and the first column of the file are to be."""
    seen = _pixels(0)
    turned = {1: seen, 2: seen[:, ::-1], 3: seen[::-1, ::-1], 4: seen[::-1],
              5: seen.swapaxes(0, 1), 6: np.rot90(seen), 7: np.rot90(seen, 2).swapaxes(0, 1),
              8: np.rot90(seen, -1)}[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "image.png"
    _save(path, np.ascontiguousarray(turned), exif=exif)
    assert decode.size_of(path) == (16, 12)
    np.testing.assert_array_equal(decode.rgb(path, (16, 12)), seen)


def test_several_sizes_need_one_to_be_chosen(tmp_path, cache):
    root = _write(tmp_path / "set")
    _save(root / "a" / "0.png", _pixels(0, (40, 20)))
    with pytest.raises(ValueError, match=r"2 sizes, from 16x12 to 40x20, most often 16x12 \(15 of "
                                         r"16.*--image_size 32"):
        _load(root)
    assert _load(root, image_size=32).train_images.shape[1:] == (32, 32, 3)
    found = _load(root, image_size=(16, 12))
    assert found.train_images.shape[1:] == (16, 12, 3)
    both = np.concatenate([found.train_images, found.test_images])
    expected = Image.fromarray(_pixels(0, (40, 20))).resize((12, 16), Image.Resampling.BILINEAR)
    assert (both == np.asarray(expected)).all(axis=(1, 2, 3)).sum() == 1
    assert (both == _pixels(107)).all(axis=(1, 2, 3)).sum() == 1  # of that size already


def test_what_is_no_image_is_left_out_aloud(tmp_path, cache, capsys):
    root = _write(tmp_path / "set")
    (root / ".DS_Store").write_text("")
    (root / "a" / "._0.png").write_text("")
    (root / "labels.csv").write_text("")
    (root / "b" / "notes.txt").write_text("")
    (root / "b" / "old").mkdir()
    (root / ".git").mkdir()
    assert len(_load(root).train_labels) == 12
    told = capsys.readouterr().out
    for what in ("3 hidden", "1 files outside class folders", "1 .txt",
                 "1 folders inside class folders"):
        assert f": {what}\n" in told


def test_broken_files_are_all_named_at_once(tmp_path, cache, monkeypatch):
    root = _write(tmp_path / "set")
    whole = (root / "a" / "3.png").read_bytes()
    (root / "a" / "3.png").write_bytes(whole[: len(whole) // 2])
    (root / "b" / "1.png").write_text("<html>")
    _save(root / "b" / "2.png", _pixels(0, (100, 120)))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10_000)
    with pytest.raises(OSError, match="3 of 16 cannot be read") as caught:
        _load(root, image_size=16)
    text = str(caught.value)
    assert f"{root}/a/3.png" in text and f"{root}/b/1.png (no image" in text
    assert f"{root}/b/2.png (more than the 10,000 pixels" in text
    assert not list(cache.glob("arrays/*"))


def test_a_bomb_beyond_pillows_own_limit_is_named_too(tmp_path, monkeypatch):
    path = tmp_path / "bomb.png"
    _save(path, _pixels(0, (100, 250)))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10_000)  # Pillow raises from twice that on
    with pytest.raises(ValueError, match="decompression bomb"):
        decode.size_of(path)


def test_numbers_of_unknown_range_are_refused(tmp_path):
    path = tmp_path / "image.tif"
    _save(path, np.ones((4, 4), np.float32))
    with pytest.raises(ValueError, match="unknown range"):
        decode.rgb(path, (4, 4))


def _remove(root, *names):
    for name in names:
        (root / name).unlink()


def _empty(root):
    (root / "c").mkdir()
    (root / "c" / "film.mp4").write_text("")


def _no_test(root):
    _write(root / "train")
    for name in "ab":
        for path in (root / name).iterdir():
            path.unlink()
        (root / name).rmdir()


@pytest.mark.parametrize("change, error, words", [
    (lambda root: _remove(root, "a/1.png"), ValueError, ["at least 8 images", "a (7)"]),
    (_empty, ValueError, ["/c,", "1 other files and 0 folders", ".png"]),
    (lambda root: _write(root / "c" / "train"), ValueError, ["/c,", "and 1 folders", "test (or"]),
    (lambda root: os.rename(root / "b", root / ".b"), ValueError, ["two at least, found 1 (a)"]),
    (_no_test, ValueError, ["/test (or val) beside", "/train itself"]),
    (lambda root: os.rename(root, f"{root}s"), FileNotFoundError, ["nothing is there"]),
])
def test_other_layouts_are_refused(change, error, words, tmp_path, cache):
    root = _write(tmp_path / "set")
    change(root)
    with pytest.raises(error) as caught:
        _load(root)
    assert all(word in str(caught.value) for word in [str(root), *words])


def test_given_splits_of_other_classes_or_too_few_are_refused(tmp_path, cache):
    _write(tmp_path / "set" / "train", ("a", "b", "c"))
    _write(tmp_path / "set" / "test", ("a", "c", "d"), 2)
    with pytest.raises(ValueError, match="only the first has b, only the second d"):
        _load(tmp_path / "set")
    os.rename(tmp_path / "set" / "test" / "d", tmp_path / "set" / "test" / "b")
    (tmp_path / "set" / "test" / "b" / "0.png").unlink()
    with pytest.raises(ValueError, match=r"at least 2 images of every class in .*test; .*b \(1\)"):
        _load(tmp_path / "set")


def test_files_and_loose_images_are_no_folder_of_classes(tmp_path, cache):
    path = tmp_path / "set.zip"
    path.write_text("")
    with pytest.raises(FileNotFoundError, match="unpack it"):
        _load(path)
    (tmp_path / "loose").mkdir()
    _save(tmp_path / "loose" / "0.png", _pixels(0))
    with pytest.raises(ValueError, match="found 0, and 1 files that are in none"):
        _load(tmp_path / "loose")


def test_sizes_that_no_network_takes_are_refused(tmp_path, cache, monkeypatch):
    with pytest.raises(ValueError, match=r"image_height=4 in \[8, 1024\]"):
        _load(tmp_path, image_size=4)
    root = _write(tmp_path / "set", size=(7, 9))
    with pytest.raises(ValueError, match=r"8 to 1024 pixels a side.*they have 7x9.*--image_size"):
        _load(root)
    monkeypatch.setattr(folder, "BYTES", 16 * 8 * 8 * 3 - 1)
    with pytest.raises(ValueError, match=r"the 16 in .* at 8x8"):
        _load(root, image_size=8)


def test_the_cache_serves_a_folder_until_it_changes(tmp_path, cache, monkeypatch):
    root = _write(tmp_path / "My set")
    first = _load(root)
    assert first.name == f"folder-My-set-{first.name[-8:]}" and "/" not in first.name

    def refuse(*args):
        raise AssertionError("decoded again")

    with monkeypatch.context() as patched:
        patched.setattr(decode, "rgb", refuse)
        again = _load(root)
    assert again.name == first.name and again.class_names == first.class_names
    np.testing.assert_array_equal(again.train_images, first.train_images)

    changes = [lambda: _save(root / "a" / "2.png", _pixels(555)),
               lambda: _save(root / "b" / "8.png", _pixels(556)),
               lambda: os.rename(root / "b" / "8.png", root / "a" / "8.png"),
               lambda: (root / "a" / "0.png").unlink()]
    names = {first.name}
    for change in changes:
        change()
        names.add(_load(root).name)
    assert len(names) == 5
    assert len(list(cache.glob("arrays/*"))) == 1  # what is stale is not kept


def test_other_images_under_the_same_name_are_another_data_set(tmp_path, cache):
    one = _load(_write(tmp_path / "1" / "set"))
    two = _load(_write(tmp_path / "2" / "set", size=(16, 16)))
    copy = _load(_write(tmp_path / "3" / "set"))
    flipped = _load(tmp_path / "1" / "set", flip=True)
    assert one.name == copy.name and len({one.name, two.name, flipped.name}) == 3
    assert flipped.flip and flipped.name == f"{one.name}-flip"
    specs = [networks.NetworkSpec(dataset=d.name, arch="small_vgg", attack="badnets", rate=0.05,
                                  epochs=1, seed=0) for d in (one, two, flipped)]
    assert len({spec.digest for spec in specs}) == 3


def test_options_of_folders_are_refused_elsewhere(cache):
    for options in ({"image_size": 32}, {"flip": True}):
        with pytest.raises(ValueError, match="folder:PATH only"):
            data.load("digits", **options)
    with pytest.raises(ValueError, match="no data_dir=/x beside folder:/y"):
        data.load("folder:/y", "/x")
    with pytest.raises(ValueError, match="folder:PATH"):
        data.load("folders")


def test_small_classes_are_in_the_pool_and_in_the_measurement():
    """A third of 30 by lot would leave a class of two out of one part more often than not."""
    labels = np.array([0] * 24 + [1] * 2 + [2] * 4)
    dataset = data.Dataset("x", np.zeros(0), np.zeros(0), np.zeros((30, 1)), labels, 3, False)
    found = splits.defender_split(dataset)
    np.testing.assert_array_equal(np.sort(np.concatenate(found)), np.arange(30))
    assert np.bincount(labels[found.pool_indices]).tolist() == [8, 1, 1]
    assert len(splits.draw_clean(0, labels[found.pool_indices], 3)) == 3
