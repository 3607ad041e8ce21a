"""The epochs of Adversarial Weight Masking as pure functions: jit, vmap and scan them."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from awm_jax import bilevel, models, projections, warps
from awm_jax import masks as masking
from awm_jax.defences import awm_batches, awm_losses, awm_spare, recalibrate
from awm_jax.defences.awm_config import Settings
from awm_jax.defences.awm_losses import AWMInfo
from awm_jax.defences.survey import Survey, survey
from awm_jax.types import Masks, Params, Weights


class AWMState(NamedTuple):
    """What continues from epoch to epoch.

    Args:
      masks: the weight masks.
      opt_state: Adam's state.
      epoch: how many epochs are done.
      finite: False once a non-finite value was met; from then on nothing changes.
      triggers: ``[epochs + suspects, H, W, C]`` the trigger of every epoch done, zeros after them,
        and last the survey's; only the last epoch's, ``[1, H, W, C]``, without ``replay``.
      warps: ``[epochs + suspects, k, k, 2]`` the warp beside each of these, zeros but where the
        suspect answers to one; None without a survey.
      suspect: `Survey.suspect`, -1 without a survey.
      bends: `Survey.bends`, False without one.
      several: `Survey.several`, False without one.
      batch_stats: the network's BatchNorm statistics; after every stretch of `epochs` they follow
        the masks, where the settings ask for it and no all-to-all backdoor is suspected.
      weights: those that the masks multiply, once `awm_jax.defences.awm_repair` changed them; None
        in a run without it.
    """

    masks: Masks
    opt_state: Any
    epoch: jax.Array
    finite: jax.Array
    triggers: jax.Array
    warps: jax.Array | None
    suspect: jax.Array
    bends: jax.Array
    several: jax.Array
    batch_stats: Any
    weights: Weights | None


# Its rate is `_rate`.
_ADAM = optax.scale_by_adam()


def _rate(epoch: jax.Array, steady: jax.Array, settings: Settings) -> jax.Array:
    """Adam's rate: a tenth from ``decay_epoch`` on, or not against what wants a steady one.

    What is left of an all-to-all backdoor, or of a warp's, by then is still large, and a tenth of
    the rate moves nothing of it (docs/results.md).
    """
    falls = epoch >= settings.decay_epoch
    if settings.steady:
        falls &= ~steady
    return jnp.asarray(settings.outer_lr, jnp.float32) * jnp.where(falls, 0.1, 1.0)


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


class _Known(NamedTuple):
    """What the phases of an epoch go by: data, what `_fled` gives, state, settings, and what
    follows from these.
    """

    params: Params
    images: jax.Array
    labels: jax.Array
    fled: jax.Array | None
    state: AWMState
    settings: Settings
    all_to_all: jax.Array
    taus: jax.Array
    alpha: jax.Array


def _problem(params: Params, images: jax.Array, labels: jax.Array, fled: jax.Array | None,
             state: AWMState, settings: Settings) -> bilevel.Problem:
    """Algorithm 1 as the four functions that `bilevel.epoch` drives.

    ``fled`` is what `_fled` gives. The state keeps the triggers of earlier epochs: masks that only
    answer the newest one let go of what they had erased before, as soon as the search finds
    something else. What a trigger of an all-to-all backdoor does is weak, so the images that carry
    it weigh more.
    """
    all_to_all = state.suspect == params.arch.num_classes
    taus = jnp.asarray(settings.taus, jnp.float32)
    alpha = jnp.where(all_to_all, settings.all_to_all_alpha,
                      jnp.where(state.several, settings.several_alpha, settings.alpha))
    known = _Known(params, images, labels, fled, state, settings, all_to_all, taus, alpha)
    return bilevel.Problem(functools.partial(_start, known), functools.partial(_ascend, known),
                           functools.partial(_settle, known), functools.partial(_descend, known))


def _pursues(known: _Known, epoch: jax.Array) -> jax.Array:
    """Whether the epoch's trigger goes for the suspect, not away from the network's answers.

    With ``pursuit``, every second one does: masks that erase one way into the suspect class can
    open another, and a search away from the network's answers does not look there.

    Where an all-to-all backdoor is suspected, every search is for a dispersal: away from the
    network's answers there are only its natural weaknesses, which are stronger. Where several
    triggers of one class are, every search goes for that class: once the strongest is erased the
    others drive less far than what other classes have by nature, and among triggers towards those
    they would not be erased.
    """
    state, settings = known.state, known.settings
    turn = (epoch % 2 == 1) & (epoch >= settings.pursuit_start) & (state.suspect >= 0)
    return turn | known.all_to_all | state.several


def _bound(known: _Known, epoch: jax.Array) -> jax.Array:
    """The bound of an epoch's trigger, larger where it pursues one class.

    As published triggers are: a watermark's L1 norm is near 200.
    """
    tau = known.taus[epoch % len(known.taus)]
    if not known.settings.pursuit:
        return tau
    return jnp.where(_pursues(known, epoch) & ~known.all_to_all, known.settings.pursuit * tau, tau)


def _start(known: _Known, key: jax.Array, epoch: jax.Array, outer: Any) -> tuple:
    """Trigger and warp before the first ascent: zeros, or what was found before.

    With a survey, the second epoch starts from its most damaging trigger: the first steps move the
    masks most, and on ten images a search from zero rarely meets the backdoor. A dispersal goes on
    from the last one.
    """
    del key, outer
    state, settings, all_to_all = known.state, known.settings, known.all_to_all
    nothing = jnp.zeros(known.images.shape[1:], known.images.dtype)
    if state.warps is None:  # no survey
        return nothing, None
    first = jnp.where(epoch == 0, settings.epochs, epoch - 1)
    place = jnp.where(all_to_all, first, settings.epochs)
    found = all_to_all | (epoch == 1)
    return (jnp.where(found, state.triggers[place], nothing),
            jnp.where(found & state.bends, state.warps[place], 0.0))


def _ascend(known: _Known, key: jax.Array, epoch: jax.Array, inner: tuple, outer: tuple) -> tuple:
    """One step of the trigger, or of the warp where the suspect answers to one.

    A warp always leads away from the network's answers, which finds this backdoor and no other.
    """
    params, state, settings = known.params, known.state, known.settings
    away = known.labels if known.fled is None else known.fled
    x, y = awm_batches.minibatch(key, known.images, away, settings)
    (delta, warp), (masks, _) = inner, outer
    if known.fled is None:
        y = models.apply(params, x, masks=masks).argmax(axis=1)
    towards = None
    if settings.pursuit:
        towards = _pursues(known, epoch) & ~state.bends, state.suspect
    gradient, slope = awm_losses.trigger_gradient(
        params, masks, delta, x, y, clamp=settings.clamp_inner, towards=towards, warp=warp)
    if settings.l2_weight:  # the slope of ||d||_2, none at zero
        gradient = gradient + settings.l2_weight * projections.unit(delta)
    if settings.normalised:
        gradient = projections.unit(gradient)
    ahead = delta + settings.inner_lr * gradient
    if settings.sparse:
        ahead = jnp.clip(projections.l1_ball(ahead, _bound(known, epoch)), -1.0, 1.0)
    if slope is None:
        return ahead, None
    return (jnp.where(state.bends, delta, ahead),
            jnp.where(state.bends, warps.ascend(warp, slope), warp))


def _settle(known: _Known, epoch: jax.Array, inner: tuple) -> tuple:
    """The trigger scaled to its bound, where the steps did not keep it there."""
    (delta, warp), settings = inner, known.settings
    if settings.sparse or settings.bound == "none":
        return inner
    scale = projections.scale_to_l2 if settings.bound == "l2" else projections.scale_to_l1
    return scale(delta, _bound(known, epoch)), warp


def _descend(known: _Known, key: jax.Array, epoch: jax.Array, inner: tuple,
             outer: tuple) -> tuple[tuple, AWMInfo]:
    """One step of the masks, against the trigger or, with ``replay``, those of earlier epochs."""
    params, state, settings = known.params, known.state, known.settings
    masks, opt_state = outer
    key_batch, key_replay = jax.random.split(key)
    x, target = awm_batches.minibatch(key_batch, known.images, known.labels, settings)
    if settings.replay:
        inner = awm_batches.replayed(key_replay, inner, (state.triggers, state.warps), epoch,
                                     settings)
    delta, warp = inner
    if warp is not None:  # what a warp makes of an image, as what is added to it
        delta = delta + (warps.bend(x, warp) - x)
    if settings.objective == "distil":
        target = jax.nn.softmax(models.apply(params, x))

    gradients, info = awm_losses.mask_gradient(params, masks, delta, x, target, settings,
                                               known.alpha)
    directions, opt_state = _ADAM.update(gradients, opt_state, masks)
    rate = _rate(epoch, known.all_to_all | state.bends, settings)
    stepped = masking.clip(jax.tree.map(lambda m, d: m - rate * d, masks, directions))
    if settings.monotone:
        stepped = jax.tree.map(jnp.minimum, stepped, masks)
    if settings.spare and not settings.spared:
        stepped = awm_spare.spared(stepped, masks, known.all_to_all, params.arch)
    return (stepped, opt_state), info


def look(key: jax.Array, params: Params, images: jax.Array, labels: jax.Array,
         settings: Settings) -> Survey:
    """The survey of a suspect network that a run starts with; see `awm_jax.defences.survey`.

    Its bound is twice that of the epochs, which makes a trigger easier to find.

    Args: as `step`.
    """
    steps = max(10, settings.survey_steps // params.arch.num_classes)
    return survey(jax.random.fold_in(key, settings.epochs + 1), params,
                  lambda k: awm_batches.minibatch(k, images, labels, settings)[0], steps=steps,
                  tau=2 * settings.taus[0])


def init(params: Params, settings: Settings, found: Survey | None = None) -> AWMState:
    """The state before the first epoch: masks of ones (Algorithm 1, line 1).

    Args:
      params: the suspect network.
      settings: from `AWMConfig.resolve`.
      found: from `look`; its most damaging triggers are replayed from the start, the two of one
        class where several are suspected, and the warp before them where the suspect answers to it.
    """
    layers = settings.layers
    if layers == "deep":  # a network without convolutions is masked as by 'conv'
        layers = models.deep_convolutions(params.arch) or "conv"
    masks = masking.init(params.weights, layers, classifier=models.classifier(params.arch))
    kept = settings.epochs if settings.replay else 1
    triggers, suspect = jnp.zeros((kept, *params.arch.image_shape)), jnp.array(-1)
    bends, several, bent = jnp.array(False), jnp.array(False), None
    if found is not None:
        suspect, bends, several = found.suspect, found.bends, found.several
        worst = found.triggers[jnp.argsort(-found.damage)[:settings.suspects]]
        both = jnp.stack([worst[0], found.elsewhere])
        worst = jnp.where(several, both[jnp.arange(len(worst)) % 2], worst)
        apart = jnp.where(bends, jnp.zeros_like(found.dispersal), found.dispersal)
        worst = jnp.where(bends | (suspect == len(found.damage)),
                          jnp.concatenate([apart[None], worst[:-1]]), worst)
        triggers = jnp.concatenate([triggers, worst])
        bent = jnp.zeros((len(triggers), *found.warp.shape))
        bent = bent.at[settings.epochs].set(jnp.where(bends, found.warp, 0.0))
    return AWMState(masks, _ADAM.init(masks), jnp.zeros((), jnp.int32), jnp.array(True), triggers,
                    bent, suspect, bends, several, params.batch_stats,
                    params.weights if settings.repair else None)


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
    (masks, opt_state), (trigger, warp), info = bilevel.epoch(
        _problem(params, images, labels, fled, state, settings),
        jax.random.fold_in(key, state.epoch), state.epoch,
        (state.masks, state.opt_state), inner_steps=settings.inner_steps,
        outer_steps=settings.outer_steps)
    info = jax.tree.map(lambda x: x.mean(), info)
    leaves = jax.tree.leaves((masks, info, trigger))
    finite = state.finite & jnp.stack([jnp.isfinite(leaf).all() for leaf in leaves]).all()
    slot = state.epoch if settings.replay else 0
    bent = None if state.warps is None else state.warps.at[slot].set(warp)
    new = state._replace(masks=masks, opt_state=opt_state, warps=bent,
                         triggers=state.triggers.at[slot].set(trigger))
    new = jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, state)
    return new._replace(epoch=state.epoch + 1, finite=finite), info


def network(params: Params, state: AWMState) -> Params:
    """The suspect network with the masks multiplied in, usable without them.

    Args:
      params: the suspect network.
      state: of a run, at the end of a stretch.

    Example: ``network(params, state)``.
    """
    weights = params.weights if state.weights is None else state.weights
    return Params(masking.apply(weights, state.masks), state.batch_stats, params.arch)


def epochs(key, state, params, images, labels, settings, length):
    """``length`` calls of `step` as one scan, then BatchNorm's statistics."""

    def body(state, _):
        return step(key, state, params, images, labels, settings)

    state, info = jax.lax.scan(body, state, None, length=length)
    if not settings.recalibration:
        return state, info
    # The masks are learnt with the statistics at rest: recalibrated every epoch they were no better
    # (docs/results.md).
    keys = jax.random.split(jax.random.fold_in(jax.random.fold_in(key, settings.epochs + 2),
                                               state.epoch), settings.recalibration)
    batch_stats = recalibrate.batch_stats(
        keys, params, state.masks, lambda k: awm_batches.minibatch(k, images, labels, settings)[0])
    finite = jnp.array([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(batch_stats)]).all()
    # It revives all-to-all backdoors (docs/results.md).
    moves = finite & (state.suspect != params.arch.num_classes)
    batch_stats = jax.tree.map(lambda new, old: jnp.where(moves, new, old), batch_stats,
                               params.batch_stats)
    return state._replace(batch_stats=batch_stats), info
