"""Fine-tuning on a few clean images, the scan that most defences are made of."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from awm_jax import losses, models, validate
from awm_jax.data import augment
from awm_jax.types import Params

# (key, params, images, labels) -> (loss, batch_stats)
Loss = Callable[[jax.Array, Params, jax.Array, jax.Array], tuple[jax.Array, Any]]
# (key, params, images, labels) -> (gradients of the weights, batch_stats, loss)
Gradient = Callable[[jax.Array, Params, jax.Array, jax.Array], tuple[Any, Any, jax.Array]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class MinibatchConfig:
    """How clean images are gone through, whatever is learnt from them.

    Args:
      epochs: passes over the clean images, >= 1.
      batch_size: images a step, >= 1; all of them where there are fewer.
      crop: largest random shift of an image in pixels, >= 0.
      flip: True if horizontal flips keep the label (CIFAR-10, not traffic signs or digits).

    Raises:
      ValueError: a value outside its range.
    """

    epochs: int = 100
    batch_size: int = 128
    crop: int = 2
    flip: bool = False

    def __post_init__(self):
        """Checks every range before any work starts."""
        validate.whole(1, epochs=self.epochs, batch_size=self.batch_size)
        validate.whole(0, crop=self.crop)
        validate.boolean(flip=self.flip)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TuneConfig(MinibatchConfig):
    """Settings of stochastic gradient descent; the rest are `MinibatchConfig`'s.

    Args:
      lr: learning rate, > 0, falling to zero along a cosine.
      momentum: in [0, 1].
      weight_decay: coefficient of the weights added to their gradient, >= 0.

    Raises:
      ValueError: a value outside its range.
    """

    lr: float = 0.01
    momentum: float = 0.9
    weight_decay: float = 1e-4

    def __post_init__(self):
        """Checks every range before any work starts."""
        super().__post_init__()
        validate.positive(lr=self.lr)
        validate.between(0.0, 1.0, momentum=self.momentum)
        validate.at_least(0, weight_decay=self.weight_decay)


def minibatches(key: jax.Array, count: int, batch_size: int, epochs: int) -> jax.Array:
    """Which images each step sees: a new order every epoch, its end filled up from its start.

    Args:
      key: PRNG key.
      count: images in all, >= 1.
      batch_size: images a step; ``count`` where that is less.
      epochs: passes over them.

    Returns:
      ``[epochs * steps, B]`` int32 with ``B = min(batch_size, count)``.

    Example:
      >>> minibatches(jax.random.key(0), 5, 2, 3).shape
      (9, 2)
    """
    size = min(batch_size, count)
    steps = -(-count // size)

    def epoch(key):
        order = jax.random.permutation(key, count)
        return order[jnp.arange(steps * size) % count].reshape(steps, size)

    return jax.vmap(epoch)(jax.random.split(key, epochs)).reshape(epochs * steps, size)


def passes(steps: int, count: int, batch_size: int) -> int:
    """How many passes over ``count`` images hold at least so many steps of `descend`.

    Args:
      steps: >= 1.
      count: images, >= 1.
      batch_size: images a step, >= 1; all of them where there are fewer.

    Returns:
      Passes, >= 1.

    Example:
      >>> passes(2000, 500, 128)
      500
    """
    return -(-steps // -(-count // min(batch_size, count)))


def for_steps(steps: int, count: int, config: Any) -> MinibatchConfig:
    """Passes over ``count`` images that hold so many steps, all else as ``config`` has it.

    Args:
      steps: >= 1.
      count: images, >= 1.
      config: settings with ``batch_size``, ``crop`` and ``flip``.

    Returns:
      `MinibatchConfig`, for `descend` with an optimiser.

    Example:
      >>> for_steps(2000, 500, MinibatchConfig()).epochs
      500
    """
    return MinibatchConfig(epochs=passes(steps, count, config.batch_size),
                           batch_size=config.batch_size, crop=config.crop, flip=config.flip)


def sgd(config: TuneConfig, steps: int) -> optax.GradientTransformation:
    """SGD with momentum and weight decay as in PyTorch (the decay is part of the gradient)."""
    schedule = optax.cosine_decay_schedule(config.lr, steps)
    return optax.chain(optax.add_decayed_weights(config.weight_decay),
                       optax.sgd(schedule, config.momentum))


def cross_entropy(key: jax.Array, params: Params, images: jax.Array,
                  labels: jax.Array) -> tuple[jax.Array, Any]:
    """Cross-entropy in training mode (batch statistics, dropout), and the new statistics."""
    logits, batch_stats = models.apply_train(params, images, key=key)
    return losses.cross_entropy(logits, labels), batch_stats


def plain(loss: Loss) -> Gradient:
    """The gradient of a loss with respect to the weights."""

    def gradient(key, params, images, labels):
        def of_weights(weights):
            return loss(key, dataclasses.replace(params, weights=weights), images, labels)

        (value, batch_stats), gradients = jax.value_and_grad(of_weights, has_aux=True)(
            params.weights)
        return gradients, batch_stats, value

    return gradient


def descend(key: jax.Array, params: Params, images: jax.Array, labels: jax.Array,
            config: MinibatchConfig, *, gradient: Gradient | None = None,
            optimiser: optax.GradientTransformation | None = None,
            settle: Callable[[Any], Any] | None = None) -> tuple[Params, jax.Array]:
    """``w <- w - lr * gradient(w)`` over shuffled minibatches, as one scan.

    Args:
      key: PRNG key of order, crops and dropout.
      params: where to start.
      images: ``[n, H, W, C]`` float32 in [0, 1].
      labels: ``[n]`` int32.
      config: how long; a `TuneConfig` also says how fast, which takes no ``optimiser`` then.
      gradient: what is followed; by default that of the cross-entropy in training mode.
      optimiser: by default `sgd` as the `TuneConfig` has it.
      settle: applied to the weights after every step (a projection, a mask of pruned channels).

    Returns:
      ``(params, losses [steps])``.

    Raises:
      TypeError: neither an optimiser nor a `TuneConfig`.

    Example: see `awm_jax.defences.fine_tune`.
    """
    key_order, key_steps = jax.random.split(key)
    order = minibatches(key_order, len(images), config.batch_size, config.epochs)
    gradient = plain(cross_entropy) if gradient is None else gradient
    if optimiser is not None:
        rule = optimiser
    elif isinstance(config, TuneConfig):
        rule = sgd(config, len(order))
    else:
        raise TypeError(f"Expected an optimiser beside config={config}, or a TuneConfig.")

    def step(carry, inputs):
        (params, opt_state), (picks, key) = carry, inputs
        key_crop, key_loss = jax.random.split(key)
        x = images[picks]
        if config.crop or config.flip:
            x = augment.crop_flip(key_crop, x, pad=config.crop, flip=config.flip)
        gradients, batch_stats, value = gradient(key_loss, params, x, labels[picks])
        updates, opt_state = rule.update(gradients, opt_state, params.weights)
        weights = optax.apply_updates(params.weights, updates)
        if settle is not None:
            weights = settle(weights)
        return (Params(weights, batch_stats, params.arch), opt_state), value

    (params, _), values = jax.lax.scan(
        step, (params, rule.init(params.weights)), (order, jax.random.split(key_steps, len(order))))
    return params, values
