"""What enters each BatchNorm, and statistics that move with it where weights were changed."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

COLLECTION = "norm_moments"


class Moments(NamedTuple):
    """First and second moment of what enters a BatchNorm layer, channel by channel.

    Args:
      mean: ``[C]``.
      square: ``[C]`` the mean of the squares.
      epsilon: scalar, what the layer adds to a variance.
    """

    mean: jax.Array
    square: jax.Array
    epsilon: jax.Array


def moved(stats: Mapping[str, jax.Array], was: Moments, now: Moments) -> dict[str, jax.Array]:
    """Running statistics moved as the inputs moved, from one network to another on equal images.

    ``var' + eps = r (var + eps)``, ``mean' = E[now] + sqrt(r) (mean - E[was])`` with
    ``r = (V[now] + eps) / (V[was] + eps)``

    What a few images say of a mean is uncertain; what they say of a change is much less so, since
    both networks see the same ones: equal networks keep their statistics, and where all inputs of
    a layer are scaled and shifted alike (by much more than eps), it puts out what it did.

    Args:
      stats: ``{'mean': [C], 'var': [C]}`` of the network that was.
      was: moments in that network.
      now: moments in the other, on the same images.

    Returns:
      ``{'mean': [C], 'var': [C]}``.

    Example:
      >>> was, now = (Moments(*map(jnp.array, m)) for m in ((1., 2., 0.), (3., 13., 0.)))
      >>> found = moved({'mean': jnp.array(.5), 'var': jnp.array(2.)}, was, now)
      >>> float(found['mean']), float(found['var'])
      (2.0, 8.0)
    """
    mean, var, epsilon = stats["mean"], stats["var"], was.epsilon
    ratio = (_variance(now) + epsilon) / (_variance(was) + epsilon)
    new = {"mean": now.mean + jnp.sqrt(ratio) * (mean - was.mean),
           # A variance of 0 times a ratio under 1 would be below.
           "var": jnp.maximum(ratio * (var + epsilon) - epsilon, 0.0)}
    return {name: leaf.astype(stats[name].dtype) for name, leaf in new.items()}


def _variance(moments: Moments) -> jax.Array:
    """``E x^2 - (E x)^2``, never below 0 by rounding."""
    return jnp.maximum(moments.square - jnp.square(moments.mean), 0.0)


def sowing(call, args, kwargs, context):
    """An interceptor that sows the moments of what enters each BatchNorm.

    Sown, not handed out: what a lifted transformation such as `nn.scan` keeps inside stays there,
    and its layers have no moments.

    Example: see `awm_jax.models.norm_moments`.
    """
    if _is_norm(context, args):
        _sow(context.module, _moments(context.module, args[0]))
    return call(*args, **kwargs)


def moving(batch_stats: Any, reference: Mapping[str, Moments]):
    """An interceptor under which each BatchNorm normalises by statistics that `moved` gives.

    Args:
      batch_stats: the statistics that the layers have.
      reference: from `read`, of the network that was, by slash-joined paths; layers without an
        entry are left as they are.

    Returns:
      An interceptor; it sows as `sowing` does.

    Example: see `awm_jax.models.norm_moments`.
    """
    def intercept(call, args, kwargs, context):
        name = "/".join(context.module.path)
        if not _is_norm(context, args) or name not in reference:
            return sowing(call, args, kwargs, context)
        x, epsilon, stats = args[0], context.module.epsilon, at(batch_stats, context.module.path)
        now = _moments(context.module, x)
        new = moved(stats, reference[name], now)
        _sow(context.module, now)
        # Another input instead of other statistics, which in evaluation cannot be changed.
        scale = jnp.sqrt((stats["var"] + epsilon) / (new["var"] + epsilon))
        wide = tuple(range(x.ndim - 1))
        shifted = x - jnp.expand_dims(new["mean"], wide)
        x = shifted * jnp.expand_dims(scale, wide) + jnp.expand_dims(stats["mean"], wide)
        return call(x.astype(args[0].dtype), *args[1:], **kwargs)

    return intercept


def read(sown: Mapping[str, Any], batch_stats: Any) -> dict[str, Moments]:
    """Moments by slash-joined paths of their layers, of layers with statistics of that size.

    Args:
      sown: the collection that an application gave back.
      batch_stats: the network's statistics.

    Example: see `awm_jax.models.norm_moments`.
    """
    found = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(
            sown, is_leaf=lambda node: isinstance(node, Moments)):
        keys = tuple(part.key for part in path[:-1])
        stats = at(batch_stats, keys)
        if stats is not None and stats["mean"].shape == leaf.mean.shape:
            found["/".join(keys)] = leaf
    return found


def at(tree: Any, path: tuple[str, ...]) -> Any:
    """What a nested dictionary has at a path, None if nothing.

    Example:
      >>> at({'block': {'bn1': 3}}, ('block', 'bn1'))
      3
    """
    for key in path:
        if key not in tree:
            return None
        tree = tree[key]
    return tree


def _is_norm(context, args) -> bool:
    """Whether a call is that of a BatchNorm over the last axis."""
    layer = context.module
    return (isinstance(layer, nn.BatchNorm) and context.method_name == "__call__" and bool(args)
            and layer.axis in (-1, args[0].ndim - 1))


def _sow(layer: nn.BatchNorm, moments: Moments) -> None:
    """Leaves a layer's moments in the collection, the last call's if there are several."""
    layer.sow(COLLECTION, "moments", moments, reduce_fn=lambda _, new: new, init_fn=lambda: None)


def _moments(layer: nn.BatchNorm, x: jax.Array) -> Moments:
    """Over all axes but the last."""
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    axes = tuple(range(x.ndim - 1))
    return Moments(x.mean(axes), jnp.square(x).mean(axes), jnp.asarray(layer.epsilon, x.dtype))
