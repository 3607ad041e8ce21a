"""What masks cost, given back: the masked network learns from the suspect one again."""

import jax
import jax.numpy as jnp
import optax

from awm_jax import bilevel, losses, models, projections
from awm_jax.defences import awm_batches, awm_losses, awm_steps
from awm_jax.defences.awm_config import Settings
from awm_jax.defences.awm_steps import AWMState
from awm_jax.types import Masks, Params, Weights

ALPHA = 0.98  # weight of the clean loss
STEPS = 20  # weight steps an epoch
RATE = 5e-4  # Adam's, which falls to 0 by a cosine
MASKED = 0.2  # share of it for kernels with masks
CONSTANTS = (ALPHA, STEPS, RATE, MASKED)


def repair(key: jax.Array, state: AWMState, params: Params, images: jax.Array, labels: jax.Array,
           settings: Settings) -> AWMState:
    """``min_w  a L(f(s; m*w), f(s)) + (1-a) L(f(s+d; m*w), f(s))``, the last step of a run.

    f without weights is the suspect network, s are clean images after `awm_jax.data.augment.strong`
    and mixing, a third of them with rectangles of others (on CIFAR-10 worth 1.5 to 2.3 points). d
    is an earlier trigger of the run or, on one image in four, this epoch's, searched for towards
    the suspect. A kernel with masks takes a fifth of Adam's steps, times its masks, because the
    backdoor lies there. Only where one small trigger of one class is suspected: 71% of a large
    trigger and 92% of several came back (docs/results.md); warps and all-to-all were not tried.

    Args:
      key: PRNG key of the whole run.
      state: after its last epoch.
      params: the suspect network.
      images: ``[n, H, W, C]`` clean images in [0, 1].
      labels: ``[n]``, which are not looked at.
      settings: from `AWMConfig.resolve`: ``repair`` and what a search goes by.

    Returns:
      The state with other ``weights``; the same where another kind of backdoor is suspected, or a
      weight would not be finite.

    Example: ``repair(key, state, params, images, labels, settings).weights``.

    Reference: none; of the images, Asano & Saeed 2023, "The Augmented Image Prior".
    """
    images, labels = jnp.asarray(images), jnp.asarray(labels)
    total = settings.repair * STEPS
    adam = optax.adam(optax.cosine_decay_schedule(RATE, total))
    problem = _problem(params, images, labels, state, settings, adam)
    key = jax.random.fold_in(key, settings.epochs + 3)

    def epoch(outer, number):
        outer, _, _ = bilevel.epoch(problem, jax.random.fold_in(key, number), number, outer,
                                    inner_steps=settings.inner_steps, outer_steps=STEPS)
        return outer, None

    start = (state.weights, adam.init(state.weights))
    (weights, _), _ = jax.lax.scan(epoch, start, jnp.arange(settings.repair))
    finite = jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(weights)]).all()
    one_class = (state.suspect >= 0) & (state.suspect < params.arch.num_classes)
    small = one_class & ~state.bends & ~state.several
    kept = finite & state.finite & small
    return state._replace(weights=jax.tree.map(lambda new, old: jnp.where(kept, new, old), weights,
                                               state.weights))


def _problem(params: Params, images: jax.Array, labels: jax.Array, state: AWMState,
             settings: Settings, adam: optax.GradientTransformation) -> bilevel.Problem:
    """As in `awm_steps`, but the defender's move is one of weights."""
    shares = _shares(params.weights, state.masks)

    def network(weights):
        return awm_steps.network(params, state._replace(weights=weights))

    def batch(key):
        return awm_batches.minibatch(key, images, labels, settings, strong=True)[0]

    def start(key, epoch, outer):
        del key, epoch, outer
        return jnp.zeros(images.shape[1:], images.dtype)

    def ascend(key, epoch, delta, outer):
        del epoch
        x, current = batch(key), network(outer[0])
        own = models.apply(current, x).argmax(axis=1)
        slope, _ = awm_losses.trigger_gradient(
            current, None, delta, x, own, clamp=settings.clamp_inner,
            towards=(jnp.array(True), state.suspect))
        ahead = delta + settings.inner_lr * projections.unit(slope)
        return jnp.clip(projections.l1_ball(ahead, settings.pursuit * settings.taus[0]), -1.0, 1.0)

    def descend(key, epoch, delta, outer):
        del epoch
        weights, opt_state = outer
        key_batch, key_replay = jax.random.split(key)
        x = batch(key_batch)
        triggers = awm_batches.replayed(key_replay, delta, state.triggers,
                                        jnp.array(settings.epochs), settings)
        target = jax.nn.softmax(models.apply(params, x))

        def loss(weights):
            current = network(weights)
            clean = losses.soft_cross_entropy(models.apply(current, x), target)
            triggered = losses.soft_cross_entropy(
                models.apply(current, jnp.clip(x + triggers, 0, 1)), target)
            return ALPHA * clean + (1 - ALPHA) * triggered

        updates, opt_state = adam.update(jax.grad(loss)(weights), opt_state)
        weights = jax.tree.map(lambda w, u, share: w + share * u, weights, updates, shares)
        return (weights, opt_state), None

    return bilevel.Problem(start, ascend, lambda epoch, delta: delta, descend)


def _shares(weights: Weights, masks: Masks) -> Weights:
    """By how much of its step Adam moves each weight."""
    masked = dict(jax.tree_util.tree_leaves_with_path(masks))
    return jax.tree_util.tree_map_with_path(
        lambda path, _: MASKED * masked[path] if path in masked else 1.0, weights)
