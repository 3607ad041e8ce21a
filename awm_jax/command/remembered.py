"""What a scan found, kept for the purification that mostly follows it and wants the same."""

import contextlib
import hashlib
import os
import pathlib
import zipfile
from importlib import metadata

import jax
import numpy as np

import awm_jax
from awm_jax import programs, whole_files
from awm_jax.data import cache_directory
from awm_jax.defences import AWMConfig
from awm_jax.defences.survey import Survey
from awm_jax.detection import Findings
from awm_jax.types import Batch, Params

_KEPT = 8  # scans, the oldest goes first
_LARGEST = 64 << 20  # bytes: a thousand classes' triggers on photographs would be half a gigabyte
_OTHERS = tuple(name for name in Findings._fields if name != "survey")


def place(params: Params, batch: Batch, seed: int, config: AWMConfig) -> pathlib.Path:
    """The file for the findings of one scan: another for whatever could change a number in them.

    That is the network, the images and labels, the seed, the settings, the arithmetic, the
    versions of JAX and the code of this package.

    Args:
      params: the network that is scanned.
      batch: the images that it is scanned with.
      seed: of the scan's key.
      config: of the scan.

    Returns:
      A path in the cache directory, whether or not anything is there.

    Example: `place(params, batch, 0, AWMConfig()).exists()`.
    """
    found = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path((params.weights, params.batch_stats,
                                                           tuple(batch))):
        array = np.ascontiguousarray(leaf)
        found.update(f"{jax.tree_util.keystr(path)}{array.dtype}{array.shape}".encode())
        found.update(array.data)
    versions = [metadata.version(name) for name in ("jax", "jaxlib", "flax")]
    found.update(repr((params.arch, seed, config, jax.default_backend(), programs.convolutions(),
                       versions)).encode())
    code = pathlib.Path(awm_jax.__file__).parent
    for file in sorted(code.rglob("*.py")):
        found.update(file.read_bytes())
    return cache_directory() / "findings" / f"{found.hexdigest()[:24]}.npz"


def read(path: pathlib.Path) -> Findings | None:
    """Findings as `write` kept them; None where there are none, or the file is damaged.

    Example: `read(place(params, batch, 0, AWMConfig()))`.
    """
    try:
        with np.load(path, allow_pickle=False) as kept:
            survey = Survey(**{name: kept[f"survey.{name}"] for name in Survey._fields})
            found = Findings(survey=survey, **{name: kept[name] for name in _OTHERS})
    except (OSError, KeyError, ValueError, EOFError, zipfile.BadZipFile):
        return None
    with contextlib.suppress(OSError):
        os.utime(path)  # as new: it is wanted
    return found


def write(path: pathlib.Path, findings: Findings) -> None:
    """Keeps findings, the few last ones; none that are very large, or where nothing can be kept.

    Args:
      path: from `place`.
      findings: of that scan, on the host.

    Example: `write(place(params, batch, 0, AWMConfig()), findings)`.
    """
    named = {f"survey.{name}": leaf for name, leaf in findings.survey._asdict().items()}
    named |= {name: getattr(findings, name) for name in _OTHERS}
    arrays = {name: np.asarray(leaf) for name, leaf in named.items()}
    if sum(array.nbytes for array in arrays.values()) > _LARGEST:
        return
    try:
        with whole_files.writing(path) as temporary, temporary.open("wb") as file:
            np.savez(file, allow_pickle=False, **arrays)
        old = sorted(path.parent.glob("*.npz"), key=lambda kept: kept.stat().st_mtime)
        for kept in old[:-_KEPT]:
            kept.unlink(missing_ok=True)
    except OSError:  # a cache that cannot be written is no reason to lose a scan
        return
