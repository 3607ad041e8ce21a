"""What it takes to send every image into one class, or each into another one: sparse triggers.

And, once for all classes, what a small smooth warp can do, and what a second trigger towards the
worst of them can, on other pixels than the first.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from awm_jax import losses, models, projections, warps
from awm_jax.types import Params

# Under a dispersal trigger a network with an all-to-all backdoor kept its answer with probability
# .03 to .05 (draws 0 to 2); six networks with one target or none, in 16 searches, with .22 to .55.
STAYS_BELOW = 0.15
KEEPS_ABOVE = 0.5
# By how many times the first class's damage exceeded the second's: all-to-all, four networks in
# twelve searches, 1.02 to 1.37; l0-inv on CIFAR-10, one of whose three dispersals came to .148,
# 2.9.
LEADS_BELOW = 2.0
LEAST_DAMAGE = 1e-6  # nats: smaller ones are taken as this
# A warp changed .67 to .98 of the answers of two networks with WaNet's backdoor by 4.5 to 12.6 nats
# (five draws, 13 searches), of four others .12 to .61 by .3 to 2.1 (nine draws, 22 searches).
BENT_ABOVE = 0.5
BENDS_ABOVE = 3.5
# Of WaNet's all-to-all backdoor (one network, two draws) .67 and .69 moved by 1.9 and 2.0 nats, and
# no class got more than .14 of these; of two CIFAR-10 networks without (four draws) one got .28 to
# .52, and of one with an all-to-all patch but .11 to .23 moved (three). Each image is driven no
# farther than to the next class, so the nats are fewer.
SCATTERS_BELOW = 0.2
SCATTERS_ABOVE = 1.25
# Without the pixels of its first trigger the most damaging class was driven, in times of what the
# next class was with all pixels, 2.2 to 7.4 far on four networks with several triggers, 1.4 to 4.2
# on six with one large trigger, .5 to 1.6 on four with a small patch, and .5 to .8 on four without
# a backdoor (docs/results.md). A large trigger needs pressing on as several do: of l2-inv 22.6%
# were left where it was not taken for one, at 1.66. A small one pays a point where it is, as in
# two searches of sixteen.
SEVERAL_ABOVE = 1.35
# All that decides what a survey suspects, and so what AWM does.
THRESHOLDS = (STAYS_BELOW, KEEPS_ABOVE, LEADS_BELOW, BENT_ABOVE, BENDS_ABOVE, SCATTERS_BELOW,
              SCATTERS_ABOVE, SEVERAL_ABOVE)
_TAKEN_ABOVE = 0.1  # where a trigger changes a pixel by more, it has it
_DISPERSAL_STEPS = 100
_ELSEWHERE_STEPS = 40
_WARP_STEPS = 40
_LAST_BATCHES = 4  # that what is not the search for a class is judged by


class Survey(NamedTuple):
    """One trigger a class, one towards no class, and what they do.

    Args:
      triggers: ``[c, H, W, C]`` the trigger towards each class, added to images in [0, 1].
      damage: ``[c]`` mean cross-entropy, under that trigger, of what the network says without it:
        how far past the decision the trigger drives, in nats. A backdoor drives several times
        farther than any other class can be driven with so few changed pixels.
      dispersal: ``[H, W, C]`` the trigger that drives images away from their class, and not all
        into one.
      stay: mean probability under it of the class that the network gives without it, in [0, 1].
      kept: into how many classes its answers fall, as a share of those without it (the exponential
        of the entropy), >= 0. All-to-all backdoors alone make both ``stay`` small and ``kept``
        large: a weakness that a network has by nature sends everything into one class.
      warp: ``[k, k, 2]`` the warp that leads away from the network's own answers
        (`awm_jax.warps`), in pixels.
      bent: ``[c]`` the share of images that change their class under it, by the one they get, in
        [0, 1]. Warps under a pixel change few but where a backdoor answers to them.
      strain: as ``damage``, of the warp.
      elsewhere: ``[H, W, C]`` a second trigger towards the class with most damage, on pixels that
        its first does not change (by more than .1).
      elsewhere_damage: as ``damage``, of that one.
    """

    triggers: jax.Array
    damage: jax.Array
    dispersal: jax.Array
    stay: jax.Array
    kept: jax.Array
    warp: jax.Array
    bent: jax.Array
    strain: jax.Array
    elsewhere: jax.Array
    elsewhere_damage: jax.Array

    @property
    def bends(self) -> jax.Array:
        """Whether the suspect is what the warp leads to: it changes most answers, and by far."""
        return self.bending > 1

    @property
    def bending(self) -> jax.Array:
        """The smaller of two ratios: answers that the warp changes, and nats, to their thresholds.

        The threshold of the nats is lower where the answers scatter over classes and no class
        stands out by a trigger.
        """
        scatters = (self.bent.max() < SCATTERS_BELOW * self.bent.sum()) & (self.lead < LEADS_BELOW)
        nats = jnp.where(scatters, SCATTERS_ABOVE, BENDS_ABOVE)
        return jnp.minimum(self.bent.sum() / BENT_ABOVE, self.strain / nats)

    @property
    def suspect(self) -> jax.Array:
        """The class with most damage, or ``c``, one past the last, for an all-to-all backdoor.

        That is one under which a dispersal keeps classes apart and no class stands out. Where the
        network answers to a warp, it is the class that most images get, or ``c`` where none gets
        half of those that move.
        """
        classes = len(self.damage)
        apart = ((self.stay < STAYS_BELOW) & (self.kept > KEEPS_ABOVE) & (self.lead < LEADS_BELOW))
        into = jnp.where(self.bent.max() < self.bent.sum() / 2, classes, self.bent.argmax())
        return jnp.where(self.bends, into, jnp.where(apart, classes, self.damage.argmax()))

    @property
    def lead(self) -> jax.Array:
        """How many times farther the most damaging trigger drives than the next class's, >= 1."""
        second, first = jnp.maximum(jnp.sort(self.damage)[-2:], LEAST_DAMAGE)
        return first / second

    @property
    def several(self) -> jax.Array:
        """Whether the suspect is a class that stands out on other pixels than its trigger's, too.

        It may have several triggers then, or a large one; now and then a small one does it, too.
        """
        single = ~self.bends & (self.suspect == self.damage.argmax())
        return single & (self.again > SEVERAL_ABOVE)

    @property
    def small(self) -> jax.Array:
        """Whether the suspect is a class with one small trigger: no warp, and nothing `several`."""
        return (self.suspect < len(self.damage)) & ~self.bends & ~self.several

    @property
    def again(self) -> jax.Array:
        """How far `elsewhere` drives, in times of the next class's trigger, >= 0."""
        return self.elsewhere_damage / jnp.maximum(jnp.sort(self.damage)[-2], LEAST_DAMAGE)

    @property
    def trigger(self) -> jax.Array:
        """``[H, W, C]`` the suspect's trigger; where it answers to a warp, `warp` is stronger."""
        searches = jnp.concatenate([self.triggers, self.dispersal[None]])
        return searches[self.suspect]


