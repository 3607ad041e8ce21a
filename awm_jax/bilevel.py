"""The one inner-maximise, outer-minimise scan that min-max defences share."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

Tree = Any


class Problem(NamedTuple):
    """A min-max problem ``min_m max_d L(m, d)`` as four pure functions.

    Args:
      start: ``(key, epoch, outer) -> inner``: the adversary before its first step.
      ascend: ``(key, epoch, inner, outer) -> inner``: one step of the adversary.
      settle: ``(epoch, inner) -> inner``: applied once after the last ascent.
      descend: ``(key, epoch, inner, outer) -> (outer, info)``: one step of the defender.
    """

    start: Callable[..., Tree]
    ascend: Callable[..., Tree]
    settle: Callable[..., Tree]
    descend: Callable[..., tuple[Tree, Tree]]


def epoch(problem: Problem, key: jax.Array, index: jax.Array, outer: Tree, *, inner_steps: int,
          outer_steps: int) -> tuple[Tree, Tree, Tree]:
    """One alternation: ``inner_steps`` ascents from a fresh start, then ``outer_steps`` descents.

    Args:
      problem: the functions.
      key: PRNG key of this epoch.
      index: the epoch's number, from 0.
      outer: the defender's state.
      inner_steps: ascents, >= 1.
      outer_steps: descents, >= 1.

    Returns:
      ``(outer, inner, info)``: the new state, the adversary it was trained against, and the
      defender's info of every descent, stacked.

    Example: see `awm_jax.defences.awm_steps`, whose epoch this is.

    Reference: AWM paper, Algorithm 1.
    """
    key_start, key_inner, key_outer = jax.random.split(key, 3)
    inner = problem.start(key_start, index, outer)

    def ascend(inner, key):
        return problem.ascend(key, index, inner, outer), None

    inner, _ = jax.lax.scan(ascend, inner, jax.random.split(key_inner, inner_steps))
    inner = problem.settle(index, inner)

    def descend(outer, key):
        return problem.descend(key, index, inner, outer)

    outer, info = jax.lax.scan(descend, outer, jax.random.split(key_outer, outer_steps))
    return outer, inner, info
