"""Blended injection: noise over the whole image, mixed in."""

import jax
import jax.numpy as jnp

from awm_jax.attacks.base import Attack
from awm_jax.attacks.triggers import blend

TARGET = 0
RATIO = 0.2


def blended(key: jax.Array, image_shape: tuple[int, int, int], num_classes: int, *,
            target: int | None = None) -> Attack:
    """Uniform noise in [0, 1] over the whole image, a fifth of the mixture.

    **Threat model**: the attacker poisons training data and labels; the defender gets the network.

    Args:
      key: PRNG key of the noise.
      image_shape: ``(H, W, C)``.
      num_classes: classes of the data set.
      target: the class triggered images are to get; None is the papers' 0.

    Returns:
      `Attack`.

    Raises:
      ValueError: a target outside the classes.

    Example:
      >>> attack = blended(jax.random.key(0), (32, 32, 3), 10)
      >>> bool(jnp.isclose(attack.apply(jnp.zeros((1, 32, 32, 3))).max(), .2, atol=1e-3))
      True

    Reference: Chen et al. 2017; ANP (Wu & Wang 2021), supplement, section A.
    """
    trigger = blend(jax.random.uniform(key, image_shape), RATIO)
    return Attack("blended", trigger, TARGET if target is None else target, num_classes)


def blended_gaussian(key: jax.Array, image_shape: tuple[int, int, int], num_classes: int, *,
                     target: int | None = None) -> Attack:
    """Gaussian noise over the whole image, a fifth of the mixture, at a poison rate of 1%.

    The noise is clipped to [0, 1]; its mean of .5 and deviation of .25 are ours: the paper does not
    name them. **Threat model**, arguments, errors: as `blended`.

    Example:
      >>> blended_gaussian(jax.random.key(0), (32, 32, 3), 10).target
      0

    Reference: AWM paper, section 5.2 ("gaussian noise (poison rate = 1%)").
    """
    noise = jnp.clip(0.5 + 0.25 * jax.random.normal(key, image_shape), 0.0, 1.0)
    return Attack("blended_gaussian", blend(noise, RATIO), TARGET if target is None else target,
                  num_classes)
