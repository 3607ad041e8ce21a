"""How the layers of a network hang together: told by the network, or by following one call."""

import functools
import math
import types
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import linen as nn

from awm_jax.models import foreign
from awm_jax.models.registry import draw, module
from awm_jax.types import Arch, Weights


def movable(arch: Arch) -> tuple[str, ...]:
    """Blocks that `activations` can add offsets to; of a foreign module, those it perturbs.

    Example:
      >>> movable(Arch(name='small_vgg', num_classes=10))
      ('block1', 'block2', 'block3')
    """
    drawn = jax.eval_shape(lambda key: draw(key, arch), jax.random.key(0))
    return tuple(drawn.get("perturbations", {}))


def deep_convolutions(arch: Arch) -> tuple[str, ...]:
    """The convolutions below the first resolution, in the order of their use.

    Those whose maps are as large as the largest are left out: the first layers, whose filters all
    classes share. Where all maps are of one size, nothing is left out.

    Args:
      arch: a network, of ours or foreign.

    Returns:
      Slash-joined names; empty for a network without convolutions.

    Raises:
      ValueError: ``arch.name`` is no network's.

    Example:
      >>> deep_convolutions(Arch(name='small_vgg', num_classes=10))
      ('conv3', 'conv4', 'conv5', 'conv6')

    Reference: AWM paper, Table 9, masks one layer at a time; what leaving the first layers out does
    is in docs/defaults.md.
    """
    tell = getattr(module(arch), "convolution_areas", None)
    areas: dict[str, int] = {} if tell is None else tell()

    def watch(call, args, kwargs, context):
        out = call(*args, **kwargs)
        if isinstance(context.module, nn.Conv) and context.method_name == "__call__":
            areas["/".join(context.module.path)] = math.prod(out.shape[1:-1])
        return out

    if tell is None:
        with nn.intercept_methods(watch):
            jax.eval_shape(lambda key: draw(key, arch), jax.random.key(0))
    deep = tuple(name for name, area in areas.items() if area < max(areas.values()))
    return deep or tuple(areas)


def norm_inputs(arch: Arch) -> Mapping[str, str]:
    """The convolution that feeds each BatchNorm layer, by slash-joined names; empty without any.

    A BatchNorm that no one convolution feeds, but a sum, say, is left out. Of a foreign module
    without a method ``norm_inputs()`` it is found by following one call; what a lifted
    transformation such as `flax.linen.scan` hides is not.

    Example:
      >>> norm_inputs(Arch(name='small_vgg', num_classes=10))['bn3']
      'conv3'
    """
    tell = getattr(module(arch), "norm_inputs", None)
    return _fed(arch) if tell is None else tell()


@functools.lru_cache(maxsize=64)
def _fed(arch: Arch) -> Mapping[str, str]:
    """`norm_inputs` of a module that does not tell."""
    made: list[tuple[str, jax.Array]] = []  # kept, so that no two have the same identity
    found: dict[str, str] = {}

    def watch(call, args, kwargs, context):
        out, layer = call(*args, **kwargs), context.module
        path = "/".join(layer.path)
        if context.method_name != "__call__":
            return out
        if isinstance(layer, nn.Conv) and out.ndim == 4:
            made.append((path, out))
        elif isinstance(layer, nn.BatchNorm) and layer.use_scale and args:
            found.update((path, conv) for conv, x in made if x is args[0])
        return out

    with nn.intercept_methods(watch):
        jax.eval_shape(lambda key: draw(key, arch), jax.random.key(0))
    return types.MappingProxyType(found)


def classifier(arch: Arch) -> str | None:
    """The dense layer whose outputs are the logits, by its slash-joined name; None without any.

    Where the logits are changed once more (another type, a temperature, a logarithm of the softmax)
    it is the only dense layer with as many outputs as there are classes, if there is only one.

    Args:
      arch: a network, of ours or foreign.

    Example:
      >>> classifier(Arch(name='small_vgg', num_classes=10))
      'dense'
    """
    net = module(arch)
    tell = getattr(net, "last_dense", None)
    return _last_dense(net, arch.image_shape) if tell is None else tell()


def needed_classifier(arch: Arch) -> str:
    """As `classifier`; ValueError for a network without any."""
    name = classifier(arch)
    if name is None:
        raise ValueError(f"Expected {arch.name} to end in a dense layer whose outputs are its "
                         f"{arch.num_classes} classes, a call met none. Choose another network, or "
                         "what works without one.")
    return name


@functools.lru_cache(maxsize=64)
def _last_dense(net: nn.Module, image_shape: tuple[int, int, int]) -> str | None:
    """`classifier` of a module that does not tell."""
    made: list[tuple[str, jax.Array]] = []

    def watch(call, args, kwargs, context):
        out = call(*args, **kwargs)
        if context.method_name == "__call__" and isinstance(context.module, nn.Dense):
            made.append(("/".join(context.module.path), out))
        return out

    def look(key):
        # Two images, so that no layer's output is as large as the logits by chance.
        logits, _ = net.init_with_output(key, jnp.zeros((2, *image_shape)),
                                         **foreign.mode(net, train=False))
        found.append(foreign.puts_out(made, logits))

    found: list[str | None] = []
    with nn.intercept_methods(watch):
        jax.eval_shape(look, jax.random.key(0))
    return found[0]


def layer(weights: Weights, name: str) -> dict[str, jax.Array]:
    """The weights of one layer.

    Args:
      weights: a network's.
      name: slash-joined.

    Example:
      >>> layer({'head': {'out': {'bias': 1}}}, 'head/out')
      {'bias': 1}
    """
    return functools.reduce(lambda tree, part: tree[part], name.split("/"), weights)


def with_layer(weights: Weights, name: str, new: Mapping[str, jax.Array]) -> Weights:
    """The weights of a network with those of one layer exchanged.

    Args:
      weights: a network's, left as they are.
      name: slash-joined.
      new: the layer's weights.

    Example:
      >>> with_layer({'head': {'out': {'bias': 1}, 'in': 2}}, 'head/out', {'bias': 3})
      {'head': {'out': {'bias': 3}, 'in': 2}}
    """
    first, _, rest = name.partition("/")
    return {**weights, first: with_layer(weights[first], rest, new) if rest else dict(new)}
