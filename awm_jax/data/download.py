"""Downloads that are checked and never leave half a file."""

import hashlib
import http.client
import os
import pathlib
import shutil
import tempfile
import urllib.request


def fetch_missing(url: str, files: dict[str, str], folder: pathlib.Path) -> None:
    """Downloads those of ``files`` that ``folder`` lacks.

    Files already there are not checked: a local copy may be repacked.

    Args:
      url: of the directory that holds the files, ending in a slash.
      files: name to md5 sum.
      folder: where they are to be; made if it is missing.

    Raises:
      FileNotFoundError: a file could not be downloaded; says what to get, from where, to where.
      OSError: a download has another sum.
    """
    for name, md5 in files.items():
        if (folder / name).exists():
            continue
        try:
            found = _fetch(url + name, md5, folder / name)
        except (http.client.HTTPException, OSError) as error:
            raise FileNotFoundError(
                f"Expected {name} in {folder}; it is not there and could not be downloaded. "
                f"Download {', '.join(files)} from {url} into {folder}, or name the directory that "
                f"holds them with --data_dir (of experiments.tables --gtsrb_dir, --cifar10_dir, "
                f"...) or AWM_DATA_DIR. ({error})"
            ) from error
        if found != md5:
            raise OSError(f"Expected {name} with md5 {md5}, the download has {found}. Try again.")


def _fetch(url: str, md5: str, path: pathlib.Path) -> str:
    """Gets one file under a temporary name, renames it if its sum is right, returns the sum."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # A folder of its own, so that an interrupted download leaves no part of a file.
    with tempfile.TemporaryDirectory(dir=path.parent) as temporary:
        part = pathlib.Path(temporary) / path.name
        with urllib.request.urlopen(url, timeout=10) as reply, part.open("wb") as file:
            print(f"Downloading {url} ...", flush=True)
            shutil.copyfileobj(reply, file, 1 << 20)
        with part.open("rb") as file:
            found = hashlib.file_digest(file, "md5").hexdigest()
        if found == md5:
            os.replace(part, path)
    return found
