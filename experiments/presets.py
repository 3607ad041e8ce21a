"""What `--dataset=NAME` means unless told otherwise."""

import dataclasses

import numpy as np

from awm_jax.data import Dataset


@dataclasses.dataclass(frozen=True, kw_only=True)
class Preset:
    """Defaults of one data set.

    Args:
      epochs: training epochs of a backdoored network; `epochs` has what an attack makes of them.
      surrogate_epochs: training epochs of the clean network that Trojan and inv triggers need.
      batch_size: images a training step.
      crop: largest shift of a training image in pixels: 4 is CIFAR-10's usual; signs and digits are
        centred already, and a trigger in the corner survives a small shift.
      peak_lr: highest learning rate of the one-cycle schedule.
      paper_copies: fixed augmented copies of each clean image in the paper's one-shot runs (section
        5.1: CIFAR-10 is augmented, appendix B: GTSRB is not).
      ft_sam_rho: FT-SAM's radius.
      recalibration: minibatches on which BatchNorm's statistics follow the masks of this project's
        AWM: it pays where masks cost much accuracy (docs/results.md).
    """

    epochs: int
    surrogate_epochs: int
    batch_size: int
    crop: int
    peak_lr: float
    paper_copies: int
    ft_sam_rho: float
    recalibration: int = 0


PRESETS = {
    "digits": Preset(epochs=12, surrogate_epochs=5, batch_size=32, crop=2, peak_lr=3e-3,
                     paper_copies=0, ft_sam_rho=2.0),
    "gtsrb": Preset(epochs=4, surrogate_epochs=2, batch_size=32, crop=2, peak_lr=2e-3,
                    paper_copies=0, ft_sam_rho=8.0),
    "cifar10": Preset(epochs=15, surrogate_epochs=4, batch_size=128, crop=4, peak_lr=3e-3,
                      paper_copies=9, ft_sam_rho=2.0, recalibration=10),
    "mnist": Preset(epochs=4, surrogate_epochs=1, batch_size=128, crop=2, peak_lr=3e-3,
                    paper_copies=0, ft_sam_rho=2.0),
    "tiny_imagenet": Preset(epochs=30, surrogate_epochs=8, batch_size=128, crop=4, peak_lr=3e-3,
                            paper_copies=9, ft_sam_rho=8.0),
}

# Attacks that take longer: how many times the usual epochs (docs/attacks.md has what fewer gave).
# All-to-all is an answer more for every class, WaNet a warp of under a pixel.
_LONGER = {"badnets_a2a": 3, "trojan_a2a": 3, "wanet": 2, "wanet_a2a": 3, "input_aware_a2a": 3}
_STEPS = 1500  # of training on a folder: thrice what digits takes, a third of GTSRB


def of(dataset: Dataset) -> Preset:
    """The preset of a data set, by its name; a folder's goes by the number and size of its images.

    Args:
      dataset: as `awm_jax.data.load` gives it.

    Returns:
      `Preset`.

    Raises:
      ValueError: a folder with fewer training images than one batch.

    Example:
      >>> from awm_jax import data
      >>> of(data.load('digits')).epochs
      12
    """
    kind = dataset.name.partition("-")[0]
    return _of_folder(dataset) if kind == "folder" else PRESETS[kind]


def epochs(dataset: Dataset | str, attack: str | None) -> int:
    """How long the network that carries an attack trains unless told otherwise.

    Args:
      dataset: its data, or a key of `PRESETS`.
      attack: its name; None for a network without a backdoor.

    Returns:
      Epochs, >= 1.

    Example:
      >>> from awm_jax import data
      >>> epochs(data.load('digits'), 'badnets'), epochs(data.load('digits'), 'badnets_a2a')
      (12, 36)
    """
    preset = PRESETS[dataset] if isinstance(dataset, str) else of(dataset)
    return preset.epochs * (_LONGER.get(attack, 1) if attack else 1)


def _of_folder(dataset: Dataset) -> Preset:
    """Steps rather than epochs are what training needs: a small folder is gone through often."""
    count, height, width = dataset.train_images.shape[:3]
    batch_size = 16 if count < 320 else 32 if count < 20_000 else 128
    if count < batch_size:
        raise ValueError(f"Expected at least {batch_size} training images in {dataset.name} (one "
                         f"batch), got {count}. Add images.")
    epochs = int(np.clip(round(_STEPS / (count // batch_size)), 4, 60))
    return Preset(epochs=epochs, surrogate_epochs=max(1, epochs // 3), batch_size=batch_size,
                  crop=min(height, width) // 16, peak_lr=3e-3, paper_copies=0, ft_sam_rho=2.0)
