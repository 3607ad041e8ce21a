"""The records that every room passes around."""

import dataclasses
from collections.abc import Mapping
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class ForeignArch(Arch):
    """What somebody else's network is; made by `Params.from_flax` and `Params.from_nnx`.

    Args:
      module: its Flax Linen module (of an NNX model one that wraps it), hashable, as this record
        is; `awm_jax.models.module` gives it back.

    Example: `Params.from_flax(net, variables, image_shape=(8, 8, 3)).arch.module`.
    """

    module: Any


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

    @classmethod
    def from_flax(cls, module: Any, variables: Mapping[str, Any], *,
                  image_shape: tuple[int, int, int], mean: tuple[float, ...] = (0.0, 0.0, 0.0),
                  std: tuple[float, ...] = (1.0, 1.0, 1.0)) -> "Params":
        """A network of somebody else's, a Flax Linen module, in place of one of ours.

        ``module.__call__(images)`` must return logits ``[B, c]`` of images ``[B, H, W, C]``. It is
        told its mode through whichever of these arguments it has: ``train``, ``training`` (False to
        evaluate), ``deterministic``, ``use_running_average`` (True to evaluate).

        Args:
          module: the module; lists among its fields become tuples, arrays are refused.
          variables: as ``module.init`` returns them: ``'params'`` and, if any, ``'batch_stats'``.
          image_shape: ``(height, width, channels)`` of one image.
          mean: per-channel mean subtracted from images in [0, 1] before the module sees them.
          std: per-channel positive scale that divides them afterwards.

        Returns:
          `Params`, float32, whose ``arch`` is a `ForeignArch`.

        Raises:
          TypeError: no instance of a Linen module, or one that cannot be hashed.
          ValueError: variables that do not fit the module, other collections, a result that is
            not ``[B, c]`` with c >= 2, or a module that uses a batch's statistics to evaluate.

        Warns (UserWarning) of BatchNorm in a module with no argument for its mode.

        Example:
          >>> from flax import linen as nn
          >>> net = nn.Sequential([lambda x: x.mean((1, 2)), nn.Dense(4)])
          >>> variables = net.init(jax.random.key(0), jax.numpy.zeros((1, 8, 8, 3)))
          >>> Params.from_flax(net, variables, image_shape=(8, 8, 3)).arch.num_classes
          4
        """
        from awm_jax.models import foreign

        return foreign.params(module, variables, image_shape=image_shape, mean=mean, std=std)

    @classmethod
    def from_nnx(cls, model: Any, *, image_shape: tuple[int, int, int],
                 mean: tuple[float, ...] = (0.0, 0.0, 0.0),
                 std: tuple[float, ...] = (1.0, 1.0, 1.0)) -> "Params":
        """A network of somebody else's, a Flax NNX model, in place of one of ours.

        ``model(images)`` must return logits ``[B, c]`` of images ``[B, H, W, C]``, with no more
        arguments; ``model.train()`` and ``model.eval()`` must be what tells it its mode. The model
        itself is not changed.

        Args:
          model: the model, with its weights; variables other than Param, BatchStat and random
            streams are refused.
          image_shape: ``(height, width, channels)`` of one image.
          mean: per-channel mean subtracted from images in [0, 1] before the model sees them.
          std: per-channel positive scale that divides them afterwards.

        Returns:
          `Params`, float32, whose ``arch`` is a `ForeignArch`; `to_nnx` gives them back.

        Raises:
          TypeError: no NNX model.
          ValueError: other variables, a model that cannot be called so, a result that is not
            ``[B, c]`` with c >= 2, or batch statistics in evaluation.

        Example:
          >>> from flax import nnx
          >>> net = nnx.Sequential(lambda x: x.mean((1, 2)), nnx.Linear(3, 4, rngs=nnx.Rngs(0)))
          >>> Params.from_nnx(net, image_shape=(8, 8, 3)).arch.num_classes
          4
        """
        from awm_jax.models import nnx_modules

        return nnx_modules.params(model, image_shape=image_shape, mean=mean, std=std)

    def to_nnx(self, model: Any) -> None:
        """Puts these weights and statistics into an NNX model, in place.

        Args:
          model: as `from_nnx` was given, or another of its class and sizes.

        Raises:
          TypeError: no NNX model, or a network that does not come from one.
          ValueError: a model with arrays of other names or shapes.

        Example: `purified.params.to_nnx(model)`.
        """
        from awm_jax.models import nnx_modules

        nnx_modules.update(model, self)

    def to_flax(self) -> dict[str, Any]:
        """The variables of ``module.apply``: ``{'params': ..., 'batch_stats': ...}``.

        The module sees images as `from_flax` says: less ``arch.mean``, divided by ``arch.std``.

        Returns:
          Both collections; ``'batch_stats'`` is empty for a network without BatchNorm.

        Example: `logits = net.apply(purified.params.to_flax(), images, train=False)`.
        """
        return {"params": self.weights, "batch_stats": self.batch_stats}


class Batch(NamedTuple):
    """Labelled images.

    Args:
      images: ``[B, H, W, C]`` float32 in [0, 1] (or uint8 in 0..255 where a function says so).
      labels: ``[B]`` int32 in ``0..num_classes-1``.
    """

    images: jax.Array
    labels: jax.Array
