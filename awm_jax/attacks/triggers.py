"""Triggers: what an attacker does to an image."""

import os
import pathlib
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from awm_jax import validate


class Transform(Protocol):
    """What every trigger is: a tree of arrays that maps images to triggered images."""

    def __call__(self, images: jax.Array) -> jax.Array:
        """``[B, H, W, C]`` in [0, 1] to the same."""


class Trigger(NamedTuple):
    """A fixed pattern: ``x' = clip(x * (1 - mask) + pattern, 0, 1)``.

    Args:
      pattern: ``[H, W, C]`` in [-1, 1].
      mask: ``[H, W, 1]`` in [0, 1]; 1 replaces the pixel, a share blends the pattern in (which
        then holds that share of it), 0 everywhere makes the trigger additive.
    """

    pattern: jax.Array
    mask: jax.Array

    def __call__(self, images: jax.Array) -> jax.Array:
        """The pattern on ``[B, H, W, C]``."""
        return jnp.clip(images * (1 - self.mask[None]) + self.pattern[None], 0.0, 1.0)


def apply_trigger(trigger: Transform, images: jax.Array) -> jax.Array:
    """Puts a trigger on images.

    Args:
      trigger: a pattern, a warp, or anything that maps images to images.
      images: ``[B, H, W, C]`` float32 in [0, 1].

    Returns:
      ``[B, H, W, C]`` in [0, 1].

    Example:
      >>> trigger = Trigger(jnp.full((2, 2, 1), .5), jnp.zeros((2, 2, 1)))
      >>> apply_trigger(trigger, jnp.full((1, 2, 2, 1), .75)).max().item()
      1.0
    """
    return trigger(images)


def blend(picture: jax.Array, ratio: float) -> Trigger:
    """``x' = (1 - ratio) x + ratio * picture``.

    Args:
      picture: ``[H, W, C]`` in [0, 1].
      ratio: the picture's share, in (0, 1].

    Returns:
      `Trigger`.

    Raises:
      ValueError: a ratio outside its range.

    Example:
      >>> float(blend(jnp.ones((2, 2, 1)), .25)(jnp.zeros((1, 2, 2, 1))).max())
      0.25

    Reference: Chen et al. 2017, "Targeted Backdoor Attacks", section IV-C.
    """
    validate.positive(ratio=ratio)
    validate.between(0.0, 1.0, ratio=ratio)
    return Trigger(ratio * picture, jnp.full((*picture.shape[:2], 1), ratio))


def trigger_from_png(path: str | os.PathLike, image_shape: tuple[int, ...], mode: str = "add", *,
                     ratio: float = 0.1) -> Trigger:
    """Reads a trigger from a picture.

    Args:
      path: a PNG, of the size of the images unless it is blended.
      image_shape: ``(H, W, 3)``.
      mode: ``'add'`` (added, then clipped), ``'stamp'`` (its non-black pixels replace) or
        ``'blend'`` (resized, and mixed in as `awm_jax.attacks.blend` does).
      ratio: the picture's share where it is blended, in (0, 1]; FT-SAM's is .1.

    Returns:
      `Trigger`.

    Raises:
      ValueError: another size, mode or ratio, or no picture.
      FileNotFoundError: no such file.

    Example:
      >>> trigger_from_png('nowhere.png', (32, 32, 3))
      Traceback (most recent call last):
      FileNotFoundError: Expected a PNG at nowhere.png, found nothing there.

    Reference: FT-SAM supplement, "Attack Details", for blending.
    """
    from PIL import Image

    validate.choice(("add", "stamp", "blend"), trigger_mode=mode)
    if len(image_shape) != 3 or image_shape[2] != 3:
        raise ValueError(f"Expected image_shape={tuple(image_shape)} to be (height, width, 3).")
    height, width, _ = image_shape
    path = pathlib.Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"Expected a PNG at {path}, found nothing there.")
    try:
        with Image.open(path) as image:
            picture = image.convert("RGB")
    except OSError as error:  # not a picture, or one cut short
        raise ValueError(f"Expected a whole picture at {path}; it is none.") from error
    if mode == "blend":
        picture = picture.resize((width, height), Image.Resampling.BILINEAR)
    pixels = np.asarray(picture, np.float32) / 255.0
    if pixels.shape != tuple(image_shape):
        raise ValueError(
            f"Expected a trigger of {width}x{height} pixels, {path} has "
            f"{pixels.shape[1]}x{pixels.shape[0]}. Resize it."
        )
    if mode == "blend":
        return blend(jnp.asarray(pixels), ratio)
    covered = (pixels.max(axis=-1, keepdims=True) > 0) if mode == "stamp" else 0 * pixels[..., :1]
    return Trigger(jnp.asarray(pixels), jnp.asarray(covered, jnp.float32))


def trigger_norms(trigger: Trigger) -> dict[str, float]:
    """Pixels touched, L1 and L2 norm of the pattern, to compare with published triggers.

    Example:
      >>> trigger_norms(Trigger(jnp.ones((2, 2, 1)), jnp.ones((2, 2, 1))))
      {'l0': 4.0, 'l1': 4.0, 'l2': 2.0}
    """
    pattern = np.asarray(trigger.pattern)
    touched = (np.abs(pattern).max(axis=-1) > 0) | (np.asarray(trigger.mask)[..., 0] > 0)
    return {"l0": float(touched.sum()), "l1": float(np.abs(pattern).sum()),
            "l2": float(np.sqrt((pattern**2).sum()))}
