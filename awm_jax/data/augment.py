"""Random crops and flips on the device, without a convolution or a Python loop."""

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
