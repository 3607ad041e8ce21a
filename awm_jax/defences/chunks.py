"""A function of images over more of them than one pass should hold."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp


def over_images(fun: Callable[[jax.Array], Any], images: jax.Array, size: int = 250) -> Any:
    """``fun(images)``, computed for at most ``size`` images at a time, as one loop.

    Args:
      fun: ``[B, H, W, C]`` floats in [0, 1] to a tree of arrays ``[B, ...]``.
      images: ``[N, H, W, C]``, uint8 in 0..255 or floats in [0, 1], N >= 1.
      size: images at a time, >= 1.

    Returns:
      A tree of arrays ``[N, ...]``.

    Example:
      >>> images = jnp.full((4, 1, 1, 1), 255, jnp.uint8)
      >>> over_images(lambda x: x.sum(axis=(1, 2, 3)), images, 3).tolist()
      [1.0, 1.0, 1.0, 1.0]
    """
    count = len(images)
    steps = -(-count // size)
    even = -(-count // steps)
    order = (jnp.arange(steps * even) % count).reshape(steps, even)

    def one(picks):
        batch = images[picks]
        return fun(batch.astype(jnp.float32) / 255.0 if batch.dtype == jnp.uint8 else batch)

    out = jax.lax.map(one, order)
    return jax.tree.map(lambda leaf: leaf.reshape(steps * even, *leaf.shape[2:])[:count], out)


def mean(fun: Callable[..., Any], batch: Sequence[jax.Array], size: int) -> Any:
    """``fun(*batch)`` of a function that averages over its images, from equal parts of them.

    ``1/P sum_p fun(*part_p)``: the memory of one part, and the same result but for rounding.

    Args:
      fun: arrays ``[b, ...]`` to a tree of floats, each a mean over b, or independent of it.
      batch: arrays ``[B, ...]``, B >= 1.
      size: most images a part, >= 1; parts are as large as a divisor of B allows, and of at least
        half that size, else everything is one part.

    Returns:
      The tree.

    Example:
      >>> mean(lambda x: {'mean': x.mean(), 'parts': len(x) + 0.0}, [jnp.arange(6.)], 4)
      {'mean': Array(2.5, dtype=float32), 'parts': Array(3., dtype=float32)}
    """
    count = len(batch[0])
    even = max(n for n in range(1, min(size, count) + 1) if count % n == 0)
    if even == count or 2 * even < size:
        return fun(*batch)
    parts = [v.reshape(count // even, even, *v.shape[1:]) for v in batch]
    start = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype),
                         jax.eval_shape(fun, *(v[0] for v in parts)))
    total, _ = jax.lax.scan(
        lambda total, part: (jax.tree.map(jnp.add, total, fun(*part)), None), start, parts)
    return jax.tree.map(lambda leaf: leaf / (count // even), total)
