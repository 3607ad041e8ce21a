"""What `--dataset=NAME` means unless told otherwise."""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class Preset:
    """Defaults of one data set.

    Args:
      epochs: training epochs of a backdoored network.
      surrogate_epochs: training epochs of the clean network that Trojan and inv triggers need.
      batch_size: images a training step.
      crop: largest shift of a training image in pixels: 4 is CIFAR-10's usual; signs and digits are
        centred already, and a trigger in the corner survives a small shift.
      peak_lr: highest learning rate of the one-cycle schedule.
      paper_copies: fixed augmented copies of each clean image in the paper's one-shot runs (section
        5.1: CIFAR-10 is augmented, appendix B: GTSRB is not).
    """

    epochs: int
    surrogate_epochs: int
    batch_size: int
    crop: int
    peak_lr: float
    paper_copies: int
    ft_sam_rho: float


PRESETS = {
    "digits": Preset(epochs=12, surrogate_epochs=5, batch_size=32, crop=2, peak_lr=3e-3,
                     paper_copies=0, ft_sam_rho=2.0),
    "gtsrb": Preset(epochs=4, surrogate_epochs=2, batch_size=32, crop=2, peak_lr=2e-3,
                    paper_copies=0, ft_sam_rho=8.0),
    "cifar10": Preset(epochs=30, surrogate_epochs=8, batch_size=128, crop=4, peak_lr=3e-3,
                      paper_copies=9, ft_sam_rho=2.0),
    "mnist": Preset(epochs=4, surrogate_epochs=1, batch_size=128, crop=2, peak_lr=3e-3,
                    paper_copies=0, ft_sam_rho=2.0),
}
