"""A Flax NNX model as the Linen module that everything here takes."""

import contextlib
import dataclasses
import math
import threading
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import nnx
from jax import lax

from awm_jax import validate
from awm_jax.models import foreign
from awm_jax.types import Params

_one_at_a_time = threading.Lock()


class FromNNX(nn.Module):
    """An NNX model, in training and in evaluation, as a Linen module.

    Flax's own `flax.nnx.bridge.ToLinen` has no argument that tells the model its mode.

    Args:
      train_def: its graph after ``model.train()``.
      eval_def: its graph after ``model.eval()``.
      streams: structure of the state of its random streams.
      keys: which leaves of that are keys, not counters.
      shapes: ``(collection, path, shape)`` of every array.
      areas: ``(name, pixels)`` of what every convolution puts out, in the order of their use.
      fed: ``(norm, convolution)`` of every BatchNorm that one convolution feeds.
      classifier: name of the dense layer that gives the logits, None without any.
    """

    train_def: Any
    eval_def: Any
    streams: Any
    keys: tuple[bool, ...]
    shapes: tuple[tuple[str, tuple[str, ...], tuple[int, ...]], ...]
    areas: tuple[tuple[str, int], ...] = ()
    fed: tuple[tuple[str, str], ...] = ()
    classifier: str | None = None

    def norm_inputs(self) -> dict[str, str]:
        """BatchNorm layers and the convolution that feeds each."""
        return dict(self.fed)

    def convolution_areas(self) -> dict[str, int]:
        """Pixels of what every convolution puts out."""
        return dict(self.areas)

    def last_dense(self) -> str | None:
        """Name of the dense layer that gives the logits."""
        return self.classifier

    def inputs_of(self, variables: Any, images: Any, name: str) -> Any:
        """What a dense layer sees, in evaluation."""
        model = self.merged(variables, jax.random.key(0), train=False)
        names, seen = _names(model), []

        def linear(call: Callable, layer, *args, **kwargs):
            if names.get(id(layer)) == name:
                seen.append(foreign.first_argument(args, kwargs))
            return call(layer, *args, **kwargs)

        with _one_at_a_time, _watched(nnx.Linear, linear):
            model(images)
        return seen[-1]

    def merged(self, variables: Any, key: jax.Array, *, train: bool) -> Any:
        """The model itself, with these arrays; its convolutions lowered as ours are."""
        streams = jax.tree.unflatten(self.streams, [
            jax.random.fold_in(key, i) if is_key else jnp.zeros((), jnp.uint32)
            for i, is_key in enumerate(self.keys)])
        model = nnx.merge(self.train_def if train else self.eval_def,
                          nnx.State(_variables(variables["params"], nnx.Param)),
                          nnx.State(_variables(variables.get("batch_stats", {}), nnx.BatchStat)),
                          streams)
        for _, layer in nnx.iter_graph(model):
            if isinstance(layer, nnx.Conv) and (
                    layer.conv_general_dilated is lax.conv_general_dilated):
                layer.conv_general_dilated = foreign.convolution
        return model

    @nn.compact
    def __call__(self, x, train: bool):
        """What the model returns."""
        if self.is_initializing():
            self._blank()
        # In evaluation nothing is drawn.
        key = self.make_rng("dropout") if train else jax.random.key(0)
        model = self.merged(self.variables, key, train=train)
        out = model(x)
        if train and self.is_mutable_collection("batch_stats"):
            for name, value in _named(nnx.state(model, nnx.BatchStat)).items():
                self.put_variable("batch_stats", name, value)
        return out

    def _blank(self) -> None:
        """Arrays of zeros: how they are drawn is known to the model's own code alone."""
        trees: dict[str, Any] = {}
        for collection, path, shape in self.shapes:
            inner = trees.setdefault(collection, {})
            for part in path[:-1]:
                inner = inner.setdefault(part, {})
            inner[path[-1]] = jnp.zeros(shape)
        for collection, tree in trees.items():
            for name, value in tree.items():
                self.put_variable(collection, name, value)


def _named(state: Any) -> Any:
    """A state as nested dictionaries, the numbers of lists as text."""
    def convert(tree):
        return ({str(name): convert(inner) for name, inner in tree.items()}
                if isinstance(tree, dict) else tree)

    return convert(nnx.to_pure_dict(state))


def _variables(tree: Any, kind: type) -> Any:
    """`_named`'s inverse: each array a variable of a kind."""
    if not hasattr(tree, "items"):
        return kind(tree)
    return {int(name) if name.isdigit() else name: _variables(inner, kind)
            for name, inner in tree.items()}


