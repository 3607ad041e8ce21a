"""Weight masks: explicit trees shaped like the weights, None where a leaf is left alone."""

from typing import Any

import jax
import jax.numpy as jnp

from awm_jax.types import Masks, Weights


def layer_names(weights: Weights) -> list[str]:
    """Slash-joined paths of the layers that own a kernel, in order.

    Example:
      >>> layer_names({'conv1': {'kernel': jnp.ones((3, 3, 1, 2)), 'bias': jnp.ones(2)}})
      ['conv1']
    """
    paths = [p for p, _ in jax.tree_util.tree_leaves_with_path(weights)]
    return [layer_of(p) for p in paths if _name(p[-1:]) == "kernel"]


def layer_of(path: Any) -> str:
    """The slash-joined name of the layer that owns the leaf at a tree path.

    Example:
      >>> layer_of((jax.tree_util.DictKey('block'), jax.tree_util.DictKey('conv1'),
      ...           jax.tree_util.DictKey('kernel')))
      'block/conv1'
    """
    return _name(path[:-1])


def _name(path: Any) -> str:
    """Slash-joined keys of a tree path."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def init(weights: Weights, layers: str | tuple[str, ...] = "conv", *,
         classifier: str | None = "dense") -> Masks:
    """All-ones masks over the chosen kernels (Algorithm 1, line 1).

    Args:
      weights: nested dict of arrays.
      layers: ``'conv'`` (4-d kernels; in a network without any, all but the
        ``classifier``'s), ``'all'`` (dense kernels too), or a tuple of layer names as
        `layer_names` lists them (Table 9's VGG-i is ``('conv<i>',)``).
      classifier: name of the layer whose outputs are the classes, as `awm_jax.models.classifier`
        finds it; None without any.

    Returns:
      A tree of ones shaped like the chosen kernels, None elsewhere.

    Raises:
      ValueError: a name that no layer has, or nothing to mask.

    Example:
      >>> init({'dense': {'kernel': jnp.ones((2, 2)), 'bias': jnp.ones(2)}}, 'all')['dense']['bias']
    """
    names = layer_names(weights)
    if not isinstance(layers, str):
        unknown = sorted(set(layers) - set(names))
        if unknown:
            raise ValueError(f"Expected layers among {', '.join(names)}; got {', '.join(unknown)}.")
    elif layers not in ("conv", "all"):
        raise ValueError(f"Expected layers={layers!r} to be 'conv', 'deep' (AWM's own), 'all' or a "
                         "tuple of names.")

    kernels = [leaf for path, leaf in jax.tree_util.tree_leaves_with_path(weights)
               if _name(path[-1:]) == "kernel"]
    convolutional = any(kernel.ndim == 4 for kernel in kernels)

    def chosen(path, leaf):
        if _name(path[-1:]) != "kernel":
            return None
        if layers == "all":
            keep = True
        elif layers == "conv":
            keep = leaf.ndim == 4 if convolutional else _name(path[:-1]) != classifier
        else:
            keep = _name(path[:-1]) in layers
        return jnp.ones_like(leaf) if keep else None

    masks = jax.tree_util.tree_map_with_path(chosen, weights)
    if not jax.tree.leaves(masks):
        raise ValueError(f"Expected {layers=} to select a kernel; layers here: {', '.join(names)}.")
    return masks


def apply(weights: Weights, masks: Masks | None) -> Weights:
    """``m * w`` leaf by leaf; a None mask leaves its weight as it is.

    Example:
      >>> apply({'a': jnp.ones(2), 'b': jnp.ones(1)}, {'a': jnp.zeros(2), 'b': None})['a'].tolist()
      [0.0, 0.0]
    """
    if masks is None:
        return weights
    # The weights lead: a None in the masks would end the traversal there.
    return jax.tree.map(lambda w, m: w if m is None else w * m, weights, masks)


def clip(masks: Masks) -> Masks:
    """Every mask value clipped to [0, 1] (Algorithm 1, line 13).

    Example:
      >>> clip({'a': jnp.array([-1., .5, 2.]), 'b': None})['a'].tolist()
      [0.0, 0.5, 1.0]
    """
    return jax.tree.map(lambda m: jnp.clip(m, 0.0, 1.0), masks)


def l1(masks: Masks) -> jax.Array:
    """``sum |m|`` over all masked weights, a scalar.

    Example:
      >>> float(l1({'a': jnp.array([1., -2.]), 'b': None}))
      3.0
    """
    return sum((jnp.abs(m).sum() for m in jax.tree.leaves(masks)), start=jnp.zeros(()))


def size(masks: Masks) -> int:
    """How many weights the masks cover.

    Example:
      >>> size({'a': jnp.ones((2, 3)), 'b': None})
      6
    """
    return sum(m.size for m in jax.tree.leaves(masks))


def by_layer(masks: Masks) -> dict[str, jax.Array]:
    """Mask values by layer name, flattened: what the histogram of Figure 5 draws.

    Example:
      >>> list(by_layer({'conv1': {'kernel': jnp.ones((1, 1, 1, 1)), 'bias': None}}))
      ['conv1']
    """
    return {_name(p[:-1]): m.ravel() for p, m in jax.tree_util.tree_leaves_with_path(masks)}
