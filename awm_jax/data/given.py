"""A handful of labelled images that somebody hands over: folders of classes, or a CSV."""

import collections
import csv
import io
import itertools
import os
import pathlib
import re
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from awm_jax import validate
from awm_jax.data import decode, folder

IMAGES = 100_000
TABLE_BYTES = 64 << 20  # of a CSV: it is read whole
_LUMA = np.array([0.299, 0.587, 0.114])  # ITU-R BT.601, as PIL and torchvision weigh them
COLUMNS = {"file": ("file", "path", "filename", "image"),
           "label": ("label", "class", "classid", "target", "y")}


class Listing(NamedTuple):
    """Images that were found, and what their labels are called.

    Args:
      root: the folder they lie in.
      table: the CSV that lists them; None where every class has its folder.
      files: one for each image.
      names: of the label of each.
      skipped: how many files and folders were left out, besides hidden ones.
    """

    root: pathlib.Path
    table: pathlib.Path | None
    files: tuple[pathlib.Path, ...]
    names: tuple[str, ...]
    skipped: int = 0


class Given(NamedTuple):
    """Images and labels, and where they are from.

    Args:
      images: ``[n, H, W, C]`` uint8.
      labels: ``[n]`` int32, in 0..num_classes-1.
      files: of each image.
      note: one line to print: how many images of how many classes, how their labels were told.
    """

    images: np.ndarray
    labels: np.ndarray
    files: tuple[pathlib.Path, ...]
    note: str


def find(path: str | os.PathLike) -> Listing:
    """Lists labelled images; opens none of them.

    Args:
      path: a folder that holds ``CLASS/*.png`` (or another of `folder.EXTENSIONS`); or a CSV in
        UTF-8, with a column of files, relative to its folder, and one of labels (`COLUMNS`); or a
        folder that holds one CSV and no class folders. Names that begin with a dot are left out.

    Returns:
      `Listing`; classes and files in natural order ('9' before '10'), or in the CSV's.

    Raises:
      FileNotFoundError: nothing is there, or files of the CSV are not.
      ValueError: another layout, an empty class, too many images, or a CSV that cannot be read or
        names files outside its folder; says which line.

    Example:
      >>> find('signs').names  # doctest: +SKIP
      ('00000', '00000', '00007')
    """
    root = pathlib.Path(path).expanduser()
    if root.is_dir():
        found = _in_folder(root.resolve())
    elif root.is_file() and root.suffix.lower() in (".csv", ".tsv", ".txt"):
        found = _in_table(root.parent.resolve(), root)  # of a link: files lie beside the link
    else:
        raise (ValueError if root.exists() else FileNotFoundError)(
            f"Expected a folder of images, or a CSV, at {root}; " + (
                "it is neither. Unpack archives; put images into folders called by class numbers."
                if root.exists() else "nothing is there."))
    if not 0 < len(found.files) <= IMAGES:
        raise ValueError(f"Expected 1 to {IMAGES:,} images in {found.table or found.root}, found "
                         f"{'more' if found.files else 'none'}. Some of each class are enough.")
    return found


def sizes(listing: Listing) -> collections.Counter[tuple[int, int]]:
    """How many images are of each ``(height, width)``, by their headers.

    Args:
      listing: from `find`.

    Returns:
      The counts; for networks that take any size.

    Raises:
      OSError: images that cannot be read; names them.

    Example:
      >>> sizes(Listing(pathlib.Path(), None, (), ()))
      Counter()
    """
    return collections.Counter(folder.each(listing.files, decode.size_of))


