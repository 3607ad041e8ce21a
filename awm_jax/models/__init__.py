"""Networks as pure functions of explicit weights, BatchNorm statistics and masks."""

import functools
import math
import types
from collections.abc import Mapping
from typing import Any, cast

import jax
import jax.numpy as jnp
from flax import linen as nn

from awm_jax import masks as masking
from awm_jax import validate
from awm_jax.models import foreign, norms
from awm_jax.models.mnist import CNN, MLP
from awm_jax.models.mobilenet import MobileNetV2
from awm_jax.models.resnet import PreActResNet18, ResNet18
from awm_jax.models.shufflenet import ShuffleNetV2
from awm_jax.models.vgg import VGG19BN, SmallVGG
from awm_jax.types import Arch, ForeignArch, Masks, Params

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
    variables = (_draw if isinstance(key, jax.core.Tracer) else _jit_draw)(key, arch)
    return Params(variables["params"], variables.get("batch_stats", {}), arch)


def _draw(key: jax.Array, arch: Arch) -> Any:
    """Flax's variables."""
    net = module(arch)
    return net.init(key, jnp.zeros((1, *arch.image_shape)), **foreign.mode(net, train=False))


# One program: by itself, Flax compiles and runs each layer to draw it. It runs once, so what takes
# the time is to compile it: a second at this level, five at the usual one.
_jit_draw = jax.jit(_draw, static_argnames="arch",
                    compiler_options={"xla_backend_optimization_level": 1})


def apply(params: Params, images: jax.Array, *, masks: Masks | None = None) -> jax.Array:
    """Logits ``f(x; m * w)`` with frozen BatchNorm statistics and no dropout.

    Args:
      params: the network.
      images: ``[B, H, W, C]`` float32 in [0, 1]; normalised inside by ``arch.mean``, ``arch.std``.
      masks: tree shaped like ``params.weights`` with None for unmasked leaves, or None.

    Returns:
      ``[B, num_classes]`` float32.

    Example:
      >>> params = create(jax.random.key(0), Arch(name='small_vgg', num_classes=10))
      >>> apply(params, jnp.zeros((2, 32, 32, 3))).shape
      (2, 10)
    """
    weights = masking.apply(params.weights, masks)
    variables = {"params": weights, "batch_stats": params.batch_stats}
    images = _normalise(params.arch, images)
    return cast(jax.Array, foreign.apply(module(params.arch), variables, images, train=False))


def apply_train(params: Params, images: jax.Array, *, key: jax.Array) -> tuple[jax.Array, Any]:
    """Logits with batch statistics and dropout, and the updated running statistics.

    Args:
      params: the network.
      images: ``[B, H, W, C]`` float32 in [0, 1].
      key: PRNG key of the dropout.

    Returns:
      ``(logits [B, num_classes], batch_stats)``.

    Example:
      >>> params = create(jax.random.key(0), Arch(name='small_vgg', num_classes=10))
      >>> logits, _ = apply_train(params, jnp.zeros((2, 32, 32, 3)), key=jax.random.key(1))
      >>> logits.shape
      (2, 10)
    """
    variables = {"params": params.weights, "batch_stats": params.batch_stats}
    logits, updated = foreign.apply(
        module(params.arch), variables, _normalise(params.arch, images), train=True,
        mutable=["batch_stats"], rngs={"dropout": key},
    )
    return logits, updated.get("batch_stats", {})


def activations(params: Params, images: jax.Array, *, key: jax.Array | None = None,
                offsets: dict[str, jax.Array] | None = None
                ) -> tuple[jax.Array, dict[str, jax.Array], Any]:
    """Logits and what each block of the network puts out, as `apply` or `apply_train`.

    Args:
      params: the network.
      images: ``[B, H, W, C]`` float32 in [0, 1].
      key: PRNG key of the dropout for training mode; None for frozen statistics.
      offsets: what is added to each block's output on its way to the next, by name and of its
        shape, to differentiate by; `movable` lists where it takes effect. None adds nothing.

    Returns:
      ``(logits [B, num_classes], {'block1': [B, h, w, c], ...}, batch_stats)``: the blocks in
      order, each after its last activation, before pooling (a fully connected layer is a block of
      one pixel; PreAct-ResNet's are raw sums, MobileNet's linear but for the last); the last one's
      channels are the features that the classifier sees.

    Raises:
      ValueError: a foreign module that sows nothing.

    Example:
      >>> params = create(jax.random.key(0), Arch(name='small_vgg', num_classes=10))
      >>> activations(params, jnp.zeros((2, 32, 32, 3)))[1]['block3'].shape
      (2, 8, 8, 128)
    """
    variables = {"params": params.weights, "batch_stats": params.batch_stats}
    if offsets is not None:
        variables["perturbations"] = offsets
    mutable = ["intermediates"] if key is None else ["intermediates", "batch_stats"]
    logits, found = foreign.apply(
        module(params.arch), variables, _normalise(params.arch, images), train=key is not None,
        mutable=mutable, rngs=None if key is None else {"dropout": key})
    blocks = {name: value[0] for name, value in found.get("intermediates", {}).items()
              if isinstance(value, tuple)}  # what a layer of a foreign module sows is a dictionary
    # A block of one pixel, where a foreign module sows a vector.
    blocks = {name: x[:, None, None] if x.ndim == 2 else x for name, x in blocks.items()}
    if any(x.ndim != 4 for x in blocks.values()):
        shapes = {name: list(x.shape) for name, x in blocks.items()}
        raise ValueError(f"Expected {params.arch.name} to sow blocks [B, h, w, c], or [B, c], got "
                         f"{shapes}.")
    if not blocks:
        raise ValueError(f"Expected {params.arch.name} to sow what its blocks put out, it sows "
                         "nothing. Call self.sow('intermediates', 'block1', x) in the module.")
    return logits, blocks, found.get("batch_stats", params.batch_stats)


