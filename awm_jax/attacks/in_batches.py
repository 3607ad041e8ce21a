"""Poisoning anew in every batch, for attacks whose attacker controls the training."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from awm_jax import validate
from awm_jax.attacks.base import Attack, relabel
from awm_jax.attacks.triggers import Transform
from awm_jax.types import Params


class State(NamedTuple):
    """What the attacker carries from batch to batch; a tree of arrays.

    Args:
      trigger: as it stands.
      learner: the state of the optimiser that improves it; ``()`` where it is fixed.
    """

    trigger: Transform
    learner: Any = ()


@dataclasses.dataclass(frozen=True)
class InBatches:
    """What `awm_jax.training` lets an attacker do to each batch; hashable, so static in `jit`.

    The first ``poisoned`` images get the trigger and the attacker's labels, the next ``covered``
    ones the trigger's ``cover`` with their own labels. Batches are drawn at random, so these are
    random images; one that is of the target class already may be among them.

    Args:
      target: the attacker's class; None is all-to-all.
      num_classes: c.
      poisoned: images of a batch, >= 1.
      covered: further images, >= 0.
      learn: puts the trigger and its cover on their images, and improves the trigger on the network
        as it stands: ``(plan, state, params, images, labels) -> (state, changed)``; None leaves it.
    """

    target: int | None
    num_classes: int
    poisoned: int
    covered: int
    learn: Callable[..., tuple[State, jax.Array]] | None = None

    def __call__(self, key: jax.Array, state: State, params: Params, images: jax.Array,
                 labels: jax.Array) -> tuple[State, jax.Array, jax.Array]:
        """``(state, images, labels)`` of ``[B, H, W, C]`` images in [0, 1] and ``[B]`` labels."""
        first, last = self.poisoned, self.poisoned + self.covered
        if self.learn is not None:
            state, changed = self.learn(self, state, params, images, labels)
        else:
            changed = state.trigger(images[:first])
            if self.covered:
                covered = state.trigger.cover(key, images[first:last])  # type: ignore[attr-defined]
                changed = jnp.concatenate([changed, covered])
        wanted = relabel(labels[:first], self.target, self.num_classes)
        return (state, jnp.concatenate([changed, images[last:]]),
                jnp.concatenate([wanted, labels[first:]]))


def in_batches(attack: Attack, rate: float, batch_size: int) -> InBatches:
    """How many images of each batch an attack changes: ``round(rate * B)``, at least one.

    Args:
      attack: one with ``every_batch``.
      rate: share of a batch that is poisoned, in (0, 1].
      batch_size: B.

    Returns:
      `InBatches`.

    Raises:
      ValueError: an attack that poisons once, a rate outside (0, 1], or a batch without room for
        the poisoned and covered images.

    Example:
      >>> from awm_jax.attacks.wanet import wanet
      >>> plan = in_batches(wanet(jax.random.key(0), (32, 32, 3), 10), .1, 32)
      >>> plan.poisoned, plan.covered
      (3, 6)
    """
    validate.positive(rate=rate)
    validate.between(0.0, 1.0, rate=rate)
    if not attack.every_batch:
        raise ValueError(f"Expected an attack that poisons every batch anew, got {attack.name}. "
                         "Use awm_jax.attacks.poison.")
    poisoned = max(round(rate * batch_size), 1)
    covered = round(attack.cover_ratio * poisoned)
    if poisoned + covered > batch_size:
        raise ValueError(f"Expected rate={rate} to leave room for {covered} images of "
                         f"{attack.name}'s cover in a batch of {batch_size}, it poisons "
                         f"{poisoned}. Lower the rate.")
    return InBatches(attack.target, attack.num_classes, poisoned, covered, attack.learn)
