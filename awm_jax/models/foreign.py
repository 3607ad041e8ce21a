"""Somebody else's Flax Linen module in place of a network of ours."""

import dataclasses
import inspect
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import core
from flax import linen as nn
from jax import lax

from awm_jax import validate
from awm_jax.models import ops
from awm_jax.types import ForeignArch, Params

# Names by which modules are told their mode, and what each is in training.
_MODES = {"train": True, "training": True, "deterministic": False, "use_running_average": False}
# What Flax tells every convolution.
_CONVOLUTION = {"lhs_dilation", "rhs_dilation", "dimension_numbers", "feature_group_count",
                "precision"}
_COLLECTIONS = ("params", "batch_stats")


def mode(module: nn.Module, *, train: bool) -> dict[str, Any]:
    """The arguments that put a module into training or evaluation, by the names it has for them.

    Args:
      module: any module; ours all have ``train``.
      train: whether dropout and batch statistics are wanted.

    Returns:
      Keyword arguments of its ``__call__``; none if it has no such argument.

    Example:
      >>> mode(nn.Dropout(0.1), train=True)
      {'deterministic': False}
    """
    taken = inspect.signature(type(module).__call__).parameters
    return {name: train is in_training for name, in_training in _MODES.items() if name in taken}


def apply(module: nn.Module, variables: Any, images: jax.Array, *, train: bool,
          **options: Any) -> Any:
    """``module.apply`` in a mode, its plain convolutions lowered as ours are.

    Args:
      module: any module.
      variables: its collections.
      images: ``[B, H, W, C]``.
      train: whether dropout and batch statistics are wanted.
      **options: more arguments of ``module.apply``.

    Returns:
      What the module returns, and the mutable collections if there are any.

    Example:
      >>> apply(nn.Conv(4, (3, 3)), {'params': {'kernel': jnp.ones((3, 3, 1, 4)),
      ...       'bias': jnp.zeros(4)}}, jnp.ones((2, 8, 8, 1)), train=False).shape
      (2, 8, 8, 4)
    """
    with nn.intercept_methods(_lower_convolutions):
        return module.apply(variables, images, **mode(module, train=train), **options)


def puts_out(made: Sequence[tuple[str, Any]], logits: Any) -> str | None:
    """Of dense layers and what they put out, in the order of their use, which gives the logits.

    Args:
      made: ``(name, output)``.
      logits: ``[B, c]`` what the network returns.

    Returns:
      The name of the layer that made the logits; else of the only one with outputs of their shape,
      as something may have been done to them; None where that is none or several.

    Example:
      >>> x = jnp.ones((2, 3))
      >>> puts_out([('hidden', x + 1), ('out', x), ('beside', x + 2)], x)
      'out'
    """
    itself = [name for name, out in made if out is logits]
    alike = [name for name, out in made if out.shape == logits.shape]
    return itself[-1] if itself else alike[0] if len(set(alike)) == 1 else None


def first_argument(args: tuple, kwargs: dict[str, Any]) -> Any:
    """What a layer was called with, however it was said.

    Example:
      >>> first_argument((), {'inputs': 3})
      3
    """
    return args[0] if args else kwargs["inputs"]


def _lower_convolutions(call, args, kwargs, context):
    """Gives a convolution that asks for no lowering of its own ours, for the length of a call."""
    layer = context.module
    if (context.method_name != "__call__" or not isinstance(layer, nn.Conv)
            or layer.conv_general_dilated or layer.conv_general_dilated_cls):
        return call(*args, **kwargs)
    # The layer is the copy that Flax bound for this application, frozen to its users alone.
    object.__setattr__(layer, "conv_general_dilated", convolution)
    try:
        return call(*args, **kwargs)
    finally:
        object.__setattr__(layer, "conv_general_dilated", None)


def convolution(x, kernel, strides, padding, **options):
    """`ops.flax_conv` where it gives what XLA's own convolution gives, and that elsewhere."""
    groups = options["feature_group_count"]
    options = {name: value for name, value in options.items()  # others ask for something special
               if value is not None or name in _CONVOLUTION}
    plain = (options.keys() <= _CONVOLUTION
             and x.ndim == 4 and x.dtype in (jnp.float32, jnp.float64)
             and options["precision"] is None
             and set(options["lhs_dilation"]) | set(options["rhs_dilation"]) == {1}
             and groups in (1, x.shape[-1]) and (groups == 1 or kernel.shape[-1] == groups)
             and (isinstance(padding, str) or min(p for pair in padding for p in pair) >= 0))
    if plain:
        return ops.flax_conv(x, kernel, strides, padding, **options)
    return lax.conv_general_dilated(x, kernel, strides, padding, **options)


def params(module: nn.Module, variables: Mapping[str, Any], *, image_shape: tuple[int, int, int],
           mean: tuple[float, ...], std: tuple[float, ...], name: str = "") -> Params:
    """`Params.from_flax`; arguments, result and errors as there, ``name`` for another than its own.

    Example: `params(net, variables, image_shape=(8, 8, 3), mean=(0, 0, 0), std=(1, 1, 1))`.
    """
    module = _static(module)
    name = name or f"flax:{type(module).__name__}"
    image_shape = validate.image_shape(image_shape)
    mean, std = _normalisation(mean, std, image_shape[2])
    weights, batch_stats = _collections(name, variables)
    variables = {"params": weights, "batch_stats": batch_stats}
    num_classes = _classes(module, name, variables, image_shape)
    if batch_stats:
        _check_modes(module, name, variables, image_shape)
    arch = ForeignArch(name=name, num_classes=num_classes, image_shape=image_shape, mean=mean,
                       std=std, module=module)
    return Params(weights, batch_stats, arch)


