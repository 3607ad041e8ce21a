"""Adversarial Weight Masking (AWM), "One-shot Neural Backdoor Erasing", NeurIPS 2022."""

import contextlib
import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from awm_jax import masks as masking
from awm_jax import models, validate
from awm_jax.defences import awm_batches, awm_repair, awm_spare, awm_steps
from awm_jax.defences.awm_config import AWMConfig, Settings
from awm_jax.defences.awm_losses import AWMInfo
from awm_jax.defences.awm_steps import AWMState
from awm_jax.defences.base import (
    Status,
    agreement,
    as_batch,
    as_key,
    sound_network,
    warn_if_wrong,
)
from awm_jax.defences.survey import Survey
from awm_jax.progress import Progress, waiting
from awm_jax.types import Batch, Masks, Params


@dataclasses.dataclass(frozen=True)
class Purified:
    """The result of `purify`.

    Args:
      params: the purified network, of the type that went in.
      masks: the masks in [0, 1] that made it; with ``recalibration`` its BatchNorm statistics
        follow them, with ``repair`` its weights moved after them.
      status: `Status`; ``status.advice`` says what to do.
      history: `AWMInfo`'s fields, each ``[epochs]``, of the epochs that were kept.
      trigger: ``[H, W, C]`` the suspected trigger of the survey, or of the last epoch in a
        variant without one; added to images in [0, 1].
      warp: ``[k, k, 2]`` the warp that the suspect answers to, for `awm_jax.warps.bend`; None
        where it is an added trigger, or in a variant without a survey.
      survey: `Survey`: triggers and damage, class by class, found on the suspect network; None in
        a variant without one.
    """

    params: Params
    masks: Masks
    status: Status
    history: dict[str, np.ndarray]
    trigger: np.ndarray
    warp: np.ndarray | None
    survey: Survey | None


OnEpochs = Callable[[int, int, AWMState, dict[str, float]], bool | None]

_jit_epochs = jax.jit(awm_steps.epochs, static_argnames=("settings", "length"))
_jit_prepare = jax.jit(awm_batches.prepare, static_argnames="settings")
_jit_init = jax.jit(awm_steps.init, static_argnames="settings")
_jit_look = jax.jit(awm_steps.look, static_argnames="settings")
_jit_repair = jax.jit(awm_repair.repair, static_argnames="settings")
_jit_network = jax.jit(awm_steps.network)


