"""BatchNorm statistics that follow changed weights, from the defender's few clean images."""

from collections.abc import Callable
from typing import Any

import jax

from awm_jax import models
from awm_jax.models import norms
from awm_jax.types import Masks, Params


def batch_stats(keys: jax.Array, params: Params, masks: Masks | None,
                draw: Callable[[jax.Array], jax.Array]) -> Any:
    """Statistics of the masked network, moved as far as its layers' inputs moved.

    Layer by layer, on each minibatch both networks are run; see `awm_jax.models.norms.moved`. The
    layers before are recalibrated already when a layer's inputs are looked at.

    Masks that take weight away leave each layer less to normalise than its running statistics
    say. Fresh statistics of ten images would be those of ten images; the difference that the masks
    make on the same images is what the masks do.

    Args:
      keys: ``[K]`` PRNG keys, one a minibatch.
      params: the network.
      masks: its masks; None for none.
      draw: ``key -> [B, H, W, C]`` clean images in [0, 1]; no triggered ones.

    Returns:
      A tree like ``params.batch_stats``; layers that are not `flax.linen.BatchNorm` over the last
      axis, or that a lifted transformation hides, keep theirs.

    Example:
      >>> from awm_jax.types import Arch
      >>> params = models.create(jax.random.key(0), Arch(name='small_vgg', num_classes=2,
      ...                                                image_shape=(8, 8, 3)))
      >>> found = batch_stats(jax.random.split(jax.random.key(1), 2), params, None,
      ...                     lambda key: jax.random.uniform(key, (4, 8, 8, 3)))
      >>> bool(abs(found['bn1']['var'] - 1).max() < 1e-5)  # no masks, no change
      True
    """
    def look(_, key):
        images = draw(key)
        was = models.norm_moments(params, images)
        return None, (was, models.norm_moments(params, images, masks=masks, beside=was))

    _, both = jax.lax.scan(look, None, keys)
    was, now = jax.tree.map(lambda leaf: leaf.mean(axis=0), both)
    found = params.batch_stats
    for name in was:
        path = tuple(name.split("/"))
        new = norms.moved(norms.at(found, path), was[name], now[name])
        found = _replaced(found, path, new)
    return found


def _replaced(tree: Any, path: tuple[str, ...], new: Any) -> Any:
    """The tree with another node at a path."""
    if not path:
        return {**tree, **new}
    return {**tree, path[0]: _replaced(tree[path[0]], path[1:], new)}
