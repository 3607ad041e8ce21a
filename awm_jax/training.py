"""Supervised training on a device: whole epochs in one compiled scan."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax

from awm_jax import losses, models, validate
from awm_jax.data import augment
from awm_jax.types import Arch, Params


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How to train a network from scratch.

    Args:
      epochs: passes over the data, >= 1.
      batch_size: images a step, >= 1.
      peak_lr: Adam's highest rate, > 0; it rises over the first 30% of the steps and falls along a
        cosine to nearly zero (one cycle).
      weight_decay: decoupled decay of the kernels, >= 0.
      augment: random crops (and flips where the data set allows them).
      crop: largest shift of a crop in pixels, >= 0.
      flip: horizontal flips keep the label.

    Raises:
      ValueError: a value outside its range.
    """

    epochs: int = 10
    batch_size: int = 128
    peak_lr: float = 3e-3
    weight_decay: float = 5e-4
    augment: bool = True
    crop: int = 4
    flip: bool = False

    def __post_init__(self):
        """Checks every range before any work starts."""
        validate.whole(1, epochs=self.epochs, batch_size=self.batch_size)
        validate.positive(peak_lr=self.peak_lr)
        validate.whole(0, crop=self.crop)
        validate.boolean(augment=self.augment, flip=self.flip)
        validate.at_least(0, weight_decay=self.weight_decay)


class Attacker(Protocol):
    """Changes every batch before the network learns from it; hashable, since it is static."""

    def __call__(self, key: jax.Array, state: Any, params: Params, images: jax.Array,
                 labels: jax.Array) -> tuple[Any, jax.Array, jax.Array]:
        """``(state, images, labels)`` of augmented images ``[B, H, W, C]`` in [0, 1]."""


class TrainState(NamedTuple):
    """What continues from epoch to epoch; a tree of arrays, so it can be checkpointed.

    Args:
      weights: the network's weights.
      batch_stats: its BatchNorm statistics.
      opt_state: the optimiser's state.
      epoch: epochs done.
      attacker: what an `Attacker` carries on; ``()`` without one.
    """

    weights: Any
    batch_stats: Any
    opt_state: Any
    epoch: jax.Array
    attacker: Any = ()


def _optimiser(config: TrainConfig, steps: int) -> optax.GradientTransformation:
    """AdamW on one cycle; only kernels decay."""
    schedule = optax.cosine_onecycle_schedule(
        max(steps * config.epochs, 4), config.peak_lr, pct_start=0.3)
    return optax.adamw(schedule, weight_decay=config.weight_decay,
                       mask=lambda w: jax.tree.map(lambda leaf: leaf.ndim > 1, w))