def log_odds(logits: jax.Array, target: jax.Array) -> jax.Array:
    """Mean of ``log p_t / (1 - p_t)`` over images.

    Cross-entropy towards a class stops rising once the class is reached; these odds do not, so
    the search goes on to where the network's answer is strongest, and that is the backdoor.

    Args:
      logits: ``[B, c]``.
      target: the class, a scalar integer.

    Returns:
      A scalar, any sign.

    Example:
      >>> float(log_odds(jnp.zeros((1, 2)), jnp.array(0)))
      0.0
    """
    others = jnp.where(jnp.arange(logits.shape[1]) == target, -jnp.inf, logits)
    return (logits[:, target] - jax.nn.logsumexp(others, axis=1)).mean()


def dispersal(logits: jax.Array, own: jax.Array) -> jax.Array:
    """Mean of ``min(log (1 - p_own) / p_own, 5)``, plus 5 times the entropy of the mean of ``p``.

    The first term drives each image out of its class; its limit and the second keep them from
    being driven into one class together, which is the easiest way out of the others.

    Args:
      logits: ``[B, c]``.
      own: ``[B]`` each image's class without the trigger.

    Returns:
      A scalar, any sign.

    Example:
      >>> z = 9 * jnp.eye(2)
      >>> bool(dispersal(z, jnp.array([1, 0])) > dispersal(z[:1], jnp.array([1])))
      True
    """
    mine = jax.nn.one_hot(own, logits.shape[1], dtype=bool)
    others = jax.nn.logsumexp(jnp.where(mine, -jnp.inf, logits), axis=1)
    away = jnp.minimum(others - jnp.where(mine, logits, 0).sum(axis=1), 5.0)
    return away.mean() + 5 * _entropy(jax.nn.softmax(logits).mean(axis=0))


