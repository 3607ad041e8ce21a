"""Labelled images that somebody hands over: layouts, labels, and files that are broken or lie."""

import os
import pathlib

import numpy as np
import pytest
from PIL import Image

from awm_jax.data import folder, given


def _pixels(seed, size=(8, 10)):
    return np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)


def _image(path, seed=0, size=(8, 10)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(_pixels(seed, size)).save(path)
    return path


def _folders(root, names, count=1):
    for c, name in enumerate(names):
        for i in range(count):
            _image(root / name / f"{i}.png", 100 * c + i)
    return root


def _table(root, text, names=("a.png", "b.png")):
    """A CSV of this text, and images beside it; gives the CSV."""
    for seed, name in enumerate(names):
        _image(root / name, seed)
    path = root / "labels.csv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def _read(path, num_classes=10, size=(8, 10)):
    return given.read(given.find(path), num_classes=num_classes, size=size)


def _refused(path, *words, error=ValueError, **options):
    """The message, which has all the words in it, of an error of just this kind."""
    with pytest.raises(error) as caught:
        _read(path, **options)
    text = str(caught.value)
    assert type(caught.value) is error and not [word for word in words if word not in text], text
    assert text.startswith("Expected ") and "\n" not in text
    return text


def test_numbered_folders_are_the_classes_of_these_numbers(tmp_path):
    found = _read(_folders(tmp_path, ("00007", "00010", "2"), 2), 11)
    assert found.labels.tolist() == [2, 2, 7, 7, 10, 10] and found.labels.dtype == np.int32
    assert found.images.shape == (6, 8, 10, 3) and found.images.dtype == np.uint8
    np.testing.assert_array_equal(found.images, [_pixels(s) for s in (200, 201, 0, 1, 100, 101)])
    assert [str(file.relative_to(tmp_path)) for file in found.files[1:3]] == ["2/1.png",
                                                                             "00007/0.png"]
    assert found.note == "6 images of 3 of 11 classes; the folders are called by class numbers"


def test_a_single_class_may_be_given_by_its_number(tmp_path):
    found = _read(_folders(tmp_path, ("09",)))
    assert found.labels.tolist() == [9]
    assert found.note == "1 image of 1 of 10 classes; the folders are called by class numbers"
    os.rename(tmp_path / "09", tmp_path / "cat")
    _refused(tmp_path, "Expected 10 folders", "found 1: cat.", "from 0 to 9")


@pytest.mark.parametrize("names, wrong, right", [
    (("0", "5", "10"), "found 10.", "from 0 to 9"),
    (("-1", "0"), "found -1.", "from 0 to 9"),
    (("7", "9" * 90, "1" * 200), f"found {'9' * 77}..., {'1' * 77}....", "from 0 to 9"),
])
def test_numbers_beyond_the_networks_are_refused(names, wrong, right, tmp_path):
    _refused(_folders(tmp_path, names), str(tmp_path), wrong, right, "numbers are from 0",
             "has 10 classes")


def test_numbers_of_thousands_of_digits_are_refused(tmp_path):
    """Python itself refuses to turn these into integers."""
    table = _table(tmp_path, f"file,label\na.png,{'9' * 6000}\nb.png,{'0' * 6000}\n")
    _refused(table, "found 000000", "99999...", "0 to 9")


def test_as_many_names_as_classes_are_taken_in_natural_order_aloud(tmp_path):
    names = ["airplane", "bird", "Cat", "dog", "sign", "sign2", "sign10", "truck"]
    found = _read(_folders(tmp_path, names), 8)
    assert found.labels.tolist() == list(range(8))
    assert [file.parent.name for file in found.files] == names
    assert found.note == ("8 images of 8 of 8 classes; the 8 folders in natural order are taken "
                          "as classes 0 (airplane) to 7 (truck)")


def test_numbers_within_names_are_no_class_numbers(tmp_path):
    """'class_7' may be of names from 1 on: as many as classes are sorted, fewer are refused."""
    root = _folders(tmp_path, ("class_10", "class_9", "class_7"))
    assert "0 (class_7) to 2 (class_10)" in _read(root, 3).note
    assert [file.parent.name for file in _read(root, 3).files] == ["class_7", "class_9", "class_10"]
    _refused(root, "found 3: class_7, class_9, class_10.", "Call them by class numbers")
    _refused(_folders(root, ("3",)), "found 4: 3, class_7,")  # not all are numbers


@pytest.mark.parametrize("names", [
    ("9", "10", "a9", "a10", "B", "b"), ("Sign1", "sign9", "sign10"), ("a", "a1", "a1b"),
    ("x9y9", "x9y10", "x10y1"), ("007", "7", "08"), ("1", "²", "٣")])
def test_natural_order_takes_names_of_every_kind(names):
    assert sorted(reversed(names), key=folder.natural) == list(names)


def test_names_of_every_kind_are_put_in_order(tmp_path):
    names = ["7", "²", "٣", "sign", "sign2", "x²", "9" * 200]
    found = _read(_folders(tmp_path, names), 7)
    order = [file.parent.name for file in found.files]
    assert sorted(order) == sorted(names) and order.index("sign") + 1 == order.index("sign2")
    assert found.labels.tolist() == list(range(7))


def test_other_files_are_left_out_and_hidden_ones_unspoken_of(tmp_path):
    root = _folders(tmp_path, ("0", "1"))
    for name in ("0/GT-0.csv", "0/._0.png", "1/Thumbs.db", "notes.txt", ".DS_Store",
                 "__MACOSX/0.png", ".git/0.png", "1/old/9.png"):
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text("")
    os.mkfifo(root / "0" / "pipe.png")  # opening it would hang
    (root / "1" / "gone.png").symlink_to(root / "nowhere.png")
    assert [file.name for file in given.find(root).files] == ["0.png", "0.png"]
    assert _read(root).note.endswith("numbers; 6 other files or folders were left out")
    _image(root / "0" / "large.png", size=(16, 10))
    assert "; of 1 other size, such as " in _read(root).note and "to 8x10;" in _read(root).note


@pytest.mark.parametrize("suffix", ["jpg", "JPEG", "ppm", "bmp", "webp", "tif"])
def test_other_formats_are_read(suffix, tmp_path):
    path = _image(tmp_path / "4" / f"x.{suffix}")
    found = _read(tmp_path)
    np.testing.assert_array_equal(found.images[0], np.asarray(Image.open(path).convert("RGB")))


def test_several_sizes_are_counted_and_resized(tmp_path):
    _image(tmp_path / "0" / "a.png", 0, (8, 10))
    _image(tmp_path / "0" / "b.png", 1, (8, 10))
    _image(tmp_path / "1" / "c.png", 2, (40, 20))
    assert given.sizes(given.find(tmp_path)) == {(8, 10): 2, (40, 20): 1}
    found = _read(tmp_path, 2, (20, 6))
    expected = Image.fromarray(_pixels(2, (40, 20))).resize((6, 20), Image.Resampling.BILINEAR)
    assert found.images.shape == (3, 20, 6, 3)
    np.testing.assert_array_equal(found.images[2], np.asarray(expected))


@pytest.mark.parametrize("separator", [",", ";", "\t"])
@pytest.mark.parametrize("start", ["", "\ufeff"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_a_csv_is_read_whatever_saved_it(separator, start, end, tmp_path):
    lines = [["ClassId", "Width", " Path "], ["7", "8", " sub/a.png"], [], ["00003", "8", "b.png"],
             [" 7", "8", '"c,;\t.png"'], ["", "", ""]]
    text = start + "".join(separator.join(line) + end for line in lines)
    found = _read(_table(tmp_path, text, ("sub/a.png", "b.png", "c,;\t.png")))
    assert found.labels.tolist() == [7, 3, 7]
    np.testing.assert_array_equal(found.images, [_pixels(seed) for seed in range(3)])
    assert found.files == tuple(tmp_path.resolve() / name
                                for name in ("sub/a.png", "b.png", "c,;\t.png"))
    assert found.note == "3 images of 2 of 10 classes; the labels are called by class numbers"


@pytest.mark.parametrize("file", given.COLUMNS["file"])
@pytest.mark.parametrize("label", given.COLUMNS["label"])
def test_columns_may_be_called(file, label, tmp_path):
    table = _table(tmp_path, f"{label.upper()},{file.title()}\n1,a.png\n0,b.png\n")
    assert given.find(table).names == ("1", "0")


def test_labels_of_a_csv_may_be_names_and_keep_its_order(tmp_path):
    table = _table(tmp_path, "file,label\na.png,dog\nb.png,cat\na.png,dog\n")
    found = _read(table, 2)
    assert found.labels.tolist() == [1, 0, 1] and found.images.shape[0] == 3
    assert found.note.endswith("the 2 labels in natural order are taken as classes 0 (cat) to 1 "
                               "(dog)")
    assert "CSV itself" not in _refused(table, "Expected 10 labels", str(table), "2: cat, dog.")


def test_names_cannot_write_to_the_terminal(tmp_path):
    table = _table(tmp_path, 'file,label\na.png,"cat\n\x1b[2J"\nb.png,dog\n')
    assert "0 (cat??[2J) to 1 (dog)" in _read(table, 2).note
    _refused(table, "found 2: cat??[2J, dog.")


def test_a_folder_of_one_csv_and_no_class_folders_is_read_by_it(tmp_path):
    table = _table(tmp_path, "file,label\na.png,4\nb.png,2\n")
    assert given.find(tmp_path) == given.find(table)
    assert _read(tmp_path).labels.tolist() == [4, 2]
    (tmp_path / "other.CSV").write_text("")
    _refused(tmp_path, str(tmp_path), "found no folder, 2 CSVs and 2 other files",
             "name the CSV itself")
    assert _read(table).labels.tolist() == [4, 2]
    _folders(tmp_path, ("8",))  # where there are class folders, those are read
    assert _read(tmp_path).labels.tolist() == [8]


def test_a_csv_beside_a_folder_of_all_images_is_pointed_to(tmp_path):
    table = _table(tmp_path, "path,label\nimages/a.png,4\n", ("images/a.png",))
    _refused(tmp_path, "found 1: images.", "To use a CSV, name the CSV itself.")
    assert _read(table).labels.tolist() == [4]


def test_a_csv_may_be_called_tsv_or_be_a_link(tmp_path):
    table = _table(tmp_path / "1", "file\tlabel\na.png\t4\n")
    (tmp_path / "2").mkdir()
    _image(tmp_path / "2" / "a.png", 7)
    link = tmp_path / "2" / "own.tsv"
    link.symlink_to(table)
    np.testing.assert_array_equal(_read(link).images, [_pixels(7)])  # what lies beside the link


def _escape(tmp_path, name):
    """A CSV whose third line names an image outside; the image is there and could be read."""
    _image(tmp_path / "secret.png")
    _image(tmp_path / "set" / "sub" / "b.png")
    (tmp_path / "set" / "link.png").symlink_to(tmp_path / "secret.png")
    (tmp_path / "set" / "out").symlink_to(tmp_path)
    return _table(tmp_path / "set", f"file,label\na.png,0\n{name},1\n")


@pytest.mark.parametrize("name, what", [
    ("{root}/secret.png", "is absolute"), ("{root}/set/a.png", "is absolute"),
    ("../secret.png", "leads out"), ("sub/../../secret.png", "leads out"), ("..", "leads out"),
    ("link.png", "leads out"), ("out/secret.png", "leads out"), ("../gone.png", "leads out"),
    ("../set2/a.png", "leads out"),
])
def test_a_csv_cannot_name_files_outside_its_folder(name, what, tmp_path):
    name = name.format(root=tmp_path)
    _image(tmp_path / "set2" / "a.png")  # its path begins with the folder's
    table = _escape(tmp_path, name)
    # Of a long name the beginning is shown.
    _refused(table, f"{table}, line 3, got {name[:77]}", f", which {what}", "relative to it")


def test_detours_and_links_within_the_folder_are_no_escape(tmp_path):
    table = _table(tmp_path, "file,label\nsub/../a.png,0\nlink.png,1\n", ("a.png", "sub/b.png"))
    (tmp_path / "link.png").symlink_to("sub/b.png")
    np.testing.assert_array_equal(_read(table).images, [_pixels(0), _pixels(1)])


def test_files_that_are_not_there_are_named_with_their_lines(tmp_path):
    long, names = "x" * 5000, ["a.png", "gone.png", "nul\0.png", "ring.png", "pipe.png", "."]
    table = _table(tmp_path, "".join(f"{name},0\n" for name in ["file", *names, long])
                   .replace("file,0", "file,label"), ("a.png",))
    (tmp_path / "ring.png").symlink_to("ring.png")
    os.mkfifo(tmp_path / "pipe.png")
    _refused(table, str(table), "6 are not there: line 3: gone.png, line 4: nul?.png, line 5: ring",
             "line 6: pipe.png, line 7: . and 1 more", f"sought in {tmp_path}",
             error=FileNotFoundError)


@pytest.mark.parametrize("text, words", [
    ("", ["of files (called file, path, filename, image)", "classid", "found none"]),
    ("a.png,0\nb.png,1\n", ["found a.png, 0."]),
    ("file\na.png\n", ["one column of labels", "found file."]),
    ("file,path,label\na.png,b.png,0\n", ["found file, path, label"]),
    ("file,label,class\na.png,0,0\n", ["found file, label, class"]),
    ("file,label\n\n", ["Expected 1 to 100,000 images", "found none"]),
    ("file,label\na.png,0\nb.png\n", ["2 columns", "line 3,", "found 1: b.png"]),
    ("file,label\na.png\n", ["line 2,", "found 1: a.png"]),
    ("file,label\na,b.png,0\n", ["line 2,", "found 3: a, b.png, 0", "','"]),
    ("file,label\na.png,0,\nb.png, \n", ["line 3,", "found 2: b.png, ."]),
    ("file;label\n;1\n", ["line 2,", "';'"]),
    ("file,label\na.png,0\nb.png,\"1\n", ["line 3", "cannot be read"]),
    ("file,label\na.png,\"1\"2\n", ["line 2", "cannot be read"]),
    (f"file,label\na.png,{'1' * 200_000}\n", ["line 2", "field limit"]),
    (b"file,label\na.png,0\nb.png,caf\xe9\n", ["UTF-8", "line 3", "0xe9"]),
    ("\ufefffile,label\n".encode() + b"\xff.png,0\n", ["UTF-8", "line 2", "0xff"]),
    ("file,label\na.png,0\n".encode("utf-16"), ["UTF-8", "line 1", "'CSV UTF-8'"]),
    ("file,label\na.png,0\n./a.png,1\n", ["one label of each file", "line 3 calls ./a.png 1, one "
                                          "before 0"]),
])
def test_other_csvs_are_refused(text, words, tmp_path):
    table = _table(tmp_path, text)
    _refused(table, str(table), *words)


def test_too_much_is_refused(tmp_path, monkeypatch):
    table = _table(tmp_path / "csv", "file,label\n" + "a.png,0\n" * 5)
    root = _folders(tmp_path / "set", ("0", "1"), 2)
    with monkeypatch.context() as patched:
        patched.setattr(given, "IMAGES", 4)
        _refused(table, "Expected 1 to 4 images", str(table), "found more")
        assert len(_read(root).images) == 4
        patched.setattr(given, "IMAGES", 3)
        _refused(root, "Expected 1 to 3 images", str(root), "found more")
    with monkeypatch.context() as patched:
        patched.setattr(given, "TABLE_BYTES", len(table.read_bytes()))
        assert len(_read(table).images) == 5
        patched.setattr(given, "TABLE_BYTES", len(table.read_bytes()) - 1)
        _refused(table, "at most 0 MiB", str(table))
    with monkeypatch.context() as patched:
        patched.setattr(folder, "BYTES", 4 * 16 * 8 * 3)
        assert _read(root, size=(16, 8)).images.nbytes == folder.BYTES
        _refused(root, "the 4 of", str(root), "at 16x9", size=(16, 9))
    listing = given.Listing(root, None, (root / "0" / "0.png",) * 60_000, ("0",) * 60_000)
    with pytest.raises(ValueError, match=r"into 8 GiB; the 60000 of .* need 8\.4 at 224x224"):
        given.read(listing, num_classes=10, size=(224, 224))  # and none of them is decoded


def test_other_paths_are_refused(tmp_path):
    _refused(tmp_path / "gone", f"at {tmp_path}/gone; nothing is there.", error=FileNotFoundError)
    _refused(_image(tmp_path / "cat.png"), f"at {tmp_path}/cat.png; it is neither.", "Unpack")
    os.mkfifo(tmp_path / "pipe.csv")
    _refused(tmp_path / "pipe.csv", "it is neither")
    (tmp_path / "cat.png").unlink()
    _refused(tmp_path, "found no folder, 0 CSVs and 1 other files")
    (tmp_path / "pipe.csv").unlink()
    _refused(tmp_path, "found no folder, 0 CSVs and 0 other files")
    _folders(tmp_path, ("0", "1"))
    (tmp_path / "2" / "deeper").mkdir(parents=True)
    (tmp_path / "2" / "x.gif").write_text("")
    _refused(tmp_path, f"in the class folder {tmp_path}/2, found none, but 1 other files and 1 "
             "folders", ".webp)")


@pytest.mark.parametrize("options, name", [
    ({"num_classes": 1}, "num_classes=1"), ({"size": (0, 8)}, "image_height=0"),
    ({"size": (8, -1)}, "image_width=-1")])
def test_options_out_of_range_are_refused(options, name, tmp_path):
    _refused(_folders(tmp_path, ("0",)), name, **options)


def test_broken_files_and_bombs_are_all_named_at_once(tmp_path, monkeypatch):
    root = _folders(tmp_path, ("0", "1"), 4)
    whole = (root / "0" / "1.png").read_bytes()
    (root / "0" / "1.png").write_bytes(whole[: len(whole) // 2])
    (root / "0" / "3.png").write_bytes(b"")
    (root / "1" / "0.png").write_text("<html>")
    _image(root / "1" / "2.png", 0, (30, 50))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1_000)
    text = _refused(root, "4 of 8 cannot be read", f"{root}/0/1.png (", f"{root}/0/3.png (no image",
                    f"{root}/1/0.png (no image", f"{root}/1/2.png (more than the 1,000 pixels",
                    error=OSError)
    assert "0/0.png" not in text and "1/3.png" not in text
    with pytest.raises(OSError, match=r"4 of 8 .*1/2\.png \(more than the 1,000 pixels"):
        given.sizes(given.find(root))
    _image(root / "1" / "2.png", 0, (20, 50))
    _refused(root, "3 of 8 cannot be read", error=OSError)  # a thousand pixels are allowed


def _mutated(rng, whole):
    """The bytes cut off somewhere, or a few of them changed, or both."""
    content = bytearray(whole)
    kind = rng.integers(3)
    if kind != 1:
        del content[rng.integers(len(content)):]
    if kind != 0 and content:
        # Half of the changes are to the header, where most of what can go wrong is.
        end = len(content) if rng.integers(2) else min(64, len(content))
        for place in rng.integers(end, size=rng.integers(1, 5)):
            content[place] = rng.integers(256)
    return bytes(content)


@pytest.mark.filterwarnings("ignore")  # Pillow's of what is damaged
@pytest.mark.parametrize("suffix", ["png", "jpg", "bmp", "webp", "tif", "csv"])
def test_damaged_files_are_read_or_refused_by_name(suffix, tmp_path, monkeypatch):
    """Never an exception of another kind, nor one that leaves the file unnamed."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1 << 20)  # sizes of a damaged header take time
    if suffix == "csv":
        path = root = _table(tmp_path, "\ufefffile,label\na.png,3\n\"b.png\",0004\n")
    else:
        path, root = _image(tmp_path / "3" / f"image.{suffix}"), tmp_path
    whole = path.read_bytes()
    assert set(_read(root).labels.tolist()) <= {3, 4}
    rng, outcomes = np.random.default_rng(sum(map(ord, suffix))), {"read": 0, "refused": 0}
    for _ in range(50):
        path.write_bytes(_mutated(rng, whole))
        try:
            found = _read(root)
        except Exception as error:
            assert isinstance(error, ValueError | OSError), (path.read_bytes(), error)
            assert str(path) in str(error) and str(error).startswith("Expected "), error
            outcomes["refused"] += 1
        else:
            assert found.images.shape == (len(found.files), 8, 10, 3)
            assert found.images.dtype == np.uint8 and set(found.labels.tolist()) < set(range(10))
            outcomes["read"] += 1
    # Damage of both kinds was tried; of the others' files hardly any part can change unnoticed.
    assert outcomes["refused"] > 10
    assert outcomes["read"] > 3 or suffix in ("png", "webp", "tif")


def test_find_opens_no_image(tmp_path, monkeypatch):
    _folders(tmp_path / "set", ("0", "1"))
    table = _table(tmp_path / "csv", "file,label\na.png,4\n")

    def refuse(*args, **options):
        raise AssertionError("opened")

    monkeypatch.setattr(Image, "open", refuse)
    assert given.find(tmp_path / "set").names == ("0", "1")
    assert given.find(table).files == ((tmp_path / "csv" / "a.png").resolve(),)
    assert isinstance(given.find(table).root, pathlib.Path)
