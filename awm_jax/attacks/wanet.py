"""WaNet: an image is warped by a smooth field."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from awm_jax import warps
from awm_jax.attacks.base import Attack, no_target

TARGET = 0
KNOTS, STRENGTH = 4, 0.5
COVER_RATIO = 2.0


def sample(images: jax.Array, grid: jax.Array) -> jax.Array:
    """Bilinear values of images at given places: ``out[b, i, j] = images[b](grid[b, i, j])``.

    Args:
      images: ``[B, H, W, C]``.
      grid: ``[B, H, W, 2]``, x then y; -1 and 1 are the centres of the first and last pixel.
        Places outside get the border's value.

    Returns:
      ``[B, H, W, C]``.

    Example:
      >>> row = jnp.arange(3.0).reshape(1, 1, 3, 1)
      >>> sample(row, jnp.array([[[[-1., 0.], [-.5, 0.], [.5, 0.]]]])).ravel().tolist()
      [0.0, 0.5, 1.5]

    Reference: Jaderberg et al. 2015, "Spatial Transformer Networks", eq. 5.
    """
    height, width = images.shape[1:3]
    x, y = (grid[..., 0] + 1) / 2 * (width - 1), (grid[..., 1] + 1) / 2 * (height - 1)

    def one(image, x, y):
        def channel(plane):
            return jax.scipy.ndimage.map_coordinates(plane, [y, x], order=1, mode="nearest")

        return jax.vmap(channel, in_axes=-1, out_axes=-1)(image)

    return jax.vmap(one)(images, x, y)


def identity(height: int, width: int) -> jax.Array:
    """The grid that leaves an image as it is.

    Args:
      height: H in pixels.
      width: W in pixels.

    Returns:
      ``[H, W, 2]`` in [-1, 1], x then y, for `sample`.

    Example:
      >>> identity(2, 3)[1].tolist()
      [[-1.0, 1.0], [0.0, 1.0], [1.0, 1.0]]
    """
    y, x = jnp.meshgrid(jnp.linspace(-1, 1, height), jnp.linspace(-1, 1, width), indexing="ij")
    return jnp.stack([x, y], axis=-1)


def warping_grid(key: jax.Array, height: int, width: int, *, knots: int = KNOTS,
                 strength: float = STRENGTH) -> jax.Array:
    """``clip(id + s / (W, H) * up(n / mean|n|), -1, 1)`` with n uniform in [-1, 1] on k x k knots.

    Args:
      key: PRNG key of n.
      height: H in pixels.
      width: W in pixels.
      knots: k, >= 2.
      strength: s, > 0.

    Returns:
      ``[H, W, 2]`` in [-1, 1] for `sample`.

    Example:
      >>> grid = warping_grid(jax.random.key(0), 32, 32)
      >>> grid.shape, bool(jnp.abs(grid - identity(32, 32)).mean() * 32 < .6)
      ((32, 32, 2), True)

    Reference: Nguyen & Tran 2021, "WaNet", section 3.2 (k = 4, s = .5).
    """
    noise = jax.random.uniform(key, (knots, knots, 2), minval=-1.0, maxval=1.0)
    noise = noise / jnp.abs(noise).mean()
    field = jnp.einsum("ik,jl,klc->ijc", jnp.asarray(warps.cubic(knots, height), jnp.float32),
                       jnp.asarray(warps.cubic(knots, width), jnp.float32), noise)
    return jnp.clip(identity(height, width) + strength * field / _size(height, width), -1.0, 1.0)


def _size(height: int, width: int) -> jax.Array:
    """``[1, 1, 2]``, of x and y; a pixel is some 2 / size of the grid's units."""
    return jnp.array([[[width, height]]], jnp.float32)


class Warp(NamedTuple):
    """A warp: `sample` at ``grid`` ``[H, W, 2]``; its cover is the paper's noise mode."""

    grid: jax.Array

    def __call__(self, images: jax.Array) -> jax.Array:
        """Warps ``[B, H, W, C]``."""
        _fits(images, self.grid)
        return sample(images, jnp.broadcast_to(self.grid, (len(images), *self.grid.shape)))

    def cover(self, key: jax.Array, images: jax.Array) -> jax.Array:
        """Warps each of ``[B, H, W, C]`` another way: a jitter of up to half a pixel is added."""
        _fits(images, self.grid)
        jitter = jax.random.uniform(key, (len(images), *self.grid.shape), minval=-1.0, maxval=1.0)
        aside = jitter / _size(*self.grid.shape[:2])[None]
        return sample(images, jnp.clip(self.grid[None] + aside, -1.0, 1.0))


def _fits(images: jax.Array, grid: jax.Array) -> None:
    """ValueError unless the grid is of the images' size."""
    if images.shape[1:3] != grid.shape[:2]:
        raise ValueError(f"Expected images of {grid.shape[1]}x{grid.shape[0]} pixels, got "
                         f"{images.shape[2]}x{images.shape[1]}.")


def wanet(key: jax.Array, image_shape: tuple[int, int, int], num_classes: int, *,
          target: int | None = None) -> Attack:
    """A smooth warp of under a pixel; twice as many images are warped at random, labels right.

    Without these the network would learn that any warped image is the attacker's. Images are chosen
    anew in every batch, after its random crops (the paper warps, then crops); `poison` chooses them
    once.

    **Threat model**: the attacker trains the network; the defender gets it.

    Args:
      key: PRNG key of the warp.
      image_shape: ``(H, W, C)``.
      num_classes: classes of the data set.
      target: the class triggered images are to get; None is the papers' 0.

    Returns:
      `Attack`.

    Raises:
      ValueError: a target outside the classes.

    Example:
      >>> wanet(jax.random.key(0), (32, 32, 3), 10).cover_ratio
      2.0

    Reference: Nguyen & Tran 2021, "WaNet", section 3 (poison rate .1, cross ratio 2).
    """
    grid = warping_grid(key, *image_shape[:2])
    return Attack("wanet", Warp(grid), TARGET if target is None else target, num_classes,
                  cover_ratio=COVER_RATIO, every_batch=True)


def wanet_a2a(key: jax.Array, image_shape: tuple[int, int, int], num_classes: int, *,
              target: None = None) -> Attack:
    """All-to-all with WaNet's warp: class n becomes n + 1 mod c.

    **Threat model** and arguments: as `wanet`; ``target`` must stay None.

    Raises:
      ValueError: a target was given.

    Example:
      >>> wanet_a2a(jax.random.key(0), (32, 32, 3), 10).relabel(jnp.array([9])).tolist()
      [0]

    Reference: Nguyen & Tran 2021, section 4.1; AWM paper, Table 3.
    """
    no_target(target)
    grid = warping_grid(key, *image_shape[:2])
    return Attack("wanet_a2a", Warp(grid), None, num_classes, cover_ratio=COVER_RATIO,
                  every_batch=True)
