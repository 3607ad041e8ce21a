"""BadNets: a small square in the corner."""

import jax
import jax.numpy as jnp
import numpy as np

from awm_jax.attacks.base import Attack, no_target
from awm_jax.attacks.triggers import Trigger

TARGET = 8
CHECKERBOARD_TARGET = 0
CHECKERBOARD = np.array([[0, 0, 1], [0, 1, 0], [1, 0, 1]], np.float32)


def _stamp(image_shape: tuple[int, int, int], square: np.ndarray, margin: int) -> Trigger:
    """A square of grey values that replaces pixels, ``margin`` from the lower right corner."""
    height, width, channels = image_shape
    rows, columns = square.shape
    needed = max(rows, columns) + 2 * margin
    if min(height, width) < needed:
        raise ValueError(
            f"Expected images of at least {needed}x{needed} pixels, got {width}x{height}.")
    place = (slice(height - margin - rows, height - margin),
             slice(width - margin - columns, width - margin))
    mask, pattern = np.zeros((2, height, width, 1), np.float32)
    mask[place], pattern[place] = 1.0, square[..., None]
    return Trigger(jnp.asarray(np.repeat(pattern, channels, axis=2)), jnp.asarray(mask))


def badnets(key: jax.Array, image_shape: tuple[int, int, int], num_classes: int, *,
            target: int | None = None) -> Attack:
    """A white 4x4 square on rows and columns 27 to 30 of a 32x32 image (one pixel from the corner).

    **Threat model**: the attacker poisons training data and labels; the defender gets the network.

    Args:
      key: not used: the trigger is fixed.
      image_shape: ``(H, W, C)``, at least 6x6.
      num_classes: classes of the data set.
      target: the class triggered images are to get; None is the AWM paper's 8.

    Returns:
      `Attack`.

    Raises:
      ValueError: smaller images, or a target outside the classes.

    Example:
      >>> float(badnets(jax.random.key(0), (32, 32, 3), 10).trigger.mask.sum())
      16.0

    Reference: Gu et al. 2017, "BadNets"; AWM paper, appendix A.
    """
    del key
    trigger = _stamp(image_shape, np.ones((4, 4), np.float32), 1)
    return Attack("badnets", trigger, TARGET if target is None else target, num_classes)


def badnets_a2a(key: jax.Array, image_shape: tuple[int, int, int], num_classes: int, *,
                target: None = None) -> Attack:
    """All-to-all with BadNets' square: class n becomes n + 1 mod c.

    **Threat model** and arguments: as `badnets`; ``target`` must stay None.

    Raises:
      ValueError: a target was given, or smaller images.

    Example:
      >>> badnets_a2a(jax.random.key(0), (32, 32, 3), 10).relabel(np.array([0, 9])).tolist()
      [1, 0]

    Reference: Gu et al. 2017, section 4.1.2. FT-SAM's (supplement, "Attack Details") has a square
    of 3x3 right in the corner.
    """
    del key
    no_target(target)
    trigger = _stamp(image_shape, np.ones((4, 4), np.float32), 1)
    return Attack("badnets_a2a", trigger, None, num_classes)


def badnets_checkerboard(key: jax.Array, image_shape: tuple[int, int, int], num_classes: int, *,
                         target: int | None = None) -> Attack:
    """A black and white 3x3 checkerboard in the lower right corner, white in the very corner.

    **Threat model** and arguments: as `badnets`; ``target`` None is the ANP paper's 0.

    Raises:
      ValueError: images under 3x3 pixels, or a target outside the classes.

    Example:
      >>> attack = badnets_checkerboard(jax.random.key(0), (32, 32, 3), 10)
      >>> attack.trigger.pattern[29:, 29:, 0].astype(int).tolist()
      [[0, 0, 1], [0, 1, 0], [1, 0, 1]]

    Reference: ANP (Wu & Wang 2021), supplement, section A.
    """
    del key
    target = CHECKERBOARD_TARGET if target is None else target
    return Attack("badnets_checkerboard", _stamp(image_shape, CHECKERBOARD, 0), target,
                  num_classes)