def purify(params: Params, batch: Batch, *, config: AWMConfig | None = None,
           key: jax.Array | int | None = None,
           on_epochs: OnEpochs | None = None,
           every: int | None = None, survey: Survey | None = None,
           progress: bool = False) -> Purified:
    """Erases a backdoor by learning masks in [0, 1] over kernels, by default the convolutions'.

    ``min_m alpha L(f(x; m*w), y) + beta max_{||d||_1 <= tau} L(f(x+d; m*w), y) + gamma ||m||_1``

    Neither the trigger nor the attacker's class need be known. **Data needed**: clean labelled
    images, one of each class or more (the labels are not used by the default variant).

    Args:
      params: the suspect network.
      batch: clean images ``[n, H, W, C]`` float32 in [0, 1] and labels ``[n]``.
      config: `AWMConfig`; by default the project's variant, ``AWMConfig(variant='paper')`` for the
        paper's.
      key: PRNG key of minibatches and augmentation, or a seed; the same key gives the same masks.
      on_epochs: called between compiled stretches as ``(done, total, state, latest)``; where it
        returns True the run ends, with the masks from before that stretch.
      every: epochs a stretch, a divisor of the epochs; by default the largest up to 5.
      survey: of the same network, from `awm_jax.detection.scan`, instead of making one.
      progress: whether to show how far it is and the losses: a bar on a terminal, else plain lines.

    Returns:
      `Purified`.

    Raises:
      ValueError: images that do not fit the network or lie outside [0, 1], labels out of range,
        NaN in images or weights, a survey of another network or beside a variant that makes none.
      TypeError: another defence's config, or no network, batch or key.

    Warns (UserWarning) where the network gets half of the images or more wrong, as one does that
    expects other normalisation than ``params.arch`` says.

    Example:
      >>> from awm_jax import models
      >>> from awm_jax.types import Arch
      >>> arch = Arch(name='cnn', num_classes=2, image_shape=(16, 16, 3))
      >>> params = models.create(jax.random.key(0), arch)
      >>> batch = Batch(jnp.full((2, 16, 16, 3), .5), jnp.array([0, 1]))
      >>> config = AWMConfig(variant='paper', epochs=1, inner_steps=1, outer_steps=1)
      >>> batch = batch._replace(labels=models.apply(params, batch.images).argmax(axis=1))
      >>> purify(params, batch, config=config).status.name in Status.__members__
      True

    Reference: AWM paper, eq. 4.4 and Algorithm 1.
    """
    config = AWMConfig() if config is None else config
    key = as_key(key)
    batch = _checked(params, batch, config)
    given = jnp.asarray(batch.images, jnp.float32)
    warn_if_wrong(params, given, batch.labels)
    settings = config.resolve(len(given), params.arch.image_shape)
    _check_survey(params, settings, survey)
    every = stretch(settings.epochs, every)
    images, labels = _jit_prepare(key, given, jnp.asarray(batch.labels, jnp.int32), settings)
    found = survey
    if settings.survey_steps and found is None:
        with _telling("looking for triggers", progress):
            found = jax.block_until_ready(_jit_look(key, params, images, labels, settings))
    if progress:
        on_epochs = _shown(Progress("purifying", settings.epochs), on_epochs)
    state, infos = _jit_init(params, settings, found), []
    settings = awm_spare.after_survey(settings, found, params.arch)
    for done in range(every, settings.epochs + 1, every):
        last = state
        state, info = _jit_epochs(key, state, params, images, labels, settings, every)
        infos.append(jax.device_get(info))
        if on_epochs is not None:
            latest = {k: float(v[-1]) for k, v in infos[-1]._asdict().items()}
            if on_epochs(done, settings.epochs, state, latest):
                state = last
                rejected = infos.pop()
                infos = infos or [jax.tree.map(lambda leaf: leaf[:0], rejected)]
                break
    # Else it would change nothing, or there is nothing to give back.
    if settings.repair and found is not None and bool(found.small) and int(state.epoch):
        with _telling("repairing", progress):
            state = jax.block_until_ready(
                _jit_repair(key, state, params, images, labels, settings))
    history = jax.tree.map(lambda *leaves: np.concatenate(leaves), *infos)
    return conclude(params, state, found, history, given)


def _telling(what: str, progress: bool) -> contextlib.AbstractContextManager[None]:
    """Says how long something has run, if anything is to be said."""
    return waiting(what) if progress else contextlib.nullcontext()


def _shown(bar: Progress, on_epochs: OnEpochs | None) -> OnEpochs:
    """What is called between stretches, and moves a bar before."""
    def watch(done, total, state, latest):
        bar.update(done, **{k: latest[k] for k in ("clean_loss", "trigger_loss", "mask_mean")})
        ends = on_epochs is not None and on_epochs(done, total, state, latest)
        if ends:
            bar.close()
        return ends

    return watch


def _checked(params: Params, batch: Batch, config: AWMConfig) -> Batch:
    """The batch; what `purify` raises before it looks at anything."""
    if not isinstance(config, AWMConfig):
        raise TypeError(f"Expected config of type AWMConfig, got {type(config).__name__}.")
    sound_network(params)
    batch = as_batch(batch)
    validate.labelled_images(batch.images, batch.labels, num_classes=params.arch.num_classes,
                             image_shape=params.arch.image_shape)
    if config.layers not in (None, "deep"):  # before a survey that takes minutes
        layers: Any = config.layers
        last = models.classifier(params.arch)
        jax.eval_shape(lambda weights: masking.init(weights, layers, classifier=last),
                       params.weights)
    return batch


