"""Arrays out of TFDS, without TensorFlow and without a look-up on Google Cloud Storage."""

import contextlib
import logging
import pathlib
import sys
import tempfile
from collections.abc import Callable, Iterator

import numpy as np
import tensorflow_datasets as tfds
from tensorflow_datasets.core.utils import gcs_utils, tqdm_utils

from awm_jax.data.store import Arrays

# No public switch turns this look-up off for building a DatasetInfo; offline it hangs for minutes.
gcs_utils._is_gcs_disabled = True

_PACE = "about a minute for 50,000 images"  # GTSRB's 51,839 took 45 s on a core
_CHUNK = 5000  # records decoded at a time: much faster than one by one


def prepare_and_read(builder_class: Callable, archives: pathlib.Path,
                     cache: pathlib.Path) -> Arrays:
    """Prepares a builder of ours from local archives and reads it."""
    cache.mkdir(parents=True, exist_ok=True)
    # A directory used once: TFDS takes whatever it finds prepared, be it of other archives or of
    # incomplete ones, and the arrays are what is kept.
    with _quiet(), tempfile.TemporaryDirectory(dir=cache, prefix="tfds-") as prepared:
        builder = builder_class(data_dir=prepared, file_format="array_record")
        if not sys.stderr.isatty():  # in place of the bars
            print(f"TFDS makes {builder.name} of the archives in {archives}: {_PACE}.", flush=True)
        builder.download_and_prepare(download_config=tfds.download.DownloadConfig(
            manual_dir=archives, try_download_gcs=False))
        return read(builder)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """TFDS's bars on a terminal alone, and nothing of OpenCV, whose place Pillow takes."""
    bars, log = tqdm_utils._active, logging.getLogger("absl")

    def other(record):
        return "OpenCV is not installed" not in record.getMessage()

    log.addFilter(other)
    tfds.display_progress_bar(bars and sys.stderr.isatty())
    try:
        yield
    finally:
        tfds.display_progress_bar(bars)
        log.removeFilter(other)


def read(builder) -> Arrays:
    """The training and test splits of a prepared builder as arrays."""
    with _quiet():
        return _read(builder)


def _read(builder) -> Arrays:
    """`read`, with all that TFDS has to say."""
    out: list[np.ndarray] = []
    for split in ("train", "test"):
        source = builder.as_data_source(split=split)
        images, labels = [], []
        for start in range(0, len(source), _CHUNK):
            records = source.__getitems__(list(range(start, min(start + _CHUNK, len(source)))))
            images.append(np.stack([record["image"] for record in records]))
            labels.append(np.array([record["label"] for record in records], np.int32))
        out += [np.concatenate(images), np.concatenate(labels)]
    return out[0], out[1], out[2], out[3]
