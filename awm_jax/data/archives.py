"""Official zip archives, whose damage is reported with their names."""

import contextlib
import pathlib
import zipfile
import zlib
from collections.abc import Iterator


@contextlib.contextmanager
def opened(path: pathlib.Path, url: str) -> Iterator[zipfile.ZipFile]:
    """An open archive; whatever is wrong inside is reported with its name and where to get it."""
    try:
        with zipfile.ZipFile(path) as archive:
            yield archive
    except (zipfile.BadZipFile, zlib.error, KeyError, EOFError, OSError) as error:
        raise OSError(
            f"{path} is damaged or incomplete ({error}). Delete it and get it anew from {url}."
        ) from error


def member(archive: zipfile.ZipFile, suffix: str) -> str:
    """The one member that ends so, whatever folder it is packed in."""
    found = [name for name in archive.namelist() if name.endswith(suffix)]
    if len(found) != 1:
        raise OSError(f"Expected one {suffix} in {archive.filename}, found {len(found)}.")
    return found[0]


def check_whole(path: pathlib.Path, url: str) -> None:
    """Raises OSError unless a file is a zip archive that was not cut short."""
    if not zipfile.is_zipfile(path):
        raise OSError(f"{path} is no whole zip archive. Delete it and get it anew from {url}.")
