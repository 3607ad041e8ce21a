"""What the benchmark measures: one cell's settings and times, shared by both sides."""

import dataclasses
import resource
import sys
from typing import NamedTuple

import numpy as np

JOBS = ("purify", "train", "sweep")
ARCHS = ("small_vgg", "resnet18")
LAYERS = ("conv", "deep")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cell:
    """One measurement.

    Args:
      job: 'purify' (one-shot AWM, Algorithm 1), 'train', or 'sweep' (as many purifications as
        ``seeds``).
      arch: a name in `ARCHS`.
      batch: images a step.
      epochs: epochs timed.
      images: clean images of a purification, or the training set's.
      classes: classes of the network.
      steps: trigger steps, and mask steps, of an epoch of purifying.
      seeds: of a sweep.
      layers: which convolutions are masked: 'conv' (all, as in the paper) or 'deep' (those
        below the first resolution).
      device: 'cpu' or 'gpu'.
      precision: 'float32' or, on a CPU, 'bfloat16': of convolutions (ours), of whatever
        `torch.autocast` rounds (theirs); weights, masks and sums are float32 on both sides.
    """

    job: str
    arch: str
    batch: int
    epochs: int
    images: int
    classes: int = 43
    steps: int = 10
    seeds: int = 1
    layers: str = "conv"
    device: str = "cpu"
    precision: str = "float32"


class Times(NamedTuple):
    """What one run of a cell took.

    Args:
      seconds: of the job itself.
      compiling: seconds of it (ours), or what a first epoch takes more than those timed (theirs).
      peak: most memory in MiB, of the process, or of the GPU.
      before: the same before the job began: libraries, and what they allocate.
      figure: mean of masks, or the training loss: both sides should agree roughly.
    """

    seconds: float
    compiling: float
    peak: float
    before: float
    figure: float


def process_peak() -> float:
    """Most memory that this process has used so far, in MiB.

    Example:
      >>> process_peak() > 0
      True
    """
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most / 2**20 if sys.platform == "darwin" else most / 2**10  # bytes there, KiB elsewhere


def images_of(cell: Cell) -> tuple[np.ndarray, np.ndarray]:
    """Random images ``[n, 32, 32, 3]`` and labels: time does not depend on what they show."""
    rng = np.random.default_rng(0)
    return (rng.random((cell.images, 32, 32, 3), np.float32),
            (np.arange(cell.images) % cell.classes).astype(np.int32))
