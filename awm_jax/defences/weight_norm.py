"""Weight-norm fine-tuning: FT-SAM's comparison that shrinks all weights, not the backdoor's."""

import dataclasses

import jax
import optax

from awm_jax import validate
from awm_jax.defences import tuning
from awm_jax.defences.base import EVERYTHING, Defence
from awm_jax.types import Params


@dataclasses.dataclass(frozen=True, kw_only=True)
class WeightNormConfig(tuning.TuneConfig):
    """Settings of `weight_norm`, beside those of `tuning.TuneConfig`.

    Args:
      batch_size: images a step, >= 1; all of them where there are fewer.
      gamma: coefficient of the squared norm, >= 0. Table 9 tries .001, .005, .01, .05 and .1 and
        names none of them the choice; .01, the default, has the best mean effectiveness there, and
        .05 already loses the clean accuracy.

    The supplement prints no other constant for it: rate, momentum, decay, batch and epochs are
    those of its FT-SAM, whose decay of 1e-4 adds to the ``2 gamma`` of the gradient.

    Raises:
      ValueError: a value outside its range.
    """

    batch_size: int = 256
    gamma: float = 0.01

    def __post_init__(self):
        """Checks every range before any work starts."""
        super().__post_init__()
        validate.at_least(0, gamma=self.gamma)


def penalised(loss: tuning.Loss, gamma: float) -> tuning.Loss:
    """``L + gamma ||w||_2^2`` over every weight: kernels, biases, BatchNorm's scales.

    Args:
      loss: what is penalised.
      gamma: >= 0.

    Returns:
      A `tuning.Loss`.

    Example: see `awm_jax.defences.weight_norm`.

    Reference: FT-SAM (Zhu et al. 2023), supplement, eq. 6.
    """

    def total(key, params, images, labels):
        value, batch_stats = loss(key, params, images, labels)
        return value + gamma * optax.tree.norm(params.weights, squared=True), batch_stats

    return total


def _method(key: jax.Array, params: Params, images: jax.Array, labels: jax.Array,
            config: WeightNormConfig) -> tuple[Params, dict]:
    """``min_w L(f(x; w), y) + gamma ||w||^2`` by SGD on clean images, all weights."""
    gradient = tuning.plain(penalised(tuning.cross_entropy, config.gamma))
    tuned, losses = tuning.descend(key, params, images, labels, config, gradient=gradient)
    return tuned, {"loss": losses}


weight_norm = Defence(
    name="weight_norm", method=_method, default=WeightNormConfig(), remit=EVERYTHING,
    paper="FT-SAM (Zhu et al., ICCV 2023), supplement, eq. 6 and Table 9",
)
