"""Adversarial Weight Masking (AWM), "One-shot Neural Backdoor Erasing", NeurIPS 2022."""

import dataclasses
import enum
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from awm_jax import bilevel, losses, models, projections, validate
from awm_jax import masks as masking
from awm_jax.data import augment, mixing
from awm_jax.defences.awm_config import AWMConfig, Settings
from awm_jax.defences.survey import Survey, survey
from awm_jax.types import Batch, Masks, Params


class Status(enum.IntEnum):
    """How a purification ended."""

    OK = 0
    NONFINITE = 1
    """A loss or mask became NaN or infinite; the masks are those of the epoch before."""
    NOT_CONVERGED = 2
    """The masks still moved at the end: their mean by over 0.01 in the last tenth of the epochs."""
    CLEAN_ACCURACY_LOST = 3
    """The masked network disagrees with the suspect one on over a tenth of the given images."""

    @property
    def advice(self) -> str:
        """What to do about it, one line."""
        return {
            Status.OK: "nothing to do",
            Status.NONFINITE: "lower inner_lr or outer_lr, and check the network's weights",
            Status.NOT_CONVERGED: "run more epochs, or lower outer_lr",
            Status.CLEAN_ACCURACY_LOST: "give more clean images, raise alpha, or lower tau",
        }[self]


class AWMState(NamedTuple):
    """What continues from epoch to epoch.

    Args:
      masks: the weight masks.
      opt_state: Adam's state.
      epoch: how many epochs are done.
      finite: False once a non-finite value was met; from then on nothing changes.
      triggers: ``[epochs + suspects, H, W, C]`` the trigger of every epoch done, zeros after them,
        and last the survey's; only the last epoch's, ``[1, H, W, C]``, without ``replay``.
    """

    masks: Masks
    opt_state: Any
    epoch: jax.Array
    finite: jax.Array
    triggers: jax.Array


class AWMInfo(NamedTuple):
    """What is only logged, one value an epoch (means over its mask steps).

    Args:
      clean_loss: loss on clean images.
      trigger_loss: loss on the same images with the trigger.
      clean_agreement: share of clean images on which the network gives what it should, in [0, 1].
      trigger_agreement: the same with the trigger.
      mask_mean: mean mask value, in [0, 1].
      trigger_l1: L1 norm of the triggers in the batch, their mean.
    """

    clean_loss: jax.Array
    trigger_loss: jax.Array
    clean_agreement: jax.Array
    trigger_agreement: jax.Array
    mask_mean: jax.Array
    trigger_l1: jax.Array


@dataclasses.dataclass(frozen=True)
class Purified:
    """The result of `purify`.

    Args:
      params: the purified network, of the type that went in.
      masks: the masks in [0, 1] that made it.
      status: `Status`; ``status.advice`` says what to do.
      history: `AWMInfo`'s fields, each ``[epochs]``.
      trigger: ``[H, W, C]`` the most damaging trigger of the survey, or of the last epoch in a
        variant without one; added to images in [0, 1].
      survey: ``[c, H, W, C]`` triggers and ``[c]`` damage, class by class, found on the suspect
        network; None in a variant without one.
    """

    params: Params
    masks: Masks
    status: Status
    history: dict[str, np.ndarray]
    trigger: np.ndarray
    survey: Survey | None


def trigger_gradient(params: Params, masks: Masks, delta: jax.Array, images: jax.Array,
                     labels: jax.Array, *, clamp: bool) -> jax.Array:
    """``d/d delta  mean CE(f(x + delta; m * w), y)``, ``[H, W, C]``.

    Args:
      params: the network.
      masks: weight masks.
      delta: ``[H, W, C]`` the trigger.
      images: ``[B, H, W, C]`` in [0, 1].
      labels: ``[B]`` what the trigger moves predictions away from.
      clamp: clip ``x + delta`` to [0, 1].
    """

    def loss(delta):
        return losses.cross_entropy(
            models.apply(params, _add(images, delta, clamp), masks=masks), labels)

    return jax.grad(loss)(delta)


