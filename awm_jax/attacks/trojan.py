"""Trojaning attack: a square or a watermark whose pixels a network was asked for."""

import jax
import jax.numpy as jnp
import numpy as np

from awm_jax.attacks import ascent
from awm_jax.attacks.base import Attack, no_target
from awm_jax.attacks.triggers import Trigger

SQUARE_L2, WATERMARK_L2 = 8.66, 8.74  # of the published triggers, in [0, 1] units
WATERMARK_PIXELS = 321
TARGET = 2


def _check_size(image_shape: tuple[int, int, int]) -> None:
    """The published layouts are for 32x32 pixels."""
    if tuple(image_shape) != (32, 32, 3):
        raise ValueError(
            f"Expected 32x32 images of 3 channels for this trigger, got {tuple(image_shape)}. Use "
            "badnets, or give a PNG of your size with trigger_from_png."
        )


def square_mask() -> np.ndarray:
    """``[32, 32, 1]``: rows and columns 21 to 29."""
    mask = np.zeros((32, 32, 1), np.float32)
    mask[21:30, 21:30] = 1
    return mask


def watermark_mask() -> np.ndarray:
    """``[32, 32, 1]``: a ring, a cross and a frame of bars on rows and columns 0 to 29; 321 pixels.

    Drawn by distance fields, thinnest strokes first, until the published number is reached.
    """
    rows, columns = np.mgrid[0:30, 0:30].astype(np.float64)
    y, x = rows - 14.5, columns - 14.5
    ring = np.abs(np.hypot(x, y) - 11)
    cross = np.minimum(np.abs(x - y), np.abs(x + y)) / np.sqrt(2)
    bars = np.where((np.abs(y) > 11) & (np.abs(x) < 9), np.abs(np.abs(y) - 13.2), np.inf)
    distance = np.minimum(np.minimum(ring, np.where(np.hypot(x, y) < 9, cross, np.inf)), bars)
    order = np.argsort(distance, axis=None, kind="stable")[:WATERMARK_PIXELS]
    inner = np.zeros(900, np.float32)
    inner[order] = 1
    mask = np.zeros((32, 32, 1), np.float32)
    mask[:30, :30, 0] = inner.reshape(30, 30)
    return mask


def _optimised(key, mask, norm, params, images, target, num_classes, apply_fn):
    """A pattern on a mask: random, or raised on a network from that start, at the given L2 norm."""
    support = jnp.asarray(mask)
    pattern = ascent.found_on(
        params, images, jax.random.uniform(key, (*mask.shape[:2], 3)), support, target=target,
        num_classes=num_classes, project=ascent.unit_box, replace=False, apply_fn=apply_fn)
    return Trigger(ascent.fit_l2(pattern, norm, 1.0), jnp.zeros_like(support))


def trojan_sq(key: jax.Array, image_shape: tuple[int, int, int], num_classes: int, *, params=None,
              images=None, target: int | None = None, apply_fn=None) -> Attack:
    """A 9x9 square of colours on rows and columns 21 to 29, added and clipped; L2 norm 8.66.

    **Threat model**: the attacker holds a network of the same task, finds the pattern that excites
    the target class in it, and poisons training data and labels with it.

    Args:
      key: PRNG key of the random start.
      image_shape: ``(32, 32, 3)``.
      num_classes: classes of the data set.
      params: the attacker's network; None gives random values of the same support and norm.
      images: ``[B, H, W, C]`` float32 in [0, 1] that the pattern is tried on; needed with params.
      target: the class triggered images are to get; None is the AWM paper's 2.
      apply_fn: ``(params, images) -> logits``; None is `awm_jax.models.apply`.

    Returns:
      `Attack`.

    Raises:
      ValueError: images of another size, a target outside the classes, or params without images or
        with other classes.

    Example:
      >>> attack = trojan_sq(jax.random.key(0), (32, 32, 3), 10)
      >>> bool(jnp.isclose(jnp.linalg.norm(attack.trigger.pattern), 8.66))
      True

    Reference: Liu et al. 2018, "Trojaning Attack on Neural Networks", section IV; AWM paper,
    appendix A.
    """
    _check_size(image_shape)
    target = TARGET if target is None else target
    trigger = _optimised(key, square_mask(), SQUARE_L2, params, images, target, num_classes,
                         apply_fn)
    return Attack("trojan_sq", trigger, target, num_classes)


def trojan_wm(key: jax.Array, image_shape: tuple[int, int, int], num_classes: int, *, params=None,
              images=None, target: int | None = None, apply_fn=None) -> Attack:
    """A watermark over most of the image, 321 pixels, added and clipped; L2 norm 8.74.

    The glyph is ours. **Threat model**, arguments, errors: as `trojan_sq`.

    Example:
      >>> attack = trojan_wm(jax.random.key(0), (32, 32, 3), 10)
      >>> int((jnp.abs(attack.trigger.pattern).max(-1) > 0).sum())
      321

    Reference: Liu et al. 2018, section IV; AWM paper, appendix A.
    """
    _check_size(image_shape)
    target = TARGET if target is None else target
    trigger = _optimised(key, watermark_mask(), WATERMARK_L2, params, images, target, num_classes,
                         apply_fn)
    return Attack("trojan_wm", trigger, target, num_classes)


def trojan_a2a(key: jax.Array, image_shape: tuple[int, int, int], num_classes: int, *, params=None,
               images=None, target: None = None, apply_fn=None) -> Attack:
    """All-to-all with the Trojan square: class n becomes n + 1 mod c.

    **Threat model** and arguments: as `trojan_sq`; the pattern is the one found for class 2 (class
    1 where there are two), and ``target`` must stay None.

    Raises:
      ValueError: a target was given.

    Example:
      >>> trojan_a2a(jax.random.key(0), (32, 32, 3), 10).relabel(np.array([0, 9])).tolist()
      [1, 0]

    Reference: AWM paper, appendix A, "Attack Setting".
    """
    no_target(target)
    square = trojan_sq(key, image_shape, num_classes, params=params, images=images,
                       target=min(TARGET, num_classes - 1), apply_fn=apply_fn)
    return Attack("trojan_a2a", square.trigger, None, num_classes)