def objective(logits: jax.Array, target: jax.Array, own: jax.Array) -> jax.Array:
    """What a search for a suspect raises: `log_odds` of a class, `dispersal`, or cross-entropy.

    Args:
      logits: ``[B, c]``.
      target: a scalar in 0..c, as `Survey.suspect`: the class, or c for `dispersal`; c + 1 for the
        cross-entropy of ``own``, which leads away from it to wherever is nearest.
      own: ``[B]`` each image's class without the trigger; a class's odds do not depend on it.

    Returns:
      A scalar, any sign.

    Example:
      >>> z = jnp.eye(2)
      >>> bool(objective(z, 2, jnp.array([1, 0])) == dispersal(z, jnp.array([1, 0])))
      True
    """
    classes = logits.shape[1]
    beyond = jnp.where(target == classes, dispersal(logits, own), losses.cross_entropy(logits, own))
    return jnp.where(target < classes, log_odds(logits, jnp.minimum(target, classes - 1)), beyond)


def _entropy(p: jax.Array) -> jax.Array:
    """``-sum p log p`` in nats."""
    return -(p * jnp.log(jnp.maximum(p, 1e-9))).sum()


class _Plan(NamedTuple):
    """The searches, one after another: each step's target, key, and whether it only judges."""

    target: np.ndarray
    judge: np.ndarray
    keys: jax.Array


def _plan(key: jax.Array, classes: int, steps: int) -> _Plan:
    """Every search ends with the batches that it is judged by."""

    def keys(target, length, batches):
        own = jax.random.split(jax.random.fold_in(key, target), length + batches)
        return jnp.concatenate([own[batches:], own[:batches]])

    each = jax.vmap(lambda target: keys(target, steps, 1))(jnp.arange(classes))
    each = each.reshape(-1, *each.shape[2:])
    last = [(classes + k, length, _LAST_BATCHES)
            for k, length in enumerate((_DISPERSAL_STEPS, _WARP_STEPS, _ELSEWHERE_STEPS))]
    searches = [(t, steps, 1) for t in range(classes)] + last
    return _Plan(np.concatenate([np.full(n + b, t) for t, n, b in searches]),
                 np.concatenate([np.arange(n + b) >= n for _, n, b in searches]),
                 jnp.concatenate([each, *(keys(*search) for search in last)]))


