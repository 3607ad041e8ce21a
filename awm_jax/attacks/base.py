"""An attack is a trigger, a label map and a choice of images to poison."""

import dataclasses
import os
import pathlib
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from awm_jax import validate


class Trigger(NamedTuple):
    """A fixed pattern: ``x' = clip(x * (1 - mask) + pattern, 0, 1)``.

    Args:
      pattern: ``[H, W, C]`` in [-1, 1].
      mask: ``[H, W, 1]`` in [0, 1]; 1 replaces the pixel, 0 everywhere makes the trigger additive.
    """

    pattern: jax.Array
    mask: jax.Array


def apply_trigger(trigger: Trigger, images: jax.Array) -> jax.Array:
    """Puts a trigger on images.

    Args:
      trigger: the pattern.
      images: ``[B, H, W, C]`` float32 in [0, 1].

    Returns:
      ``[B, H, W, C]`` in [0, 1].

    Example:
      >>> trigger = Trigger(jnp.full((2, 2, 1), .5), jnp.zeros((2, 2, 1)))
      >>> apply_trigger(trigger, jnp.full((1, 2, 2, 1), .75)).max().item()
      1.0
    """
    return jnp.clip(images * (1 - trigger.mask[None]) + trigger.pattern[None], 0.0, 1.0)


def check_target(target: int, num_classes: int) -> None:
    """ValueError unless the target is one of the classes."""
    if not 0 <= target < num_classes:
        raise ValueError(
            f"Expected target={target} in 0..{num_classes - 1}. Choose a class of this data set."
        )


@dataclasses.dataclass(frozen=True)
class Attack:
    """A trigger and what it makes of labels.

    Args:
      name: as in `awm_jax.attacks.ATTACKS`.
      trigger: the pattern.
      target: the class that triggered images are to get; None is all-to-all, y to y + 1 mod c.
      num_classes: c.

    Raises:
      ValueError: a target outside 0..c-1.
    """

    name: str
    trigger: Trigger
    target: int | None
    num_classes: int

    def __post_init__(self):
        """Checks the target."""
        if self.target is not None:
            check_target(self.target, self.num_classes)

    def apply(self, images: jax.Array) -> jax.Array:
        """`apply_trigger` with this attack's trigger."""
        return _apply(self.trigger, jnp.asarray(images))

    def relabel(self, labels: np.ndarray) -> np.ndarray:
        """The attacker's classes for true classes ``[N]``."""
        labels = np.asarray(labels)
        if self.target is None:
            return (labels + 1) % self.num_classes
        return np.full_like(labels, self.target)


_apply = jax.jit(apply_trigger)


def _check_set(attack: Attack, images: np.ndarray, labels: np.ndarray) -> None:
    """ValueError or TypeError unless images and labels fit each other and the trigger."""
    expected = attack.trigger.pattern.shape
    if images.shape != (len(labels), *expected):
        raise ValueError(
            f"Expected images of shape {[len(labels), *expected]} (as many as labels, of the "
            f"trigger's size), got {list(images.shape)}."
        )
    if images.dtype != np.uint8 and not np.issubdtype(images.dtype, np.floating):
        raise TypeError(
            f"Expected uint8 images in 0..255 or float images in [0, 1], got {images.dtype}. "
            "Convert them with images.astype(np.uint8)."
        )


def poison(key: jax.Array, attack: Attack, images: np.ndarray, labels: np.ndarray,
           rate: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Triggers and relabels a share of a training set.

    Args:
      key: PRNG key; decides which images.
      attack: what to do to them.
      images: ``[N, H, W, C]`` uint8 in 0..255 or float32 in [0, 1].
      labels: ``[N]`` integers.
      rate: share of all N images, in [0, 1]; ``round(rate * N)`` are poisoned, none of which has
        the attacker's class already.

    Returns:
      ``(images, labels, poisoned)``: copies, and which images changed, ``[N]`` bool.

    Raises:
      ValueError: a rate outside [0, 1], more images wanted than have another class, or images
        that fit neither the labels nor the trigger.
      TypeError: integer images other than uint8.

    Example:
      >>> attack = Attack('dark', Trigger(-jnp.ones((2, 2, 1)), jnp.zeros((2, 2, 1))), 0, 3)
      >>> images, labels = np.full((3, 2, 2, 1), 255, np.uint8), np.array([0, 0, 2])
      >>> images, labels, poisoned = poison(jax.random.key(0), attack, images, labels, 1 / 3)
      >>> labels.tolist(), poisoned.tolist(), int(images[2].max())
      ([0, 0, 0], [False, False, True], 0)

    Reference: Gu et al. 2017, "BadNets"; the AWM paper's rate is .05.
    """
    validate.between(0.0, 1.0, rate=rate)
    images, labels = np.array(images), np.array(labels)
    _check_set(attack, images, labels)
    wanted = attack.relabel(labels)
    candidates = np.flatnonzero(labels != wanted)
    count = round(rate * len(labels))
    if count > len(candidates):
        raise ValueError(
            f"Expected rate={rate} to need at most the {len(candidates)} images outside the target "
            f"class, it needs {count}. Lower the rate."
        )
    picks = candidates[np.asarray(jax.random.permutation(key, len(candidates)))[:count]]
    floats = images[picks].astype(np.float32) / (255.0 if images.dtype == np.uint8 else 1.0)
    if count:
        triggered = np.asarray(attack.apply(floats))
        images[picks] = np.round(triggered * 255) if images.dtype == np.uint8 else triggered
    labels[picks] = wanted[picks]
    poisoned = np.zeros(len(labels), bool)
    poisoned[picks] = True
    return images, labels, poisoned


def trigger_from_png(path: str | os.PathLike, image_shape: tuple[int, ...],
                     mode: str = "add") -> Trigger:
    """Reads a trigger from a picture.

    Args:
      path: a PNG of the size of the images.
      image_shape: ``(H, W, 3)``.
      mode: ``'add'`` (added, then clipped) or ``'stamp'`` (its non-black pixels replace).

    Returns:
      `Trigger`.

    Raises:
      ValueError: another size or mode, or no picture.
      FileNotFoundError: no such file.

    Example:
      >>> trigger_from_png('nowhere.png', (32, 32, 3))
      Traceback (most recent call last):
      FileNotFoundError: Expected a PNG at nowhere.png, found nothing there.
    """
    from PIL import Image

    validate.choice(("add", "stamp"), trigger_mode=mode)
    if len(image_shape) != 3 or image_shape[2] != 3:
        raise ValueError(f"Expected image_shape={tuple(image_shape)} to be (height, width, 3).")
    path = pathlib.Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"Expected a PNG at {path}, found nothing there.")
    try:
        with Image.open(path) as image:
            pixels = np.asarray(image.convert("RGB"), np.float32) / 255.0
    except OSError as error:  # not a picture, or one cut short
        raise ValueError(f"Expected a whole picture at {path}; it is none.") from error
    if pixels.shape != tuple(image_shape):
        raise ValueError(
            f"Expected a trigger of {image_shape[1]}x{image_shape[0]} pixels, {path} has "
            f"{pixels.shape[1]}x{pixels.shape[0]}. Resize it."
        )
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
