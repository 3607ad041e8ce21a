"""The networks there are: what each is called, built and drawn by."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from awm_jax import validate
from awm_jax.models import foreign
from awm_jax.models.mnist import CNN, MLP
from awm_jax.models.mobilenet import MobileNetV2
from awm_jax.models.resnet import PreActResNet18, ResNet18
from awm_jax.models.shufflenet import ShuffleNetV2
from awm_jax.models.vgg import VGG19BN, SmallVGG
from awm_jax.types import Arch, ForeignArch, Params

MODELS: dict[str, type[nn.Module]] = {
    "small_vgg": SmallVGG,
    "resnet18": ResNet18,
    "preact_resnet18": PreActResNet18,
    "vgg19_bn": VGG19BN,
    "shufflenet_v2": ShuffleNetV2,
    "mobilenet_v2": MobileNetV2,
    "mlp": MLP,
    "cnn": CNN,
}
_SMALLEST = {"vgg19_bn": 32, "cnn": 16}  # images of fewer pixels would be pooled away


def module(arch: Arch) -> nn.Module:
    """The Flax module of an architecture; ValueError lists the known names."""
    if isinstance(arch, ForeignArch):
        return arch.module
    validate.choice(MODELS, arch=arch.name)
    return MODELS[arch.name](num_classes=arch.num_classes)  # type: ignore[call-arg]


def check(arch: Arch) -> None:
    """ValueError if there is no such network.

    Args:
      arch: what is to be built.

    Raises:
      ValueError: unknown ``arch.name``, fewer than 2 classes, a normalisation that does not fit the
        channels, or images under 8x8 (32x32 for ``vgg19_bn``, 16x16 for ``cnn``; of a foreign
        module's images `Params.from_flax` has seen that they fit).

    Example:
      >>> check(Arch(name='cnn', num_classes=10, image_shape=(8, 8, 3)))
      Traceback (most recent call last):
      ...
      ValueError: Expected images of 16x16 or more for cnn, got 8x8. Take larger ones, or ...
    """
    validate.whole(2, num_classes=arch.num_classes)
    validate.normalisation(arch.mean, arch.std, arch.image_shape[2])
    if isinstance(arch, ForeignArch):
        return
    validate.choice(MODELS, arch=arch.name)
    (height, width, _), smallest = arch.image_shape, _SMALLEST.get(arch.name, 8)
    if min(height, width) < smallest:
        raise ValueError(f"Expected images of {smallest}x{smallest} or more for {arch.name}, got "
                         f"{height}x{width}. Take larger ones, or another network (--arch).")


def create(key: jax.Array, arch: Arch) -> Params:
    """Draws the initial weights of a network.

    Args:
      key: PRNG key.
      arch: what to build.

    Returns:
      `Params` with float32 weights and fresh BatchNorm statistics.

    Raises:
      ValueError: as `check`.

    Example:
      >>> create(jax.random.key(0), Arch(name='small_vgg', num_classes=10)).weights['dense'][
      ...     'kernel'].shape
      (2048, 10)
    """
    check(arch)
    # Options of a compilation cannot be given to a part of a larger one.
    variables = (draw if isinstance(key, jax.core.Tracer) else _jit_draw)(key, arch)
    return Params(variables["params"], variables.get("batch_stats", {}), arch)


def draw(key: jax.Array, arch: Arch) -> Any:
    """Flax's variables of a network, as its own code draws them.

    Example: `draw(jax.random.key(0), arch)['params']`.
    """
    net = module(arch)
    return net.init(key, jnp.zeros((1, *arch.image_shape)), **foreign.mode(net, train=False))


# One program: by itself, Flax compiles and runs each layer to draw it. It runs once, so what takes
# the time is to compile it: a second at this level, five at the usual one.
_jit_draw = jax.jit(draw, static_argnames="arch",
                    compiler_options={"xla_backend_optimization_level": 1})