def _check_survey(params: Params, settings: Settings, survey: Survey | None) -> None:
    """ValueError for one that is not made here, or of another network."""
    if survey is None:
        return
    if not settings.survey_steps:
        raise ValueError("Expected no survey: these settings, a variant other than 'distilled' or "
                         "replay=0, make none. Leave it out.")
    classes, shape = params.arch.num_classes, params.arch.image_shape
    if survey.triggers.shape != (classes, *shape):
        raise ValueError(f"Expected a survey of this network, with triggers "
                         f"{[classes, *shape]}, got {list(survey.triggers.shape)}.")


def run(key: jax.Array, params: Params, images: jax.Array, labels: jax.Array,
        settings: Settings) -> tuple[AWMState, AWMInfo]:
    """A whole purification as one traced function: ``vmap`` it over keys for many seeds.

    Args: as `awm_steps.step`, but no state.

    Returns:
      The final state and `AWMInfo` with ``[epochs]`` leaves.

    Example: `jax.jit(jax.vmap(run, in_axes=(0, None, None, None, None)), static_argnums=4)`.

    Reference: AWM paper, Algorithm 1.
    """
    images, labels = awm_batches.prepare(key, images, labels, settings)
    found = None
    if settings.survey_steps:
        found = awm_steps.look(key, params, images, labels, settings)
    state = awm_steps.init(params, settings, found)
    state, info = awm_steps.epochs(key, state, params, images, labels, settings, settings.epochs)
    if settings.repair:
        state = awm_repair.repair(key, state, params, images, labels, settings)
    return state, info


def conclude(params: Params, state: AWMState, found: Survey | None, history: AWMInfo,
             images: jax.Array) -> Purified:
    """What `purify` returns, from the end of a run.

    Args:
      params: the suspect network.
      state: the last state.
      found: the survey; None in a variant without one.
      history: ``[epochs]`` leaves; of no epochs where nothing was kept.
      images: ``[n, H, W, C]`` the clean images as given, in [0, 1].

    Returns:
      `Purified`.

    Example: see `awm_jax.defences.awm_rows`.
    """
    purified = network(params, state)
    fields = history._asdict()
    status = _status(state, fields, agreement(params, purified, images))
    if found is None:  # one place where nothing is replayed
        trigger = state.triggers[max(int(state.epoch) - 1, 0) if len(state.triggers) > 1 else 0]
    else:
        found = jax.device_get(found)
        trigger = found.trigger
    warp = np.asarray(found.warp) if found is not None and found.bends else None
    return Purified(purified, state.masks, status, fields, np.asarray(trigger), warp, found)


def network(params: Params, state: AWMState) -> Params:
    """`awm_steps.network`, compiled: what `purify` would return if it ended here."""
    return _jit_network(params, state)


def stretch(epochs: int, every: int | None) -> int:
    """Epochs a compiled stretch: must divide their number, so that one program serves all."""
    if every is None:
        return max(d for d in range(1, 6) if epochs % d == 0)
    if every < 1 or epochs % every:
        raise ValueError(f"Expected every={every} to be a divisor of epochs={epochs}.")
    return every


def _status(state: AWMState, history: dict[str, np.ndarray], agreed: float) -> Status:
    """Reads the end of a run."""
    if not bool(state.finite):
        return Status.NONFINITE
    if agreed < 0.9:
        return Status.CLEAN_ACCURACY_LOST
    mean = history["mask_mean"]
    if not len(mean):
        return Status.STOPPED
    return settled(mean)


def settled(means: np.ndarray) -> Status:
    """Whether the masks have come to rest: ``OK`` or ``NOT_CONVERGED``.

    Args:
      means: ``[epochs]`` of the masks, one at least.

    Example:
      >>> settled(np.array([1.0, .9, .9])).name
      'OK'
    """
    moved = abs(means[-1] - means[-1 - max(1, len(means) // 10)]) if len(means) > 1 else np.inf
    return Status.NOT_CONVERGED if moved > 0.01 else Status.OK
