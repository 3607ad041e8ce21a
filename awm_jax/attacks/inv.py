"""Invisible backdoors: nine pixels (l0) or a faint pattern (l2) that excite a class."""

import jax
import jax.numpy as jnp

from awm_jax.attacks import ascent
from awm_jax.attacks.base import Attack
from awm_jax.attacks.triggers import Trigger

TARGET = 0
L0_PIXELS = 9
L2_NORM, L2_PIXELS, L2_MAX = 3.22, 905, 68 / 255  # of the published trigger, in [0, 1] units


def l0_inv(key: jax.Array, image_shape: tuple[int, int, int], num_classes: int, *, params=None,
           images=None, target: int | None = None, apply_fn=None) -> Attack:
    """Nine pixels at the right end of the bottom row, each channel 0 or 1.

    **Threat model**: the attacker holds a network of the same task, finds the colours that excite
    the target class in it, and poisons training data and labels with them.

    Args:
      key: PRNG key of the random start.
      image_shape: ``(H, W, C)``, at least nine pixels wide.
      num_classes: classes of the data set.
      params: the attacker's network; None gives random colours on the same nine pixels.
      images: ``[B, H, W, C]`` float32 in [0, 1] that the pattern is tried on; needed with params.
      target: the class triggered images are to get; None is the AWM paper's 0.
      apply_fn: ``(params, images) -> logits``; None is `awm_jax.models.apply`.

    Returns:
      `Attack`.

    Raises:
      ValueError: images too narrow, a target outside the classes, or params without images or with
        other classes.

    Example:
      >>> float(l0_inv(jax.random.key(0), (32, 32, 3), 10).trigger.mask.sum())
      9.0

    Reference: Li et al. 2019, "Invisible Backdoor Attacks Against Deep Neural Networks" (the L0
    constraint); AWM paper, appendix A.
    """
    height, width, _ = image_shape
    if width < L0_PIXELS:
        raise ValueError(f"Expected images at least {L0_PIXELS} pixels wide, got {width}.")
    target = TARGET if target is None else target
    support = jnp.zeros((height, width, 1)).at[height - 1, width - L0_PIXELS :].set(1.0)
    pattern = ascent.found_on(
        params, images, jax.random.uniform(key, image_shape), support, target=target,
        num_classes=num_classes, project=ascent.unit_box, replace=True, apply_fn=apply_fn)
    return Attack("l0_inv", Trigger(jnp.round(pattern) * support, support), target, num_classes)


def l2_inv(key: jax.Array, image_shape: tuple[int, int, int], num_classes: int, *, params=None,
           images=None, target: int | None = None, apply_fn=None) -> Attack:
    """A faint pattern on 905 pixels, added and clipped; L2 norm 3.22, no value over 68/255.

    **Threat model**, arguments, errors: as `l0_inv`. Without params the pattern is random, of the
    same size and norm; images too small for the norm (under 8x8) are an error.

    Example:
      >>> pattern = l2_inv(jax.random.key(0), (32, 32, 3), 10).trigger.pattern
      >>> bool(jnp.abs(pattern).max() <= 68 / 255 + 1e-6)
      True

    Reference: Li et al. 2019 (the L2 constraint); AWM paper, appendix A.
    """
    height, width, _ = image_shape
    everywhere = jnp.ones((height, width, 1))
    target = TARGET if target is None else target
    pattern = ascent.found_on(
        params, images, 0.1 * jax.random.normal(key, image_shape), everywhere, target=target,
        num_classes=num_classes, project=_l2_project, replace=False, apply_fn=apply_fn)
    pattern = ascent.fit_l2(_strongest(pattern), L2_NORM, L2_MAX)
    return Attack("l2_inv", Trigger(pattern, 0 * everywhere), target, num_classes)


def _l2_project(pattern: jax.Array) -> jax.Array:
    """Inside the L2 ball and the box."""
    norm = jnp.sqrt((pattern**2).sum())
    return jnp.clip(pattern * jnp.minimum(1.0, L2_NORM / jnp.maximum(norm, 1e-12)), -L2_MAX, L2_MAX)


def _strongest(pattern: jax.Array) -> jax.Array:
    """The strongest 905 pixels, the others zero."""
    strength = jnp.abs(pattern).max(axis=-1)
    pixels = min(L2_PIXELS, strength.size)
    floor = jnp.sort(strength.ravel(), descending=True)[pixels - 1]
    return jnp.where(strength[..., None] >= floor, pattern, 0.0)