def read(listing: Listing, *, num_classes: int, size: tuple[int, int], channels: int = 3
         ) -> Given:
    """Decodes listed images, and tells the number of each one's class.

    Labels that are all whole numbers are the classes' numbers, from 0. Otherwise there must be as
    many as the network has classes: they are numbered in natural order, and the note says so.

    Args:
      listing: from `find`.
      num_classes: of the network, >= 2.
      size: ``(height, width)`` that images of another size are resized to, >= 1.
      channels: 3, or 1 for grey values, ``.299 R + .587 G + .114 B``.

    Returns:
      `Given`, in the listing's order.

    Raises:
      ValueError: labels that are not clear or out of range, other channels, or images too large
        for the memory.
      OSError: images that cannot be read; names them.

    Example:
      >>> read(find('signs'), num_classes=43, size=(32, 32)).note  # doctest: +SKIP
      "3 images of 2 of 43 classes; the folders are called by class numbers"
    """
    height, width = size
    validate.at_least(2, num_classes=num_classes)
    validate.at_least(1, image_height=height, image_width=width)
    if channels not in (1, 3):
        raise ValueError(f"Expected a network for images of 3 channels, or of 1 (grey), it takes "
                         f"{channels}: picture files do not hold such.")
    number, told = _numbers(listing, num_classes)
    count, needed = len(listing.files), len(listing.files) * height * width * 3
    if needed > folder.BYTES:
        raise ValueError(f"Expected images that fit into {folder.BYTES >> 30} GiB; the {count} of "
                         f"{listing.table or listing.root} need {needed / (1 << 30):.1f} at "
                         f"{height}x{width}. Give fewer: some of each class are enough.")
    images = np.stack(folder.each(listing.files, lambda path: decode.rgb(path, (height, width))))
    images = _grey(images) if channels == 1 else images
    labels = np.array([number[name] for name in listing.names], np.int32)
    note = (f"{count} image{'s' * (count > 1)} of {len(set(number.values()))} of {num_classes} "
            f"classes; {told}")
    others = [size for size in sizes(listing) if size != (height, width)]
    if others:
        note += (f"; of {len(others)} other size{'s' * (len(others) > 1)}, such as "
                 f"{others[0][0]}x{others[0][1]}, resized to {height}x{width}")
    if listing.skipped:
        note += f"; {listing.skipped} other files or folders were left out"
    return Given(images, labels, listing.files, note)


def _grey(images: np.ndarray) -> np.ndarray:
    """RGB as one channel of uint8, rounded; what was grey stays as it was."""
    return np.round(images @ _LUMA).astype(np.uint8)[..., None]


def _shown(*names: str) -> str:
    """Five names that others chose, fit for one line of a terminal, and how many more there are."""
    shown = ["".join(letter if letter.isprintable() else "?" for letter in name)
             for name in names[:5]]
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(name if len(name) <= 80 else f"{name[:77]}..." for name in shown) + more


def _entries(where: pathlib.Path) -> tuple[list[pathlib.Path], list[pathlib.Path]]:
    """Folders in a folder, and what else is in it, in natural order and without hidden ones."""
    seen = (entry for entry in where.iterdir()
            if entry.name != "__MACOSX" and not entry.name.startswith("."))
    found = sorted(seen, key=lambda entry: folder.natural(entry.name))
    return [e for e in found if e.is_dir()], [e for e in found if not e.is_dir()]


def _in_folder(root: pathlib.Path) -> Listing:
    """The images of the class folders in a folder, or of the one CSV in it."""
    folders, loose = _entries(root)
    tables = [file for file in loose if file.suffix.lower() == ".csv" and file.is_file()]
    if not folders and len(tables) == 1:
        return _in_table(root, tables[0])
    if not folders:
        raise ValueError(
            f"Expected a folder of images of each class in {root}, or one CSV; found no folder, "
            f"{len(tables)} CSVs and {len(loose) - len(tables)} other files. Put images into "
            "folders called by class numbers, or name the CSV itself.")
    found, skipped = [], len(loose)
    for own in folders:
        deeper, inside = _entries(own)
        images = [file for file in inside if file.suffix.lower() in folder.EXTENSIONS
                  and file.is_file()]  # no pipe, which would be waited for without end
        if not images:
            raise ValueError(
                f"Expected images ({', '.join(sorted(folder.EXTENSIONS))}) in the class folder "
                f"{own}, found none, but {len(inside)} other files and {len(deeper)} folders. "
                "Images lie right in their class's folder; to use a CSV, name the CSV itself.")
        skipped += len(deeper) + len(inside) - len(images)
        found += images
    return Listing(root, None, tuple(found), tuple(file.parent.name for file in found), skipped)


def _in_table(root: pathlib.Path, table: pathlib.Path) -> Listing:
    """The images that a CSV lists."""
    files: list[pathlib.Path] = []
    missing: list[str] = []
    label_of: dict[pathlib.Path, str] = {}
    for line, name, label in itertools.islice(_rows(table), IMAGES + 1):
        file = _inside(root, name, f"{table}, line {line}")
        if file is None:
            missing.append(f"line {line}: {name}")
        elif label_of.setdefault(file, label) != label:
            raise ValueError(f"Expected one label of each file in {table}, line {line} calls "
                             f"{_shown(name)} {_shown(label)}, one before {_shown(label_of[file])}"
                             ". Remove one of them.")
        else:
            files.append(file)
    if missing:
        raise FileNotFoundError(f"Expected the files that {table} lists, {len(missing)} are not "
                                f"there: {_shown(*missing)}. They are sought in {root}.")
    return Listing(root, table, tuple(files), tuple(label_of[file] for file in files))