def params(model: Any, *, image_shape: tuple[int, int, int], mean: tuple[float, ...],
           std: tuple[float, ...]) -> Params:
    """`Params.from_nnx`; arguments, result and errors as there.

    Example: `params(model, image_shape=(8, 8, 3), mean=(0, 0, 0), std=(1, 1, 1))`.
    """
    if not isinstance(model, nnx.Module):
        raise TypeError(f"Expected a Flax NNX model (flax.nnx.Module), got {type(model).__name__}. "
                        "Params.from_flax takes Linen modules.")
    model = nnx.clone(model)  # whose mode may be changed
    model.train()
    parts: Any = nnx.split(model, nnx.Param, nnx.BatchStat, nnx.RngState, ...)
    train_def, weights, stats, streams, others = parts
    if jax.tree.leaves(others):
        kinds = sorted({type(leaf).__name__ for leaf in jax.tree.leaves(
            others, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))})
        raise ValueError("Expected no variables but Param, BatchStat and random streams in "
                         f"{type(model).__name__}, got also {', '.join(kinds)}. Others cannot be "
                         "kept.")
    model.eval()
    leaves, structure = jax.tree.flatten(streams)
    variables = {"params": _named(weights), "batch_stats": _named(stats)}
    shim = FromNNX(
        train_def, nnx.split(model)[0], structure,
        tuple(jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) for leaf in leaves),
        tuple((path[0].key, tuple(part.key for part in path[1:]), jnp.shape(leaf))
              for path, leaf in jax.tree_util.tree_leaves_with_path(variables)))
    name, image_shape = f"nnx:{type(model).__name__}", validate.image_shape(image_shape)
    found = foreign.params(shim, variables, image_shape=image_shape, mean=mean, std=std, name=name)
    shim = shim.clone(**_wiring(shim, variables, image_shape))
    arch = dataclasses.replace(found.arch, module=shim)  # type: ignore
    return dataclasses.replace(found, arch=arch)


def _names(model: nnx.Module) -> dict[int, str]:
    """Slash-joined names of a model's layers, by identity."""
    return {id(layer): "/".join(map(str, path)) for path, layer in nnx.iter_graph(model)}


def _wiring(shim: FromNNX, variables: Any, image_shape: tuple[int, int, int]) -> dict[str, Any]:
    """`FromNNX`'s ``areas``, ``fed`` and ``classifier``, of one call that is followed."""
    areas: dict[str, int] = {}
    fed: dict[str, str] = {}
    made: list[tuple[str, Any]] = []  # kept, so that no two have the same identity
    dense: list[tuple[str, Any]] = []
    last: list[str | None] = []

    def look(variables, x):
        model = shim.merged(variables, jax.random.key(0), train=False)
        names = _names(model)

        def conv(call: Callable, layer, inputs, *args, **kwargs):
            out = call(layer, inputs, *args, **kwargs)
            if out.ndim == 4 and id(layer) in names:  # else made for this call alone
                made.append((names[id(layer)], out))
                areas[names[id(layer)]] = math.prod(out.shape[1:-1])
            return out

        def norm(call: Callable, layer, inputs, *args, **kwargs):
            if layer.use_scale and id(layer) in names:
                fed.update((names[id(layer)], name) for name, out in made if out is inputs)
            return call(layer, inputs, *args, **kwargs)

        def linear(call: Callable, layer, *args, **kwargs):
            out = call(layer, *args, **kwargs)
            if id(layer) in names:
                dense.append((names[id(layer)], out))
            return out

        # NNX has nothing that intercepts calls, as Linen has.
        with (_one_at_a_time, _watched(nnx.Conv, conv), _watched(nnx.BatchNorm, norm),
              _watched(nnx.Linear, linear)):
            logits = model(x)
        last.append(foreign.puts_out(dense, logits))
        return logits

    jax.eval_shape(look, variables, jax.ShapeDtypeStruct((2, *image_shape), jnp.float32))
    return {"areas": tuple(areas.items()), "fed": tuple(fed.items()), "classifier": last[0]}


@contextlib.contextmanager
def _watched(kind: Any, watch: Callable) -> Iterator[None]:
    """While within, ``watch(call, layer, ...)`` stands for the calls of a kind of layer."""
    call = kind.__call__
    kind.__call__ = lambda layer, *args, **kwargs: watch(call, layer, *args, **kwargs)
    try:
        yield
    finally:
        kind.__call__ = call


def update(model: Any, params: Params) -> None:
    """`Params.to_nnx`; arguments and errors as there.

    Example: `update(model, purified.params)`.
    """
    if not isinstance(model, nnx.Module) or not isinstance(
            getattr(params.arch, "module", None), FromNNX):
        raise TypeError("Expected an NNX model, and a network that Params.from_nnx made of one; "
                        f"got {type(model).__name__} and {params.arch.name}.")
    for kind, tree in ((nnx.Param, params.weights), (nnx.BatchStat, params.batch_stats)):
        own = jax.tree.map(jnp.shape, _named(nnx.state(model, kind)))
        if own != jax.tree.map(jnp.shape, tree):
            raise ValueError(f"Expected {type(model).__name__} to have the arrays of "
                             f"{params.arch.name}, it has {kind.__name__}s of other names or "
                             "shapes. Give a model of the same class and sizes.")
        nnx.update(model, nnx.State(_variables(tree, kind)))