def norm_moments(params: Params, images: jax.Array, *, masks: Masks | None = None,
                 beside: dict[str, norms.Moments] | None = None) -> dict[str, norms.Moments]:
    """Mean and mean square, channel by channel, of what enters each BatchNorm layer in `apply`.

    Args:
      params: the network.
      images: ``[B, H, W, C]`` float32 in [0, 1].
      masks: as `apply` takes them.
      beside: moments of the network without masks on the same images: each layer then normalises by
        statistics that are moved as far as its own moments are from these (`norms.moved`).

    Returns:
      `norms.Moments` by slash-joined paths. Layers that are not `flax.linen.BatchNorm` over the
      last axis, or that a lifted transformation such as `flax.linen.scan` hides, are not in it.

    Example:
      >>> params = create(jax.random.key(0), Arch(name='small_vgg', num_classes=10))
      >>> norm_moments(params, jnp.zeros((2, 32, 32, 3)))['bn3'].mean.shape
      (64,)
    """
    variables = {"params": masking.apply(params.weights, masks), "batch_stats": params.batch_stats}
    intercept = norms.sowing if beside is None else norms.moving(params.batch_stats, beside)
    with nn.intercept_methods(intercept):
        _, sown = foreign.apply(module(params.arch), variables, _normalise(params.arch, images),
                                train=False, mutable=[norms.COLLECTION])
    return norms.read(sown.get(norms.COLLECTION, {}), params.batch_stats)


def movable(arch: Arch) -> tuple[str, ...]:
    """Blocks that `activations` can add offsets to; of a foreign module, those it perturbs.

    Example:
      >>> movable(Arch(name='small_vgg', num_classes=10))
      ('block1', 'block2', 'block3')
    """
    drawn = jax.eval_shape(lambda key: _draw(key, arch), jax.random.key(0))
    return tuple(drawn.get("perturbations", {}))


def features(params: Params, images: jax.Array) -> jax.Array:
    """What the last dense layer sees, as in `apply`: ``logits = features @ kernel + bias``.

    Args:
      params: the network; its last layer is called ``'dense'``.
      images: ``[B, H, W, C]`` float32 in [0, 1].

    Returns:
      ``[B, d]``.

    Raises:
      ValueError: a network without a layer of that name.

    Example:
      >>> params = create(jax.random.key(0), Arch(name='small_vgg', num_classes=10))
      >>> features(params, jnp.zeros((2, 32, 32, 3))).shape
      (2, 2048)
    """
    seen: list[jax.Array] = []

    def watch(call, args, kwargs, context):
        if context.module.path == ("dense",):
            seen.append(args[0])
        return call(*args, **kwargs)

    with nn.intercept_methods(watch):
        apply(params, images)
    if not seen:
        raise ValueError(f"Expected {params.arch.name} to end in a layer called 'dense'.")
    return seen[0]


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
    is in docs/development.md.
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
            jax.eval_shape(lambda key: _draw(key, arch), jax.random.key(0))
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
        jax.eval_shape(lambda key: _draw(key, arch), jax.random.key(0))
    return types.MappingProxyType(found)


def _normalise(arch: Arch, images: jax.Array) -> jax.Array:
    """Subtracts the channel means and divides by the scales; the identity by default."""
    # Apart, as either may be left at its default, which has three channels.
    if any(arch.mean):
        images = images - jnp.asarray(arch.mean, images.dtype).reshape(1, 1, 1, -1)
    if any(s != 1.0 for s in arch.std):
        images = images / jnp.asarray(arch.std, images.dtype).reshape(1, 1, 1, -1)
    return images
