"""Networks as pure functions of explicit weights, BatchNorm statistics and masks."""

from typing import Any, cast

import jax
import jax.numpy as jnp
from flax import linen as nn

from awm_jax import masks as masking
from awm_jax.models import foreign, norms
from awm_jax.models.registry import MODELS, check, create, module
from awm_jax.models.wiring import (
    classifier,
    deep_convolutions,
    layer,
    movable,
    needed_classifier,
    norm_inputs,
    with_layer,
)
from awm_jax.types import Arch, ForeignArch, Masks, Params

__all__ = ["MODELS", "activations", "apply", "apply_train", "check", "classifier", "create",
           "deep_convolutions", "features", "last_features", "layer", "module", "movable",
           "needed_classifier", "norm_inputs", "norm_moments", "with_layer"]


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


def features(params: Params, images: jax.Array) -> jax.Array:
    """What the `classifier` sees, as in `apply`: ``logits = features @ kernel + bias``.

    Args:
      params: the network.
      images: ``[B, H, W, C]`` float32 in [0, 1].

    Returns:
      ``[B, d]``.

    Raises:
      ValueError: a network without such a layer.

    Example:
      >>> params = create(jax.random.key(0), Arch(name='small_vgg', num_classes=10))
      >>> features(params, jnp.zeros((2, 32, 32, 3))).shape
      (2, 2048)
    """
    net, name = module(params.arch), needed_classifier(params.arch)
    tell = getattr(net, "inputs_of", None)
    if tell is not None:
        variables = {"params": params.weights, "batch_stats": params.batch_stats}
        return _at_least_float32(tell(variables, _normalise(params.arch, images), name))
    seen: list[jax.Array] = []

    def watch(call, args, kwargs, context):
        if context.method_name == "__call__" and "/".join(context.module.path) == name:
            seen.append(foreign.first_argument(args, kwargs))
        return call(*args, **kwargs)

    with nn.intercept_methods(watch):
        apply(params, images)
    return _at_least_float32(seen[-1])


def last_features(params: Params, images: jax.Array) -> jax.Array:
    """The last block's channels averaged over each image; of a foreign module, `features`.

    Its last block need not be what its classifier sees.

    Args:
      params: the network.
      images: ``[B, H, W, C]`` float32 in [0, 1].

    Returns:
      ``[B, c]``.

    Raises:
      ValueError: a foreign module without a `classifier`.

    Example:
      >>> params = create(jax.random.key(0), Arch(name='small_vgg', num_classes=10))
      >>> last_features(params, jnp.zeros((2, 32, 32, 3))).shape
      (2, 128)
    """
    if isinstance(params.arch, ForeignArch):
        return features(params, images)
    _, blocks, _ = activations(params, images)
    return list(blocks.values())[-1].mean(axis=(1, 2))


def _at_least_float32(x: jax.Array) -> jax.Array:
    """Of layers of lower precision, whose weights here are float32."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _normalise(arch: Arch, images: jax.Array) -> jax.Array:
    """Subtracts the channel means and divides by the scales; the identity by default."""
    # Apart, as either may be left at its default, which has three channels.
    if any(arch.mean):
        images = images - jnp.asarray(arch.mean, images.dtype).reshape(1, 1, 1, -1)
    if any(s != 1.0 for s in arch.std):
        images = images / jnp.asarray(arch.std, images.dtype).reshape(1, 1, 1, -1)
    return images
