"""Images made of two: more to learn from when there are only a few."""

import jax
import jax.numpy as jnp


def mix(key: jax.Array, images: jax.Array, *, boxes: bool = False) -> jax.Array:
    """A third of the images each: left alone, blended with a partner, cut together with one.

    Blending is ``l x + (1 - l) x'`` with l uniform in [0, 1] (MixUp with alpha = 1); cutting takes
    the columns left of a uniform position from x and the rest from x' (CutMix along one axis). No
    label is returned: the result is for matching another network's outputs.

    Args:
      key: PRNG key.
      images: ``[B, H, W, C]``.
      boxes: cut a rectangle out of x' instead, each side a quarter to seven eighths of the image's,
        anywhere inside it (CutMix along both axes).

    Returns:
      ``[B, H, W, C]``, within the range of the input.

    Example:
      >>> mix(jax.random.key(0), jnp.ones((4, 8, 8, 3))).shape
      (4, 8, 8, 3)

    Reference: Zhang et al. 2018 (MixUp), Yun et al. 2019 (CutMix).
    """
    key_partner, key_share, key_cut, key_kind = jax.random.split(key, 4)
    count, width = images.shape[0], images.shape[2]
    partners = images[jax.random.permutation(key_partner, count)]
    share = jax.random.uniform(key_share, (count, 1, 1, 1), images.dtype)
    blended = share * images + (1 - share) * partners
    if boxes:
        cut = jnp.where(_boxes(key_cut, images.shape)[..., None], partners, images)
    else:
        position = jax.random.randint(key_cut, (count, 1, 1, 1), 0, width)
        cut = jnp.where(jnp.arange(width).reshape(1, 1, width, 1) < position, images, partners)
    kind = jax.random.randint(key_kind, (count, 1, 1, 1), 0, 3)
    return jnp.where(kind == 0, images, jnp.where(kind == 1, blended, cut))


def _boxes(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """``[B, H, W]`` for such images: whether a pixel lies in its image's rectangle."""
    count, height, width, _ = shape

    def along(key: jax.Array, size: int) -> jax.Array:
        key_length, key_first = jax.random.split(key)
        length = size * jax.random.uniform(key_length, (count, 1), minval=0.25, maxval=0.875)
        first = (size - length) * jax.random.uniform(key_first, (count, 1))
        at = jnp.arange(size)[None] + 0.5
        return (first <= at) & (at < first + length)

    key_rows, key_columns = jax.random.split(key)
    rows, columns = along(key_rows, height), along(key_columns, width)
    return rows[:, :, None] & columns[:, None, :]


def mixup(key: jax.Array, images: jax.Array, labels: jax.Array,
          num_classes: int) -> tuple[jax.Array, jax.Array]:
    """``l x + (1 - l) x'`` and ``l y + (1 - l) y'`` with l uniform in [0, 1].

    Args:
      key: PRNG key of partners and shares.
      images: ``[B, H, W, C]``.
      labels: ``[B]`` integers.
      num_classes: c.

    Returns:
      ``(images [B, H, W, C], probabilities [B, c])``.

    Example:
      >>> found = mixup(jax.random.key(0), jnp.ones((2, 4, 4, 1)), jnp.array([0, 2]), 3)
      >>> [part.shape for part in found]
      [(2, 4, 4, 1), (2, 3)]

    Reference: Zhang et al. 2018, "mixup: Beyond empirical risk minimization", with alpha = 1.
    """
    key_partner, key_share = jax.random.split(key)
    partners = jax.random.permutation(key_partner, len(images))
    share = jax.random.uniform(key_share, (len(images),), images.dtype)
    wide, narrow = share[:, None, None, None], share[:, None]
    hot = jax.nn.one_hot(labels, num_classes, dtype=images.dtype)
    return (wide * images + (1 - wide) * images[partners],
            narrow * hot + (1 - narrow) * hot[partners])