def mask_loss(params: Params, masks: Masks, delta: jax.Array, images: jax.Array,
              target: jax.Array, settings: Settings) -> tuple[jax.Array, AWMInfo]:
    """``alpha L(f(x; m*w), t) + (1-alpha) L(f(x+delta; m*w), t) + gamma ||m||_1`` (eq. 4.4).

    Two passes, not one over both: on a CPU a batch of 32 takes a fifth longer than two of 16,
    whose buffers stay in the cache.

    Args:
      params: the network.
      masks: weight masks.
      delta: ``[H, W, C]`` the trigger, or ``[B, H, W, C]`` one an image.
      images: ``[B, H, W, C]`` in [0, 1].
      target: ``[B]`` labels or ``[B, c]`` probabilities.
      settings: ``alpha``, ``gamma`` and ``clamp_outer``.
    """
    clean = models.apply(params, images, masks=masks)
    triggered = models.apply(params, _add(images, delta, settings.clamp_outer), masks=masks)
    loss = losses.cross_entropy if target.ndim == 1 else losses.soft_cross_entropy
    clean_loss, trigger_loss = loss(clean, target), loss(triggered, target)
    norm = masking.l1(masks)
    total = (settings.alpha * clean_loss + (1 - settings.alpha) * trigger_loss
             + settings.gamma * norm)
    wanted = target if target.ndim == 1 else target.argmax(axis=1)
    info = AWMInfo(
        clean_loss, trigger_loss, (clean.argmax(axis=1) == wanted).mean(),
        (triggered.argmax(axis=1) == wanted).mean(), norm / masking.size(masks),
        projections.l1_norm(delta) / (len(images) if delta.ndim == 4 else 1),
    )
    return total, info


def _add(images: jax.Array, delta: jax.Array, clamp: bool) -> jax.Array:
    """Triggered images, from one trigger or one an image."""
    images = images + (delta[None] if delta.ndim == 3 else delta)
    return jnp.clip(images, 0.0, 1.0) if clamp else images


