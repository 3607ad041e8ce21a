"""The records that every room passes around."""

import dataclasses
from typing import Any, NamedTuple

import jax

Weights = Any  # a nested dict of float32 arrays, laid out as Flax does
Masks = Any  # a tree shaped like Weights; None marks a leaf that is left alone


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arch:
    """What a network is, apart from its numbers; hashable, so `jit` treats it as static.

    Args:
      name: a key of `awm_jax.models.MODELS`, such as ``'small_vgg'``.
      num_classes: how many logits the network returns, at least 2.
      image_shape: ``(height, width, channels)`` of one image.
      mean: per-channel mean subtracted from images in [0, 1] inside the network.
      std: per-channel positive scale that divides them afterwards.

    Normalisation is part of the network, so that triggers, clipping and perturbations always
    live in [0, 1] pixels.

    Example:
      >>> Arch(name='small_vgg', num_classes=43).image_shape
      (32, 32, 3)
    """

    name: str
    num_classes: int
    image_shape: tuple[int, int, int] = (32, 32, 3)
    mean: tuple[float, ...] = (0.0, 0.0, 0.0)
    std: tuple[float, ...] = (1.0, 1.0, 1.0)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Params:
    """A network: its weights, its BatchNorm statistics and (static) what it is.

    Args:
      weights: nested dict of float32 arrays (Flax's ``params`` collection).
      batch_stats: nested dict of running means and variances (``batch_stats``); may be empty.
      arch: the architecture these numbers belong to.
    """

    weights: Weights
    batch_stats: Any
    arch: Arch = dataclasses.field(metadata={"static": True})


class Batch(NamedTuple):
    """Labelled images.

    Args:
      images: ``[B, H, W, C]`` float32 in [0, 1] (or uint8 in 0..255 where a function says so).
      labels: ``[B]`` int32 in ``0..num_classes-1``.
    """

    images: jax.Array
    labels: jax.Array
