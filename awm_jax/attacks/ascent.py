"""Patterns found by gradient ascent on what a network sees of a class."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from awm_jax import models
from awm_jax.types import Params

STEPS = 100
STEP = 0.1


@functools.partial(jax.jit, static_argnames=("project", "apply_fn", "replace", "target"))
def ascend(params: Params, images: jax.Array, start: jax.Array, support: jax.Array, *, target: int,
           project: Callable[[jax.Array], jax.Array], replace: bool,
           apply_fn: Callable = models.apply) -> jax.Array:
    """Raises the target's logit over a batch by 100 normalised steps on a pattern.

    ``d <- project(support * (d + .1 * sqrt(n) g / ||g||))`` with g the gradient of the mean logit
    of the target minus the mean logit, n the number of values in the support.

    Args:
      params: a network trained by the attacker.
      images: ``[B, H, W, C]`` float32 in [0, 1].
      start: ``[H, W, C]`` first pattern.
      support: ``[H, W, 1]`` in {0, 1}: where it may be non-zero.
      target: class whose logit rises.
      project: keeps the pattern valid, ``[H, W, C] -> [H, W, C]``.
      replace: the pattern replaces pixels instead of being added to them.
      apply_fn: ``(params, images) -> logits``.

    Returns:
      ``[H, W, C]`` the pattern after the last step.

    Reference: Liu et al. 2018, "Trojaning Attack on Neural Networks", section IV (there the raised
    neuron is chosen in an inner layer; here it is the target's logit, which those neurons feed).
    """
    values = support.sum() * start.shape[-1]

    def objective(pattern):
        base = images * (1 - support[None]) if replace else images
        logits = apply_fn(params, jnp.clip(base + pattern[None], 0.0, 1.0))
        return (logits[:, target] - logits.mean(axis=1)).mean()

    def step(pattern, _):
        gradient = jax.grad(objective)(pattern) * support
        norm = jnp.sqrt((gradient**2).sum())
        move = STEP * jnp.sqrt(values) * gradient / jnp.where(norm > 0, norm, 1.0)
        return project(support * (pattern + move)), None

    return jax.lax.scan(step, project(support * start), None, length=STEPS)[0]


def unit_box(pattern: jax.Array) -> jax.Array:
    """Values clipped to [0, 1]."""
    return jnp.clip(pattern, 0.0, 1.0)


def with_l2(pattern: jax.Array, norm: float) -> jax.Array:
    """The pattern rescaled to an L2 norm; zero stays zero."""
    found = jnp.sqrt((pattern**2).sum())
    return pattern * jnp.where(found > 0, norm / jnp.where(found > 0, found, 1.0), 0.0)
