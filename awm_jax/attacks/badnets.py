"""BadNets: a small white square."""

import jax
import jax.numpy as jnp

from awm_jax.attacks.base import Attack, Trigger

TARGET = 8


def badnets(key: jax.Array, image_shape: tuple[int, int, int], num_classes: int, *, params=None,
            images=None, target: int | None = None, apply_fn=None) -> Attack:
    """A white 4x4 square on rows and columns 27 to 30 of a 32x32 image (one pixel from the corner).

    **Threat model**: the attacker poisons training data and labels; the defender gets the network.

    Args:
      key: not used: the trigger is fixed.
      image_shape: ``(H, W, C)``, at least 6x6.
      num_classes: classes of the data set.
      params: not used.
      images: not used.
      target: the class triggered images are to get; None is the AWM paper's 8.
      apply_fn: not used.

    Returns:
      `Attack`.

    Raises:
      ValueError: smaller images, or a target outside the classes.

    Example:
      >>> float(badnets(jax.random.key(0), (32, 32, 3), 10).trigger.mask.sum())
      16.0

    Reference: Gu et al. 2017, "BadNets"; AWM paper, appendix A.
    """
    del key, params, images, apply_fn
    height, width, channels = image_shape
    if min(height, width) < 6:
        raise ValueError(f"Expected images of at least 6x6 pixels, got {width}x{height}.")
    target = TARGET if target is None else target
    mask = jnp.zeros((height, width, 1)).at[height - 5 : height - 1, width - 5 : width - 1].set(1.0)
    return Attack("badnets", Trigger(mask * jnp.ones((1, 1, channels)), mask), target, num_classes)
