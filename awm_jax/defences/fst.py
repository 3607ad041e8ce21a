"""Feature Shift Tuning (FST): a new classifier that is pushed away from the suspect one."""

import dataclasses

import jax
import jax.numpy as jnp

from awm_jax import models, validate
from awm_jax.defences import tuning
from awm_jax.defences.base import EVERYTHING, Defence
from awm_jax.types import Params


@dataclasses.dataclass(frozen=True, kw_only=True)
class FSTConfig(tuning.TuneConfig):
    """Settings of `fst`, beside those of `tuning.TuneConfig`.

    Args:
      epochs: passes over the clean images, >= 1.
      weight_decay: coefficient of the weights added to their gradient, >= 0 (none in the paper's
        code).
      alpha: weight of the inner product with the suspect classifier, >= 0 (.1 to .2; the code's
        default is .2).

    Raises:
      ValueError: a value outside its range.
    """

    epochs: int = 10
    weight_decay: float = 0.0
    alpha: float = 0.2

    def __post_init__(self):
        """Checks every range before any work starts."""
        super().__post_init__()
        validate.at_least(0, alpha=self.alpha)


def rescale(kernel: jax.Array, norm: jax.Array) -> jax.Array:
    """``W norm / ||W||_2``: the Frobenius norm brought to a given one; zero stays zero.

    Args:
      kernel: any shape.
      norm: scalar >= 0.

    Returns:
      An array of the same shape.

    Example:
      >>> rescale(jnp.array([[3., 4.]]), jnp.array(10.)).tolist()
      [[6.0, 8.0]]

    Reference: FST (Min et al. 2023), the constraint ``||w|| = ||w_ori||``.
    """
    present = jnp.linalg.norm(kernel)
    return kernel * (norm / jnp.where(present > 0, present, 1.0))


def fresh_classifier(key: jax.Array, dense: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Kernel ``[d, c]`` and bias ``[c]`` drawn anew, uniform within ``+-1/sqrt(d)``."""
    bound = dense["kernel"].shape[0] ** -0.5
    keys = dict(zip(sorted(dense), jax.random.split(key, len(dense)), strict=True))
    return {name: jax.random.uniform(keys[name], leaf.shape, leaf.dtype, -bound, bound)
            for name, leaf in dense.items()}


def shifted(loss: tuning.Loss, name: str, suspect: jax.Array, alpha: float) -> tuning.Loss:
    """``L + alpha <W, W_suspect>`` over the kernel of one layer, the classifier's.

    Args:
      loss: what the shift is added to.
      name: of the layer.
      suspect: ``[d, c]`` the suspect network's kernel.
      alpha: >= 0.

    Returns:
      A `tuning.Loss`.

    Example: see `awm_jax.defences.fst`.

    Reference: FST (Min et al. 2023), its objective.
    """

    def total(key, params, images, labels):
        value, batch_stats = loss(key, params, images, labels)
        kernel = models.layer(params.weights, name)["kernel"]
        return value + alpha * (kernel * suspect).sum(), batch_stats

    return total


def _method(key: jax.Array, params: Params, images: jax.Array, labels: jax.Array,
            config: FSTConfig) -> tuple[Params, dict]:
    """``min_w L + alpha <W, W0>`` under ``||W|| = ||W0||``, the last layer W drawn anew."""
    key_draw, key_steps = jax.random.split(key)
    name = models.needed_classifier(params.arch)
    dense = models.layer(params.weights, name)
    suspect = dense["kernel"]
    norm = jnp.linalg.norm(suspect)
    drawn = fresh_classifier(key_draw, dense)

    def settle(weights):
        own = models.layer(weights, name)
        return models.with_layer(weights, name, {**own, "kernel": rescale(own["kernel"], norm)})

    start = dataclasses.replace(params, weights=models.with_layer(params.weights, name, drawn))
    tuned, losses = tuning.descend(
        key_steps, start, images, labels, config, settle=settle,
        gradient=tuning.plain(shifted(tuning.cross_entropy, name, suspect, config.alpha)))
    inner = (models.layer(tuned.weights, name)["kernel"] * suspect).sum()
    return tuned, {"loss": losses, "cosine": inner / jnp.where(norm > 0, norm, 1.0) ** 2}


fst = Defence(
    name="fst", method=_method, default=FSTConfig(), remit=EVERYTHING,
    fits=models.needed_classifier,
    paper="FST (Min et al., NeurIPS 2023), and its published code",
)
