"""Random changes of images on the device, without a convolution or a Python loop."""

import jax
import jax.numpy as jnp


def crop_flip(key: jax.Array, images: jax.Array, *, pad: int = 4, flip: bool) -> jax.Array:
    """Shifts each image by up to ``pad`` pixels and, if asked, mirrors half of them.

    The border is filled with the nearest pixel.

    Args:
      key: PRNG key.
      images: ``[B, H, W, C]`` floats.
      pad: largest shift, >= 0.
      flip: mirror each image with probability one half.

    Returns:
      ``[B, H, W, C]``.

    Example:
      >>> crop_flip(jax.random.key(0), jnp.ones((2, 8, 8, 3)), flip=True).shape
      (2, 8, 8, 3)
    """
    count, height, width, _ = images.shape
    key_shift, key_flip = jax.random.split(key)
    shifts = jax.random.randint(key_shift, (2, count, 1), -pad, pad + 1)
    rows = jnp.clip(jnp.arange(height)[None, :] + shifts[0], 0, height - 1)
    columns = jnp.clip(jnp.arange(width)[None, :] + shifts[1], 0, width - 1)
    if flip:
        mirrored = jax.random.bernoulli(key_flip, 0.5, (count, 1))
        columns = jnp.where(mirrored, columns[:, ::-1], columns)
    images = jnp.take_along_axis(images, rows[:, :, None, None], axis=1)
    return jnp.take_along_axis(images, columns[:, None, :, None], axis=2)


def strong(key: jax.Array, images: jax.Array, *, flip: bool) -> jax.Array:
    """Zooms, stretches, turns, moves and recolours each image, and mirrors half of them if asked.

    ``y(p) = g (x(A p + t) - .5) + .5 + o``, clipped to [0, 1]: A zooms by ``exp(u)``, u uniform in
    [-1, .25] (in to a third of the width, out by a quarter), stretches one side and shrinks the
    other by up to a quarter and turns by up to .5 radians (.2 without flips, as digits and signs
    turned farther are others); t stays within what the zoom cuts off and 4 pixels; contrast g and
    brightness o change by up to .24 and .15 for all channels together and .16 and .06 for each.
    Bilinear, the border mirrored. The label may not survive: for matching another network's
    outputs.

    Args:
      key: PRNG key.
      images: ``[B, H, W, C]`` in [0, 1].
      flip: mirror each image with probability one half.

    Returns:
      ``[B, H, W, C]`` in [0, 1].

    Example:
      >>> out = strong(jax.random.key(0), jnp.full((2, 8, 8, 3), .5), flip=True)
      >>> out.shape, bool((out.std(axis=(1, 2)) < 1e-6).all())
      ((2, 8, 8, 3), True)

    Reference: of distilling on such views of few images, Asano & Saeed 2023, "The Augmented Image
    Prior".
    """
    key_place, key_colour = jax.random.split(key)
    return _recoloured(key_colour, _moved(key_place, images, flip))


def _moved(key: jax.Array, images: jax.Array, flip: bool) -> jax.Array:
    """Bilinear samples at affine places."""
    count, height, width, channels = images.shape
    draw = jax.random.uniform(key, (6, count), minval=-1.0)
    zoom = jnp.exp(-0.375 + 0.625 * draw[0])
    stretch, turn = jnp.exp(0.25 * draw[1]), (0.5 if flip else 0.2) * draw[2]
    side = jnp.where(draw[5] < 0, -1.0, 1.0) if flip else jnp.ones(count)
    cut = jnp.maximum(1 - zoom, 0) / 2
    y, x = jnp.meshgrid(jnp.arange(height) - (height - 1) / 2, jnp.arange(width) - (width - 1) / 2,
                        indexing="ij")

    def one(image, zoom, stretch, turn, side, down, right):
        columns = side * (jnp.cos(turn) * zoom * stretch * x - jnp.sin(turn) * zoom * y)
        rows = jnp.sin(turn) * zoom * x + jnp.cos(turn) * zoom / stretch * y
        at = [rows + down + (height - 1) / 2, columns + right + (width - 1) / 2]
        return jnp.stack([jax.scipy.ndimage.map_coordinates(image[..., c], at, 1, mode="mirror")
                          for c in range(channels)], axis=-1)

    return jax.vmap(one)(images, zoom, stretch, turn, side, draw[3] * (cut * height + 4),
                         draw[4] * (cut * width + 4))


def _recoloured(key: jax.Array, images: jax.Array) -> jax.Array:
    """Contrast and brightness, of all channels together and of each."""
    count, _, _, channels = images.shape
    both, each = jax.random.split(key)
    both = jax.random.uniform(both, (2, count, 1, 1, 1), minval=-1.0)
    each = jax.random.uniform(each, (2, count, 1, 1, channels), minval=-1.0)
    gain = 1 + 0.24 * both[0] + 0.16 * each[0]
    return jnp.clip((images - 0.5) * gain + 0.5 + 0.15 * both[1] + 0.06 * each[1], 0, 1)
