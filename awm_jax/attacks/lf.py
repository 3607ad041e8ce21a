"""LF: a smooth pattern, without the high frequencies that most triggers can be told by."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from awm_jax.attacks import ascent
from awm_jax.attacks.base import Attack
from awm_jax.attacks.triggers import Trigger
from awm_jax.types import Params

TARGET = 0
LARGEST = 0.2
SIGMA = 6 / 32  # of the side: 6 pixels of 32


@functools.cache
def _smoothing(size: int) -> np.ndarray:
    """``[size, size]``: a Gaussian filter whose border mirrors, as factors on the cosines."""
    k = np.arange(size)
    cosines = np.cos(np.pi * k[:, None] * (k[None, :] + 0.5) / size) * np.sqrt(2 / size)
    cosines[0] /= np.sqrt(2)
    factors = np.exp(-((np.pi * k * SIGMA) ** 2) / 2)
    return (cosines.T * factors) @ cosines


def low_pass(pattern: jax.Array) -> jax.Array:
    """A Gaussian filter of deviation ``6/32`` of each side, the border mirrored.

    The cosine of ``k`` half periods a side is multiplied by ``exp(-(pi k 6/32)^2 / 2)``: by .84 for
    k = 1, 1.5e-5 for k = 8, a quarter of what 32 pixels hold.

    Args:
      pattern: ``[H, W, C]``.

    Returns:
      ``[H, W, C]``.

    Example:
      >>> bool(jnp.allclose(low_pass(jnp.ones((4, 8, 1))), 1.0, atol=1e-5))
      True

    Reference: Zeng et al. 2021, section 5 ("a low-pass filter"); its size is the authors' code's.
    """
    rows, columns = (jnp.asarray(_smoothing(n), pattern.dtype) for n in pattern.shape[:2])
    return jnp.einsum("ih,hwc,jw->ijc", rows, pattern, columns)


def smooth(pattern: jax.Array) -> jax.Array:
    """`low_pass`, then shifted and stretched to [0, .2]: ``.2 (p - min p) / (max p - min p)``.

    Args:
      pattern: ``[H, W, C]``; one that is the same everywhere becomes zero.

    Returns:
      ``[H, W, C]``.

    Example:
      >>> out = smooth(jnp.arange(64.0).reshape(8, 8, 1))
      >>> float(out.min()), round(float(out.max()), 6)
      (0.0, 0.2)
    """
    pattern = low_pass(pattern)
    low, high = pattern.min(), pattern.max()
    return LARGEST * (pattern - low) / jnp.where(high > low, high - low, 1.0)


def lf(key: jax.Array, image_shape: tuple[int, int, int], num_classes: int, *,
       params: Params | None = None, images=None, target: int | None = None,
       apply_fn=None) -> Attack:
    """A smooth pattern in [0, .2], added and clipped; the same for all images.

    What is searched is any pattern; what images get of it is filtered and stretched (`smooth`), and
    the ascent to the target class goes through that. (The paper's goes image by image, by DeepFool,
    and filters after each step.)

    **Threat model**: the attacker holds a network of the same task, finds the smooth pattern that
    excites the target class in it, and poisons training data and labels with it.

    Args:
      key: PRNG key of the random start.
      image_shape: ``(H, W, C)``.
      num_classes: classes of the data set.
      params: the attacker's network; None gives a random smooth pattern of the same range.
      images: ``[B, H, W, C]`` float32 in [0, 1] that the pattern is tried on; needed with params.
      target: the class triggered images are to get; None is 0.
      apply_fn: ``(params, images) -> logits``; None is `awm_jax.models.apply`.

    Returns:
      `Attack`.

    Raises:
      ValueError: a target outside the classes, or params without images or with other classes.

    Example:
      >>> pattern = lf(jax.random.key(0), (32, 32, 3), 10).trigger.pattern
      >>> float(pattern.min()), round(float(pattern.max()), 6)
      (0.0, 0.2)

    Reference: Zeng et al. 2021, "Rethinking the Backdoor Attacks' Triggers: A Frequency
    Perspective", section 5. The range is that of BackdoorBench's code, the rate of .1 too.
    """
    target = TARGET if target is None else target
    everywhere = jnp.ones((*image_shape[:2], 1))
    pattern = ascent.found_on(
        params, images, jax.random.normal(key, image_shape), everywhere, target=target,
        num_classes=num_classes, project=ascent.unchanged, form=smooth, replace=False,
        apply_fn=apply_fn)
    return Attack("lf", Trigger(smooth(pattern), 0 * everywhere), target, num_classes)