def _inside(root: pathlib.Path, name: str, at: str) -> pathlib.Path | None:
    """A file in the CSV's folder, None if there is none; ValueError if the name leads elsewhere.

    A CSV from somebody else must not make us open what its sender chose.
    """
    absolute = pathlib.PurePath(name).is_absolute()
    try:
        file = (root / name).resolve()
        if not absolute and file.is_relative_to(root):
            return file if file.is_file() else None
    except (OSError, RuntimeError, ValueError):  # too long, a ring of links, a null character
        return None
    raise ValueError(f"Expected a file in the CSV's folder in {at}, got {_shown(name)}, which "
                     f"{'is absolute' if absolute else 'leads out of it'}. Put the images beside "
                     "the CSV and name them relative to it.")


def _rows(table: pathlib.Path) -> Iterator[tuple[int, str, str]]:
    """Line number, file and label of each line of a CSV that is not empty."""
    text = _text(table)
    separator = max(",;\t", key=text.partition("\n")[0].count)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True,
                        skipinitialspace=True)
    try:
        header = [name.strip().casefold() for name in next(reader, [])]
        places = [[i for i, h in enumerate(header) if h in known] for known in COLUMNS.values()]
        if any(len(found) != 1 for found in places):
            wanted = " and ".join(f"one column of {what}s (called {', '.join(known)})"
                                  for what, known in COLUMNS.items())
            raise ValueError(f"Expected {wanted} in the first line of {table}, found "
                             f"{_shown(*header) or 'none'}. Rename the columns.")
        for row in filter(any, reader):
            cells = [row[i].strip() for [i] in places if i < len(row)]
            # More cells than the header has come of a separator in a name, unless they are empty.
            if len(row) < len(header) or any(row[len(header):]) or not all(cells):
                raise ValueError(f"Expected {len(header)} columns in {table}, line "
                                 f"{reader.line_num}, with a file and a label, found {len(row)}: "
                                 f"{_shown(*row)}. Put names that hold {separator!r} into quotes.")
            yield reader.line_num, cells[0], cells[1]
    except csv.Error as error:
        raise ValueError(f"Expected a CSV in {table}, line {reader.line_num} cannot be read: "
                         f"{error}. Save it anew from where it came.") from error


def _text(table: pathlib.Path) -> str:
    """What a CSV holds, without the mark that Excel begins it with."""
    if table.stat().st_size > TABLE_BYTES:
        raise ValueError(f"Expected at most {TABLE_BYTES >> 20} MiB in {table}. Give fewer images.")
    try:
        return table.read_bytes().decode().removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise ValueError(f"Expected UTF-8 in {table}, line {line} has the byte "
                         f"0x{error.object[error.start]:02x}. Save it as 'CSV UTF-8'.") from error


def _numbers(listing: Listing, num_classes: int) -> tuple[dict[str, int], str]:
    """The class's number of each label name, and a word on how it was told."""
    names = sorted(set(listing.names), key=folder.natural)
    what = "folders" if listing.table is None else "labels"
    where = listing.table or listing.root
    if all(re.fullmatch("[+-]?[0-9]+", name) for name in names):
        # Python refuses to read thousands of digits; a hundred are out of range all the same.
        number = {name: int(name) if len(name) < 100 else num_classes for name in names}
        if wrong := [name for name in names if not 0 <= number[name] < num_classes]:
            raise ValueError(f"Expected {what} from 0 to {num_classes - 1} in {where}, found "
                             f"{_shown(*wrong)}. Class numbers are from 0, and the network has "
                             f"{num_classes} classes.")
        return number, f"the {what} are called by class numbers"
    if len(names) != num_classes:
        raise ValueError(
            f"Expected {num_classes} {what} in {where}, one of each class of the network, found "
            f"{len(names)}: {_shown(*names)}. Call them by class numbers, from 0 to "
            f"{num_classes - 1}; then classes may be absent."
            + ("" if listing.table else " To use a CSV, name the CSV itself."))
    number = {name: i for i, name in enumerate(names)}
    return number, (f"the {num_classes} {what} in natural order are taken as classes 0 "
                    f"({_shown(names[0])}) to {num_classes - 1} ({_shown(names[-1])})")