def _check_modes(module: nn.Module, name: str, variables: Any,
                 image_shape: tuple[int, int, int]) -> None:
    """ValueError for a module that uses a batch's statistics when it is told to evaluate.

    Warns (UserWarning) where training is the same as evaluation, though there are statistics.
    """
    images = jax.random.uniform(jax.random.key(0), (2, *image_shape))

    @jax.jit
    def shift(variables, images):
        both, alone = (apply(module, variables, x, train=False) for x in (images, images[:1]))
        return jnp.abs(both[:1] - alone).max() / (1 + jnp.abs(alone).max())

    accepted = ", ".join(_MODES)
    if shift(variables, images) > 1e-3:
        raise ValueError(f"Expected {name}, told to evaluate, to give an image the same logits "
                         "whatever else is in its batch; it normalises by the batch. Give its "
                         f"__call__ one of these arguments: {accepted}.")
    if not mode(module, train=True):
        warnings.warn(f"{name} has BatchNorm statistics and no argument for its mode ({accepted}): "
                      "defences that train it will keep these statistics as they are.",
                      UserWarning, stacklevel=4)


def _static(module: Any) -> nn.Module:
    """The module with tuples for lists, so that `jit` takes it; TypeError for what it cannot."""
    if isinstance(module, type) and issubclass(module, nn.Module):
        raise TypeError(f"Expected an instance of a Flax module, got the class {module.__name__}. "
                        f"Give {module.__name__}(...).")
    if not isinstance(module, nn.Module):
        raise TypeError(f"Expected a Flax Linen module (flax.linen.Module), got "
                        f"{type(module).__name__}. Params.from_nnx takes NNX models; write another "
                        "network as either.")
    frozen = _frozen(module)
    try:
        hash(frozen)
    except TypeError as error:
        raise TypeError(f"Expected a module whose fields are all hashable, {type(module).__name__} "
                        "has one that is not. Make arrays in __call__ or setup instead.") from error
    return frozen


def _frozen(value: Any) -> Any:
    """Tuples for lists and frozen dictionaries for others, also in modules that are fields."""
    if isinstance(value, list) or type(value) is tuple:
        new = tuple(map(_frozen, value))
        same = type(value) is tuple and all(a is b for a, b in zip(new, value, strict=True))
        return value if same else new
    if isinstance(value, dict):
        return core.freeze({key: _frozen(inner) for key, inner in value.items()})
    if isinstance(value, nn.Module):
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)
                  if field.init and field.name not in ("parent", "name")}
        frozen = {name: _frozen(inner) for name, inner in fields.items()}
        # Only where it must be: a module that two others share would become two.
        changed = {name: inner for name, inner in frozen.items() if inner is not fields[name]}
        return value.clone(**changed) if changed else value
    return value


def _normalisation(mean: Any, std: Any, channels: int
                   ) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and scale as tuples; ValueError where they do not fit the channels."""
    mean, std = tuple(map(float, mean)), tuple(map(float, std))
    validate.normalisation(mean, std, channels)
    return mean, std


def _collections(name: str, variables: Mapping[str, Any]) -> tuple[Any, Any]:
    """Weights and BatchNorm statistics in float32; ValueError for anything else."""
    if not isinstance(variables, Mapping) or "params" not in variables:
        raise ValueError(f"Expected the variables of {name}, with a collection 'params', got "
                         f"{_described(variables)}. Give what module.init returned.")
    others = sorted(set(variables) - set(_COLLECTIONS))
    if others:
        raise ValueError(f"Expected no collections but params and batch_stats in the variables of "
                         f"{name}, got also {', '.join(others)}. Leave out what a call does not "
                         "need (module.init adds what is sown); others cannot be kept.")
    found = nn.unbox({key: core.unfreeze(variables.get(key, {})) for key in _COLLECTIONS})
    for path, leaf in jax.tree_util.tree_leaves_with_path(found):
        kind = getattr(leaf, "dtype", None)
        if kind is None or not jnp.issubdtype(kind, jnp.floating):
            where = jax.tree_util.keystr(path, simple=True, separator="/")
            raise ValueError(f"Expected arrays of floats in the variables of {name}, {where} is "
                             f"{kind or type(leaf).__name__}.")
    found = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), found)
    return found["params"], found["batch_stats"]


def _described(variables: Any) -> str:
    """A few words on what was given as variables."""
    if isinstance(variables, Mapping):
        return f"collections {', '.join(map(str, variables)) or '(none)'}"
    return type(variables).__name__


def _classes(module: nn.Module, name: str, variables: Any,
             image_shape: tuple[int, int, int]) -> int:
    """How many logits the module returns; ValueError where it returns none, or cannot be run."""
    # Two images: with one, [B, c] and [c, B] could not be told apart from [1, c] of something else.
    images = jax.ShapeDtypeStruct((2, *image_shape), jnp.float32)
    size = "x".join(map(str, image_shape))
    try:
        found = jax.eval_shape(lambda v, x: apply(module, v, x, train=False), variables, images)
    except Exception as error:  # whatever the module's own code raises
        reason = " ".join(str(error).split())
        raise ValueError(f"Expected {name} to take these variables and images of {size}, in "
                         f"evaluation, with no more arguments: {type(error).__name__}: "
                         f"{reason[:300]}") from error
    shape = getattr(found, "shape", None)
    if shape is None or len(shape) != 2 or shape[0] != 2 or shape[1] < 2:
        got = type(found).__name__ if shape is None else f"{list(shape)} for two images"
        raise ValueError(f"Expected {name} to return logits [B, c], c >= 2, of images of {size}, "
                         f"got {got}. Wrap it in a module that does.")
    return int(shape[1])
