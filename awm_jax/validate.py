"""Checks of ranges, shapes and places; messages name the value, the wanted and the way out."""

import os
import pathlib
import tempfile
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np


def choice(choices: Iterable[str], **named: str) -> None:
    """Raises ValueError unless each named value is one of ``choices``."""
    choices = list(choices)
    for name, value in named.items():
        if value not in choices:
            raise ValueError(f"Expected {name}={value!r} to be one of: {', '.join(choices)}.")


def _finite(name: str, value: Any) -> bool:
    """Whether a number is finite; ValueError for what is none, such as an array or True."""
    if isinstance(value, bool) or not isinstance(value, (int, float, np.integer, np.floating)):
        raise ValueError(f"Expected {name} to be a number, got {value!r}.")
    return bool(np.isfinite(value))


def boolean(**named: bool) -> None:
    """Raises ValueError unless each named value is True or False; text such as 'False' is true.

    Example:
      >>> boolean(flip='False')
      Traceback (most recent call last):
      ...
      ValueError: Expected flip='False' to be True or False.
    """
    for name, value in named.items():
        if not isinstance(value, (bool, np.bool_)):
            raise ValueError(f"Expected {name}={value!r} to be True or False.")


def layers(**named: Any) -> None:
    """Raises ValueError unless each named value is a name or a tuple of names.

    Which names there are depends on the network: `awm_jax.masks.init` looks.

    Example:
      >>> layers(layers=3)
      Traceback (most recent call last):
      ...
      ValueError: Expected layers=3 to be a text, such as 'conv', or a tuple of layer names.
    """
    for name, value in named.items():
        if not (isinstance(value, str) or (
                isinstance(value, tuple) and all(isinstance(part, str) for part in value))):
            raise ValueError(f"Expected {name}={value!r} to be a text, such as 'conv', or a tuple "
                             "of layer names.")


def positive(**named: float) -> None:
    """Raises ValueError unless each named value is a finite number > 0."""
    for name, value in named.items():
        if not (_finite(name, value) and value > 0):
            raise ValueError(f"Expected {name}={value} > 0 and finite.")


def at_least(minimum: float, **named: float) -> None:
    """Raises ValueError unless each named value is a finite number >= ``minimum``."""
    for name, value in named.items():
        if not (_finite(name, value) and value >= minimum):
            raise ValueError(f"Expected {name}={value} >= {minimum} and finite.")


def between(low: float, high: float, **named: float) -> None:
    """Raises ValueError unless each named value lies in [low, high]."""
    for name, value in named.items():
        if not (_finite(name, value) and low <= value <= high):
            raise ValueError(f"Expected {name}={value} in [{low}, {high}].")


def whole(minimum: int, **named: Any) -> None:
    """Raises ValueError unless each named value is an integer >= ``minimum``.

    Example:
      >>> whole(1, epochs=2.5)
      Traceback (most recent call last):
      ...
      ValueError: Expected epochs=2.5 to be an integer.
    """
    at_least(minimum, **named)
    for name, value in named.items():
        # Not 2.0 either: what counts arrays' sizes must be of an integer type.
        if not isinstance(value, (int, np.integer)):
            raise ValueError(f"Expected {name}={value} to be an integer.")


def normalisation(mean: Sequence[float], std: Sequence[float], channels: int) -> None:
    """Raises ValueError unless means (or zeros) and scales > 0 (or ones) fit the channels.

    The defaults, zeros and ones, are accepted for any number of channels. A mean over 1 belongs to
    images in 0..255, and is refused.

    Example:
      >>> normalisation((0.5,), (-1.0,), 1)
      Traceback (most recent call last):
      ...
      ValueError: Expected std=(-1.0,) to be 1 numbers > 0, one a channel.
    """
    for name, given, nothing in (("mean", mean, 0.0), ("std", std, 1.0)):
        wrong = np.ndim(given) != 1 or not all(_finite(name, value) for value in given) or (
            name == "std" and min(given, default=1.0) <= 0)
        if wrong or (len(given) != channels and any(value != nothing for value in given)):
            raise ValueError(f"Expected {name}={given} to be {channels} "
                             f"{'numbers' if name == 'mean' else 'numbers > 0'}, one a channel.")
    if len(mean) and max(mean) > 1:
        raise ValueError(f"Expected {mean=} of images in [0, 1]. Divide it and std by 255.")


