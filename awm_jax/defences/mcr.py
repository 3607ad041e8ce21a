"""Mode connectivity repair (MCR): a network on a curve from the suspect one to a fine-tuned one."""

import dataclasses

import jax
import jax.numpy as jnp
import optax

from awm_jax import models, validate
from awm_jax.defences import tuning
from awm_jax.defences.base import EVERYTHING, Defence
from awm_jax.types import Params, Weights


@dataclasses.dataclass(frozen=True, kw_only=True)
class MCRConfig(tuning.TuneConfig):
    """Settings of `mcr`, beside those of `tuning.TuneConfig`.

    Rate, momentum, decay, batch and 100 epochs are those of the paper's code; its rate falls along
    straight lines where this one falls along a cosine. BackdoorBench trains the curve at 3e-5.

    Args:
      epochs: passes over the clean images that train the curve, >= 1.
      end_epochs: passes that fine-tune the other end, >= 1 (100 in BackdoorBench).
      t: which point of the curve is returned, in [0, 1]: 0 has the suspect network's weights, 1 the
        fine-tuned one's; BatchNorm's statistics are the clean images' at each. .3 in ANP's
        Tables 7-9, .1 in BackdoorBench.

    Raises:
      ValueError: a value outside its range.
    """

    end_epochs: int = 100
    t: float = 0.3

    def __post_init__(self):
        """Checks every range before any work starts."""
        super().__post_init__()
        validate.whole(1, end_epochs=self.end_epochs)
        validate.between(0.0, 1.0, t=self.t)


def curve(start: Weights, middle: Weights, end: Weights, t: float | jax.Array) -> Weights:
    """``(1-t)^2 start + 2t(1-t) middle + t^2 end``, a quadratic Bezier curve.

    Args:
      start: tree of arrays, the point at t = 0.
      middle: tree of the same shapes, which bends the curve.
      end: tree of the same shapes, the point at t = 1.
      t: scalar in [0, 1].

    Returns:
      A tree of the same shapes.

    Example:
      >>> curve(jnp.array([0., 8.]), jnp.array([4., 4.]), jnp.array([8., 0.]), .5).tolist()
      [4.0, 4.0]

    Reference: Zhao et al. 2020 and Garipov et al. 2018, the quadratic Bezier curve.
    """
    a, b, c = (1 - t) ** 2, 2 * t * (1 - t), t**2
    return jax.tree.map(lambda w0, theta, w1: a * w0 + b * theta + c * w1, start, middle, end)


def batch_statistics(key: jax.Array, params: Params, images: jax.Array, *, batch_size: int):
    """BatchNorm statistics of a network in training mode: means over one epoch of minibatches.

    ``updated = k old + (1 - k) new``, so ``new = u(0) / (1 - k)`` with ``k = u(1) - u(0)``, u(x)
    being what becomes of statistics that are x: each layer has a k of its own, .9 in our networks
    and .99 by default in Flax; one that is in evaluation mode all the time has 1, and keeps its
    statistics. Weights between two networks fit the running statistics of neither.

    Args:
      key: PRNG key of order and dropout (which is as in training).
      params: the network; its own statistics are kept in layers that never update them.
      images: ``[n, H, W, C]`` float32 in [0, 1].
      batch_size: images a minibatch; all of them where there are fewer.

    Returns:
      A tree like ``params.batch_stats``.

    Example: see `awm_jax.defences.mcr`.

    Reference: Garipov et al. 2018, who recompute them for each point of a curve.
    """
    key_order, key_dropout = jax.random.split(key)
    order = tuning.minibatches(key_order, len(images), batch_size, 1)
    keys = jax.random.split(key_dropout, len(order))

    def updated(old, picks, key):
        stats = jax.tree.map(lambda leaf: jnp.full_like(leaf, old), params.batch_stats)
        blank = dataclasses.replace(params, batch_stats=stats)
        return models.apply_train(blank, images[picks], key=key)[1]

    def fresh(own, one, zero, every):
        kept = jnp.median(one - zero)  # one number a layer; rounding differs by channel
        moves = kept < 1  # else it stays in evaluation mode, with statistics that never change
        return jnp.where(moves, every.mean(axis=0) / jnp.where(moves, 1 - kept, 1.0), own)

    one, zero = (updated(old, order[0], keys[0]) for old in (1.0, 0.0))
    every = jax.lax.map(lambda inputs: updated(0.0, *inputs), (order, keys))
    return jax.tree.map(fresh, params.batch_stats, one, zero, every)


def curve_loss(start: Weights, end: Weights, weight_decay: float) -> tuning.Loss:
    """``L(w) + weight_decay/2 ||w||^2`` at ``w = curve(t)``, t uniform: the middle's loss.

    Args:
      start: the weights at t = 0.
      end: the weights at t = 1.
      weight_decay: >= 0; it acts on the point of the curve, as in the paper's code.

    Returns:
      A `tuning.Loss` of the middle.

    Example: see `awm_jax.defences.mcr`.

    Reference: Zhao et al. 2020, the expected loss over a curve.
    """

    def loss(key, middle, images, labels):
        key_t, key_dropout = jax.random.split(key)
        weights = curve(start, middle.weights, end, jax.random.uniform(key_t))
        point = dataclasses.replace(middle, weights=weights)
        value, batch_stats = tuning.cross_entropy(key_dropout, point, images, labels)
        return value + weight_decay / 2 * optax.tree.norm(weights, squared=True), batch_stats

    return loss


def _method(key: jax.Array, params: Params, images: jax.Array, labels: jax.Array,
            config: MCRConfig) -> tuple[Params, dict]:
    """The other end by fine-tuning, the middle by SGD at random t, the network at ``config.t``."""
    key_end, key_curve, key_stats = jax.random.split(key, 3)
    end, end_losses = tuning.descend(key_end, params, images, labels,
                                     dataclasses.replace(config, epochs=config.end_epochs))
    mean = jax.tree.map(lambda w0, w1: (w0 + w1) / 2, params.weights, end.weights)
    loss = curve_loss(params.weights, end.weights, config.weight_decay)
    middle, curve_losses = tuning.descend(
        key_curve, dataclasses.replace(params, weights=mean), images, labels,
        dataclasses.replace(config, weight_decay=0.0), gradient=tuning.plain(loss))
    chosen = dataclasses.replace(
        params, weights=curve(params.weights, middle.weights, end.weights, config.t))
    batch_stats = batch_statistics(key_stats, chosen, images, batch_size=config.batch_size)
    return dataclasses.replace(chosen, batch_stats=batch_stats), {
        "loss": curve_losses, "end_loss": end_losses}


mcr = Defence(
    name="mcr", method=_method, default=MCRConfig(), remit=EVERYTHING,
    paper="MCR (Zhao et al., ICLR 2020), path connection; a baseline of ANP (Tables 7-9)",
)