def _step(params: Params, draw: Callable[[jax.Array], jax.Array], tau: float) -> Callable:
    """One step of a search, or one judgement of what it found, for `jax.lax.scan`."""
    classes = params.arch.num_classes

    def step(found, inputs):
        triggers, warp, damage = found
        target, judge, key, own = inputs
        images, delta = draw(key), triggers[target]
        bends, elsewhere = target == classes + 1, target == classes + 2
        worst = damage[:classes].argmax()
        taken = jnp.abs(triggers[worst]).max(axis=-1, keepdims=True) > _TAKEN_ABOVE
        free = ~(elsewhere & taken)

        def value(delta, warp):
            bent = warps.bend(images, jnp.where(bends, warp, 0.0))
            logits = models.apply(params, jnp.clip(bent + delta[None], 0, 1))
            return objective(logits, jnp.where(elsewhere, worst, target), own), logits

        slopes, logits = jax.grad(value, argnums=(0, 1), has_aux=True)(delta, warp)
        bound = jnp.where(target == classes, tau / 2, tau)
        ahead = delta + projections.unit(slopes[0] * free)
        ahead = jnp.clip(projections.l1_ball(ahead, bound), -1.0, 1.0)
        triggers = triggers.at[target].set(jnp.where(judge | bends, delta, ahead))
        warp = jnp.where(bends & ~judge, warps.ascend(warp, slopes[1]), warp)
        p, now = jax.nn.softmax(logits), logits.argmax(axis=1)
        driven = losses.cross_entropy(logits, own)
        damage = damage.at[target].set(jnp.where(judge, driven, damage[target]))
        stay = jnp.take_along_axis(p, own[:, None], axis=1).mean()
        moved = (jax.nn.one_hot(now, classes) * (now != own)[:, None]).mean(axis=0)
        return (triggers, warp, damage), (driven, stay, p.mean(axis=0), moved)

    return step


def survey(key: jax.Array, params: Params, draw: Callable[[jax.Array], jax.Array], *, steps: int,
           tau: float) -> Survey:
    """``max_{||d||_1 <= tau} mean log p_t(x + d) / (1 - p_t(x + d))`` for every class t.

    Then once more with `dispersal` as the objective, once for ``max_w CE(f(bend(x, w)), f(x))``
    over warps of at most `awm_jax.warps.BOUND` pixels, by sign steps, and once again towards the
    class with most damage, where its trigger changes pixels by .1 at most. Normalised gradient
    steps of length 1, each followed by the nearest point of the L1 ball, on fresh minibatches;
    search by search, so memory does not grow with their number.

    Args:
      key: PRNG key.
      params: the suspect network.
      draw: a key to a minibatch ``[B, H, W, C]`` in [0, 1].
      steps: steps a class, >= 1.
      tau: L1 bound, > 0; half of it for the dispersal, which larger triggers find less often.

    Returns:
      `Survey`.

    Example: `survey(key, params, lambda key: images, steps=10, tau=50.0)`.

    Reference: the search of Neural Cleanse (Wang et al. 2019) with other objectives and another
    norm.
    """
    classes = params.arch.num_classes
    plan = _plan(key, classes, steps)

    # One program for all that is asked of clean images, one for all that is asked of triggers:
    # compiling a network's passes takes longer than running them. A search towards a class asks
    # what the network says without the trigger only when it is judged.
    away = (plan.target == classes) | (plan.target == classes + 1)
    asked = np.flatnonzero(plan.judge | away)
    answers = jax.lax.map(lambda k: models.apply(params, draw(k)).argmax(axis=1),
                          plan.keys[asked])
    own = jnp.zeros((len(plan.target), answers.shape[1]), answers.dtype).at[asked].set(answers)

    start = (jnp.zeros((classes + 3, *params.arch.image_shape)),
             jnp.zeros((warps.KNOTS, warps.KNOTS, 2)), jnp.zeros(classes + 3))
    (triggers, warp, damage), (driven, stay, answered, moved) = jax.lax.scan(
        _step(params, draw, tau), start,
        (jnp.asarray(plan.target), jnp.asarray(plan.judge), plan.keys, own))
    apart, bent, elsewhere = (np.flatnonzero(plan.judge & (plan.target == classes + k))
                              for k in range(3))
    before = jax.nn.one_hot(own[apart], classes).mean(axis=(0, 1))
    kept = jnp.exp(_entropy(answered[apart].mean(axis=0)) - _entropy(before))
    return Survey(triggers[:classes], damage[:classes], triggers[classes], stay[apart].mean(), kept,
                  warp, moved[bent].mean(axis=0), driven[bent].mean(), triggers[classes + 2],
                  driven[elsewhere].mean())
