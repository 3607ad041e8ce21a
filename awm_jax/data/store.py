"""Prepared arrays on disk: written whole or not at all, and anew when their files have changed."""

import hashlib
import json
import os
import pathlib
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np

Arrays = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]
FIELDS = ("train_images", "train_labels", "test_images", "test_labels")


class Prepared(NamedTuple):
    """A data set as its preparation gives it.

    Args:
      arrays: training images and labels, test images and labels.
      class_names: of class 0, 1, ...
      digest: of the arrays, in hexadecimal; empty where the data set's name says all, because its
        publisher decided the images.
    """

    arrays: Arrays
    class_names: tuple[str, ...]
    digest: str = ""


def digest(arrays: Arrays) -> str:
    """A name for arrays that others do not share.

    Example:
      >>> one, two = (np.full(3, value, np.uint8) for value in (1, 2))
      >>> digest((one, one, one, one)) == digest((one, one, one, two))
      False
    """
    found = hashlib.sha256()
    for array in arrays:
        found.update(f"{array.dtype}{array.shape}".encode())
        found.update(np.ascontiguousarray(array).data)
    return found.hexdigest()


def stats(paths: Iterable[pathlib.Path]) -> dict[str, list[int]]:
    """Size and time of change of each file that is there, by its path."""
    found = ((path, path.stat()) for path in paths if path.is_file())
    return {str(path): [stat.st_size, stat.st_mtime_ns] for path, stat in found}


def fetch(target: pathlib.Path, name: str, files: Callable[[], dict],
          prepare: Callable[[], Prepared], *, aloud: bool = True) -> Prepared:
    """Arrays from the cache; prepared and kept first if it has none or their files have changed.

    Files that have gone are no change: what was made of them is still right.

    Args:
      target: the directory that keeps them.
      name: of the data set, for the messages.
      files: gives what identifies the files that are there now, by name, such as `stats`.
      prepare: makes the arrays.
      aloud: whether to say that something is prepared.

    Returns:
      `Prepared`.
    """
    before, kept = files(), _kept(target)
    if kept is not None and all(kept["files"].get(key) == value for key, value in before.items()):
        arrays = tuple(np.load(target / f"{field}.npy") for field in FIELDS)
        return Prepared(arrays, tuple(kept["class_names"]), kept["digest"])
    started = time.perf_counter()
    if aloud:
        why = "this happens once" if kept is None else "its files have changed"
        print(f"Preparing {name}; {why} ...", flush=True)
    made = prepare()
    # Downloaded files are there only now; one that changed meanwhile is noticed next time.
    _write(target, made, {**files(), **before})
    if aloud:
        print(f"Prepared {name} in {time.perf_counter() - started:.0f} s: {target}", flush=True)
    return made


def _kept(target: pathlib.Path) -> dict | None:
    """What a finished preparation left in a directory; None where there is none."""
    path = target / "done.json"
    return json.loads(path.read_text()) if path.exists() else None


def _write(target: pathlib.Path, made: Prepared, files: dict) -> None:
    """Writes the arrays under a temporary name and renames the whole folder."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = pathlib.Path(tempfile.mkdtemp(dir=target.parent))
    try:
        for field, array in zip(FIELDS, made.arrays, strict=True):
            np.save(temporary / f"{field}.npy", array)
        (temporary / "done.json").write_text(json.dumps({
            "class_names": made.class_names, "digest": made.digest, "files": files,
            "shapes": {f: list(a.shape) for f, a in zip(FIELDS, made.arrays, strict=True)}}))
        shutil.rmtree(target, ignore_errors=True)
        try:
            os.replace(temporary, target)
        except OSError:
            if _kept(target) is None:
                raise
            # Another process that prepared the same was first.
    finally:
        shutil.rmtree(temporary, ignore_errors=True)  # gone already unless something failed