def _minibatch(key: jax.Array, images: jax.Array, labels: jax.Array,
               settings: Settings) -> tuple[jax.Array, jax.Array]:
    """Images without replacement (whole reshuffles when there are too few), augmented if asked."""
    key_pick, key_crop, key_mix = jax.random.split(key, 3)
    count, size = len(images), settings.batch_size
    rounds = jax.random.split(key_pick, -(-size // count))
    picks = jax.vmap(lambda k: jax.random.permutation(k, count))(rounds).ravel()[:size]
    images, labels = images[picks], labels[picks]
    if settings.augment:
        images = augment.crop_flip(key_crop, images, flip=settings.flip)
        images = mixing.mix(key_mix, images)
    return images, labels


def _replayed(key: jax.Array, delta: jax.Array, triggers: jax.Array, epoch: jax.Array,
              settings: Settings) -> jax.Array:
    """One trigger an image: this epoch's, or with probability ``replay`` an earlier one."""
    key_old, key_which = jax.random.split(key)
    surveyed = len(triggers) - settings.epochs
    earlier = surveyed + epoch
    which = jax.random.randint(key_which, (settings.batch_size,), 0, jnp.maximum(earlier, 1))
    old = jax.random.bernoulli(key_old, settings.replay, (settings.batch_size, 1, 1, 1))
    # The survey's lie at the end, so the first of them is at -surveyed.
    return jnp.where(old & (earlier > 0), triggers[which - surveyed], delta[None])


def _optimiser(settings: Settings) -> optax.GradientTransformation:
    """Adam whose rate falls to a tenth at ``decay_epoch``."""
    return optax.adam(optax.piecewise_constant_schedule(
        settings.outer_lr, {settings.decay_epoch * settings.outer_steps: 0.1}))


def _fled(params: Params, masks: Masks, images: jax.Array, labels: jax.Array,
          settings: Settings) -> jax.Array | None:
    """What the trigger moves each image away from, ``[n]``; None if augmentation may change it.

    Once an epoch, as the masks rest while the trigger moves; in batches, as n may be large.
    """
    if settings.inner_target == "labels":
        return labels
    if settings.augment:
        return None
    return jax.lax.map(lambda x: models.apply(params, x[None], masks=masks)[0].argmax(), images,
                       batch_size=settings.batch_size)


def _problem(params: Params, images: jax.Array, labels: jax.Array, fled: jax.Array | None,
             triggers: jax.Array, settings: Settings) -> bilevel.Problem:
    """Algorithm 1 as the four functions that `bilevel.epoch` drives.

    ``fled`` is what `_fled` gives. ``triggers`` are those of earlier epochs: masks that only answer
    the newest one let go of what they had erased before, as soon as the search finds something
    else.
    """
    taus = jnp.asarray(settings.taus, jnp.float32)
    optimiser = _optimiser(settings)

    def start(key, epoch, outer):
        del key, outer
        zero = jnp.zeros(images.shape[1:], images.dtype)
        surveyed = len(triggers) - settings.epochs if settings.replay else 0
        if not surveyed:
            return zero
        # By turns from nothing and from a surveyed trigger, to see if its backdoor has come back.
        return jnp.where(epoch % 2 == 1, triggers[settings.epochs + epoch // 2 % surveyed], zero)

    def ascend(key, epoch, delta, outer):
        x, y = _minibatch(key, images, labels if fled is None else fled, settings)
        masks, _ = outer
        if fled is None:
            y = models.apply(params, x, masks=masks).argmax(axis=1)
        gradient = trigger_gradient(params, masks, delta, x, y, clamp=settings.clamp_inner)
        if settings.normalised:
            gradient = projections.unit(gradient)
        delta = delta + settings.inner_lr * gradient
        if settings.sparse:
            delta = jnp.clip(projections.l1_ball(delta, taus[epoch % len(taus)]), -1.0, 1.0)
        return delta

    def settle(epoch, delta):
        return delta if settings.sparse else projections.scale_to_l1(
            delta, taus[epoch % len(taus)])

    def descend(key, epoch, delta, outer):
        masks, opt_state = outer
        key_batch, key_replay = jax.random.split(key)
        x, target = _minibatch(key_batch, images, labels, settings)
        if settings.replay:
            delta = _replayed(key_replay, delta, triggers, epoch, settings)
        if settings.objective == "distil":
            target = jax.nn.softmax(models.apply(params, x))
        gradients, info = jax.grad(
            lambda m: mask_loss(params, m, delta, x, target, settings), has_aux=True)(masks)
        updates, opt_state = optimiser.update(gradients, opt_state, masks)
        stepped = masking.clip(optax.apply_updates(masks, updates))
        if settings.monotone:
            stepped = jax.tree.map(jnp.minimum, stepped, masks)
        return (stepped, opt_state), info

    return bilevel.Problem(start, ascend, settle, descend)


def look(key: jax.Array, params: Params, images: jax.Array, labels: jax.Array,
         settings: Settings) -> Survey:
    """The survey of a suspect network that a run starts with; see `awm_jax.defences.survey`.

    Its bound is twice that of the epochs: it must find the trigger, not be kept from using it.

    Args: as `step`.
    """
    steps = max(10, settings.survey_steps // params.arch.num_classes)
    return survey(jax.random.fold_in(key, settings.epochs + 1), params,
                  lambda k: _minibatch(k, images, labels, settings)[0], steps=steps,
                  tau=2 * settings.taus[0])


def init(params: Params, settings: Settings, found: Survey | None = None) -> AWMState:
    """The state before the first epoch: masks of ones (Algorithm 1, line 1).

    Args:
      params: the suspect network.
      settings: from `AWMConfig.resolve`.
      found: from `look`; its most damaging triggers are replayed from the start.
    """
    masks = masking.init(params.weights, settings.layers)
    kept = settings.epochs if settings.replay else 1
    triggers = jnp.zeros((kept, *params.arch.image_shape))
    if found is not None:
        worst = jnp.argsort(-found.damage)[:settings.suspects]
        triggers = jnp.concatenate([triggers, found.triggers[worst]])
    return AWMState(masks, _optimiser(settings).init(masks), jnp.zeros((), jnp.int32),
                    jnp.array(True), triggers)


def step(key: jax.Array, state: AWMState, params: Params, images: jax.Array, labels: jax.Array,
         settings: Settings) -> tuple[AWMState, AWMInfo]:
    """One epoch; pure, so it can be jitted, vmapped over keys and scanned.

    Args:
      key: PRNG key of the whole run; the epoch's number is folded in.
      state: from `init` or the last `step`.
      params: the suspect network.
      images: ``[n, H, W, C]`` clean images in [0, 1].
      labels: ``[n]`` their classes.
      settings: from `AWMConfig.resolve`.

    Returns:
      ``(state, info)``; a non-finite loss or mask keeps the old masks and clears ``finite``.

    Reference: AWM paper, Algorithm 1.
    """
    fled = _fled(params, state.masks, images, labels, settings)
    (masks, opt_state), trigger, info = bilevel.epoch(
        _problem(params, images, labels, fled, state.triggers, settings),
        jax.random.fold_in(key, state.epoch), state.epoch,
        (state.masks, state.opt_state), inner_steps=settings.inner_steps,
        outer_steps=settings.outer_steps)
    info = jax.tree.map(lambda x: x.mean(), info)
    leaves = jax.tree.leaves((masks, info, trigger))
    finite = state.finite & jnp.stack([jnp.isfinite(leaf).all() for leaf in leaves]).all()
    slot = state.epoch if settings.replay else 0
    triggers = state.triggers.at[slot].set(trigger)
    new = AWMState(masks, opt_state, state.epoch, finite, triggers)
    new = jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, state)
    return new._replace(epoch=state.epoch + 1, finite=finite), info


def run(key: jax.Array, params: Params, images: jax.Array, labels: jax.Array,
        settings: Settings) -> tuple[AWMState, AWMInfo]:
    """A whole purification as one traced function: ``vmap`` it over keys for many seeds.

    Args: as `step`.

    Returns:
      The final state and `AWMInfo` with ``[epochs]`` leaves.

    Example: `jax.jit(jax.vmap(run, in_axes=(0, None, None, None, None)), static_argnums=4)`.
    """
    images, labels = prepare(key, images, labels, settings)
    found = look(key, params, images, labels, settings) if settings.survey_steps else None
    state = init(params, settings, found)
    return _epochs(key, state, params, images, labels, settings, settings.epochs)


def prepare(key: jax.Array, images: jax.Array, labels: jax.Array,
            settings: Settings) -> tuple[jax.Array, jax.Array]:
    """The clean images and, after them, ``copies`` augmented copies of each."""
    if not settings.copies:
        return images, labels
    keys = jax.random.split(jax.random.fold_in(key, settings.epochs), settings.copies)
    copies = [augment.crop_flip(k, images, flip=settings.flip) for k in keys]
    return jnp.concatenate([images, *copies]), jnp.tile(labels, 1 + settings.copies)


def _epochs(key, state, params, images, labels, settings, length):
    """``length`` epochs as one scan."""

    def body(state, _):
        return step(key, state, params, images, labels, settings)

    return jax.lax.scan(body, state, None, length=length)


_jit_epochs = jax.jit(_epochs, static_argnames=("settings", "length"))
_jit_prepare = jax.jit(prepare, static_argnames="settings")
_jit_init = jax.jit(init, static_argnames="settings")
_jit_look = jax.jit(look, static_argnames="settings")


@jax.jit
def _agreement(params: Params, masks: Masks, images: jax.Array) -> jax.Array:
    """Share of images that both networks put into the same class."""
    purified = models.apply(params, images, masks=masks).argmax(axis=1)
    return (purified == models.apply(params, images).argmax(axis=1)).mean()


def purify(params: Params, batch: Batch, *, config: AWMConfig | None = None,
           key: jax.Array | None = None,
           on_epochs: Callable[[int, int, AWMState, dict[str, float]], None] | None = None,
           every: int | None = None) -> Purified:
    """Erases a backdoor by learning masks in [0, 1] over the convolution kernels.

    ``min_m alpha L(f(x; m*w), y) + beta max_{||d||_1 <= tau} L(f(x+d; m*w), y) + gamma ||m||_1``

    Neither the trigger nor the attacker's class need be known. **Data needed**: clean labelled
    images, one of each class or more (the labels are not used by the default variant).

    Args:
      params: the suspect network.
      batch: clean images ``[n, H, W, C]`` float32 in [0, 1] and labels ``[n]``.
      config: `AWMConfig`; by default the project's variant, ``AWMConfig(variant='paper')`` for the
        paper's.
      key: PRNG key of minibatches and augmentation; the same key gives the same masks.
      on_epochs: called between compiled stretches as ``(done, total, state, latest)``; it watches
        and changes nothing.
      every: epochs a stretch, a divisor of the epochs; by default the largest up to 5.

    Returns:
      `Purified`.

    Raises:
      ValueError: images that do not fit the network or lie outside [0, 1], labels out of range,
        NaN in images or weights.

    Example:
      >>> from awm_jax.types import Arch
      >>> params = models.create(jax.random.key(0), Arch(name='small_vgg', num_classes=2))
      >>> batch = Batch(jnp.full((2, 32, 32, 3), .5), jnp.array([0, 1]))
      >>> config = AWMConfig(epochs=1, inner_steps=1, outer_steps=1, batch_size=2)
      >>> purify(params, batch, config=config).status.name in Status.__members__
      True

    Reference: AWM paper, eq. 4.4 and Algorithm 1.
    """
    config = config or AWMConfig()
    key = jax.random.key(0) if key is None else key
    validate.labelled_images(batch.images, batch.labels, num_classes=params.arch.num_classes,
                             image_shape=params.arch.image_shape)
    if not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params)):
        raise ValueError("Expected finite weights, found NaN or infinity in the network.")
    given = jnp.asarray(batch.images, jnp.float32)
    settings = config.resolve(len(given), params.arch.image_shape)
    every = _stretch(settings.epochs, every)
    images, labels = _jit_prepare(key, given, jnp.asarray(batch.labels, jnp.int32), settings)
    found = _jit_look(key, params, images, labels, settings) if settings.survey_steps else None
    state, infos = _jit_init(params, settings, found), []
    for done in range(every, settings.epochs + 1, every):
        state, info = _jit_epochs(key, state, params, images, labels, settings, every)
        infos.append(jax.device_get(info))
        if on_epochs is not None:
            latest = {k: float(v[-1]) for k, v in infos[-1]._asdict().items()}
            on_epochs(done, settings.epochs, state, latest)
    history = {name: np.concatenate([getattr(i, name) for i in infos]) for name in AWMInfo._fields}
    status = _status(state, history, float(_agreement(params, state.masks, given)))
    if found is None:
        trigger = state.triggers[settings.epochs - 1 if settings.replay else 0]
    else:
        found = jax.device_get(found)
        trigger = found.triggers[found.damage.argmax()]
    return Purified(with_masks(params, state.masks), state.masks, status, history,
                    np.asarray(trigger), found)


def with_masks(params: Params, masks: Masks) -> Params:
    """The network with its masks multiplied in, usable without them."""
    return dataclasses.replace(params, weights=masking.apply(params.weights, masks))


def _stretch(epochs: int, every: int | None) -> int:
    """Epochs a compiled stretch: must divide their number, so that one program serves all."""
    if every is None:
        return max(d for d in range(1, 6) if epochs % d == 0)
    if every < 1 or epochs % every:
        raise ValueError(f"Expected every={every} to be a divisor of epochs={epochs}.")
    return every


def _status(state: AWMState, history: dict[str, np.ndarray], agreement: float) -> Status:
    """Reads the end of a run."""
    if not bool(state.finite):
        return Status.NONFINITE
    if agreement < 0.9:
        return Status.CLEAN_ACCURACY_LOST
    mean = history["mask_mean"]
    moved = abs(mean[-1] - mean[-1 - max(1, len(mean) // 10)]) if len(mean) > 1 else np.inf
    return Status.NOT_CONVERGED if moved > 0.01 else Status.OK