def image_shape(shape: Any) -> tuple[int, int, int]:
    """``(height, width, channels)`` as integers; ValueError for what is none.

    Example:
      >>> image_shape([32, 32.0, 3])
      (32, 32, 3)
    """
    found = tuple(shape) if np.ndim(shape) == 1 else ()
    if len(found) != 3 or not all(float(n).is_integer() and n >= 1 for n in found):
        raise ValueError(f"Expected image_shape={shape} to be (height, width, channels), each at "
                         "least 1.")
    height, width, channels = map(int, found)
    return height, width, channels


def labelled_images(images: Any, labels: Any, *, num_classes: int,
                    image_shape: tuple[int, int, int]) -> None:
    """Raises ValueError or TypeError unless images and labels fit the network and are finite.

    Reads the arrays on the host: call it outside `jit`.
    """
    images, labels = np.asarray(images), np.asarray(labels)
    shape = tuple(image_shape)
    if images.ndim != 4 or images.shape[1:] != shape:
        advice = ("One image is images[None]." if images.shape == shape else
                  "PyTorch's [B, C, H, W] needs images.transpose(0, 2, 3, 1)."
                  if images.ndim == 4 and images.shape[1] == shape[2] else
                  "Resize or convert them.")
        raise ValueError(f"Expected images of shape [B, {', '.join(map(str, shape))}] (batch, "
                         f"height, width, channels), got {list(images.shape)}. {advice}")
    if len(images) == 0:
        raise ValueError("Expected at least one image, got an empty batch.")
    if not np.issubdtype(images.dtype, np.floating):
        raise TypeError(
            f"Expected float images in [0, 1], got {images.dtype}. Divide uint8 images by 255."
        )
    if not np.isfinite(images).all():
        raise ValueError("Expected finite images, found NaN or infinity. Check how they were read.")
    if images.min() < 0 or images.max() > 1:
        raise ValueError(
            f"Expected images in [0, 1], got [{images.min():.3g}, {images.max():.3g}]. Undo the "
            "normalisation (put it into Arch.mean and Arch.std) or divide by 255."
        )
    if labels.shape != (len(images),):
        raise ValueError(f"Expected labels of shape [{len(images)}], got {list(labels.shape)}.")
    if not np.issubdtype(labels.dtype, np.integer):
        raise TypeError(f"Expected integer labels, got {labels.dtype}.")
    if labels.min() < 0 or labels.max() >= num_classes:
        raise ValueError(
            f"Expected labels in 0..{num_classes - 1}, got {labels.min()}..{labels.max()}."
        )


def training_set(images: np.ndarray, labels: np.ndarray, *, num_classes: int,
                 image_shape: tuple[int, int, int]) -> None:
    """Raises ValueError unless images are uint8 of the network's size and labels fit them."""
    labels = np.asarray(labels)
    if len(images) == 0:
        raise ValueError("Expected a training set of at least one image, got none.")
    if images.dtype != np.uint8 or images.shape[1:] != tuple(image_shape):
        raise ValueError(
            f"Expected uint8 images [N, {', '.join(map(str, image_shape))}], got "
            f"{images.dtype} {list(images.shape)}."
        )
    if not np.issubdtype(labels.dtype, np.integer):
        raise TypeError(f"Expected integer labels, got {labels.dtype}.")
    if labels.shape != (len(images),) or not 0 <= labels.min() <= labels.max() < num_classes:
        raise ValueError(
            f"Expected {len(images)} labels in 0..{num_classes - 1}, got shape "
            f"{list(labels.shape)} in {labels.min()}..{labels.max()}."
        )


def writable(path: str | os.PathLike) -> None:
    """Whether a file can be made there, tried in the nearest folder that there is.

    Args:
      path: what is to be written; folders on the way to it may be missing.

    Raises:
      OSError: a file in the place of a folder, or no right to write there.

    Example: `writable('results/purified.pth')`.
    """
    path = pathlib.Path(path)
    folder = next(p for p in path.absolute().parents if os.path.lexists(p))
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        why = "is no folder" if not folder.is_dir() else f"cannot be written to ({error.strerror})"
        raise OSError(f"Expected to be able to write {path}, {folder} {why}. Choose another "
                      "place.") from error