def init(key: jax.Array, arch: Arch, config: TrainConfig, num_images: int,
         attacker: Any = ()) -> TrainState:
    """Fresh weights and optimiser state.

    Args:
      key: PRNG key.
      arch: what to train.
      config: how.
      num_images: size of the training set, at least one batch.
      attacker: what an `Attacker` starts from.

    Returns:
      `TrainState` before its first epoch.

    Raises:
      ValueError: fewer images than one batch.
    """
    validate.at_least(config.batch_size, num_images=num_images)
    params = models.create(key, arch)
    opt_state = _optimiser(config, num_images // config.batch_size).init(params.weights)
    return TrainState(params.weights, params.batch_stats, opt_state, jnp.zeros((), jnp.int32),
                      attacker)


def epoch(key: jax.Array, state: TrainState, images: jax.Array, labels: jax.Array, arch: Arch,
          config: TrainConfig, attacker: Attacker | None = None) -> tuple[TrainState, jax.Array]:
    """One pass over a reshuffled training set, as one scan.

    Args:
      key: PRNG key of the whole run; the epoch's number is folded in.
      state: from `init` or the last `epoch`.
      images: ``[N, H, W, C]`` uint8, on the device.
      labels: ``[N]`` int32.
      arch: what is trained (static).
      config: how (static).
      attacker: changes every batch (static); it starts from ``state.attacker``.

    Returns:
      ``(state, loss)``: the mean loss of the epoch. The last partial batch is left out.
    """
    steps = len(images) // config.batch_size
    optimiser = _optimiser(config, steps)
    key_order, key_steps = jax.random.split(jax.random.fold_in(key, state.epoch))
    order = jax.random.permutation(key_order, len(images))[: steps * config.batch_size]

    def step(state, inputs):
        picks, key = inputs
        key_crop, key_dropout = jax.random.split(key)
        x = images[picks].astype(jnp.float32) / 255.0
        if config.augment:
            x = augment.crop_flip(key_crop, x, pad=config.crop, flip=config.flip)
        y, carried = labels[picks], state.attacker
        if attacker is not None:
            carried, x, y = attacker(jax.random.fold_in(key, 2), carried,
                                     Params(state.weights, state.batch_stats, arch), x, y)

        def loss_fn(weights):
            params = Params(weights, state.batch_stats, arch)
            logits, batch_stats = models.apply_train(params, x, key=key_dropout)
            return losses.cross_entropy(logits, y), batch_stats

        (loss, batch_stats), gradients = jax.value_and_grad(loss_fn, has_aux=True)(state.weights)
        updates, opt_state = optimiser.update(gradients, state.opt_state, state.weights)
        weights = optax.apply_updates(state.weights, updates)
        return TrainState(weights, batch_stats, opt_state, state.epoch, carried), loss

    inputs = (order.reshape(steps, config.batch_size), jax.random.split(key_steps, steps))
    state, step_losses = jax.lax.scan(step, state, inputs)
    return state._replace(epoch=state.epoch + 1), step_losses.mean()


_jit_epoch = jax.jit(epoch, static_argnames=("arch", "config", "attacker"), donate_argnums=1)


def train(key: jax.Array, images: np.ndarray, labels: np.ndarray, arch: Arch,
          config: TrainConfig, *, state: TrainState | None = None,
          attacker: Attacker | None = None, attacker_state: Any = (),
          on_epoch: Callable[[int, int, TrainState, float], None] | None = None) -> Params:
    """Trains a network, one compiled program for all epochs.

    Args:
      key: PRNG key of weights, order, crops and dropout.
      images: ``[N, H, W, C]`` uint8.
      labels: ``[N]`` integers in 0..c-1.
      arch: what to train.
      config: how.
      state: where to go on from, as ``on_epoch`` received it; None starts afresh. It is copied.
      attacker: changes every batch before the network learns from it; None for none.
      attacker_state: what it starts from, a tree of arrays; ``on_epoch`` gets what became of it as
        ``state.attacker``.
      on_epoch: called after each epoch as ``(done, total, state, loss)``. The next epoch takes the
        state's memory: copy what is to be kept in it (``jax.tree.map(jnp.copy, state)``).

    Returns:
      The trained `Params`.

    Raises:
      ValueError: images and labels that do not fit, or fewer than one batch of them.
      FloatingPointError: the loss became NaN or infinite.

    Example:
      >>> x, y = np.zeros((8, 8, 8, 3), np.uint8), np.zeros(8, np.int32)
      >>> arch = Arch(name='small_vgg', num_classes=2, image_shape=(8, 8, 3))
      >>> params = train(jax.random.key(0), x, y, arch, TrainConfig(epochs=1, batch_size=8))
      >>> params.arch.name
      'small_vgg'
    """
    validate.training_set(images, labels, num_classes=arch.num_classes,
                          image_shape=arch.image_shape)
    key_init, key_run = jax.random.split(key)
    # Copies: every epoch donates its state, and the caller's arrays are not ours to give away.
    if state is None:
        state = init(key_init, arch, config, len(images), jax.tree.map(jnp.copy, attacker_state))
    else:
        state = jax.tree.map(jnp.copy, state)
    on_device = jnp.asarray(images), jnp.asarray(labels, jnp.int32)
    for done in range(int(state.epoch), config.epochs):
        state, loss = _jit_epoch(key_run, state, *on_device, arch, config, attacker)
        if not np.isfinite(loss):
            raise FloatingPointError(
                f"Expected a finite loss, got {float(loss)} in epoch {done + 1}. Lower "
                f"peak_lr={config.peak_lr}."
            )
        if on_epoch is not None:
            on_epoch(done + 1, config.epochs, state, float(loss))
    return Params(state.weights, state.batch_stats, arch)
