"""What the steps of Adversarial Weight Masking draw: clean images, and triggers to replay."""

from typing import Any

import jax
import jax.numpy as jnp

from awm_jax.data import augment, mixing
from awm_jax.defences.awm_config import Settings


def prepare(key: jax.Array, images: jax.Array, labels: jax.Array,
            settings: Settings) -> tuple[jax.Array, jax.Array]:
    """The clean images and, after them, ``copies`` augmented copies of each.

    Args:
      key: PRNG key of the whole run.
      images: ``[n, H, W, C]`` in [0, 1].
      labels: ``[n]`` their classes.
      settings: ``copies``, ``flip`` and ``epochs``, which keeps its key apart from theirs.

    Returns:
      ``[n (1 + copies), H, W, C]`` and ``[n (1 + copies)]``.

    Example:
      >>> from awm_jax.defences import AWMConfig
      >>> settings = AWMConfig(variant='paper', copies=2).resolve(3, (8, 8, 3))
      >>> prepare(jax.random.key(0), jnp.ones((3, 8, 8, 3)), jnp.arange(3), settings)[1].shape
      (9,)

    Reference: AWM paper, section 5.1.
    """
    if not settings.copies:
        return images, labels
    keys = jax.random.split(jax.random.fold_in(key, settings.epochs), settings.copies)
    copies = [augment.crop_flip(k, images, flip=settings.flip) for k in keys]
    return jnp.concatenate([images, *copies]), jnp.tile(labels, 1 + settings.copies)


def minibatch(key: jax.Array, images: jax.Array, labels: jax.Array, settings: Settings, *,
              strong: bool = False) -> tuple[jax.Array, jax.Array]:
    """A minibatch: images without replacement (whole reshuffles of too few), augmented if asked.

    Args:
      key: PRNG key.
      images: ``[n, H, W, C]`` in [0, 1].
      labels: ``[n]`` anything that belongs to each.
      settings: ``batch_size``, ``augment`` and ``flip``.
      strong: where images are augmented, use `awm_jax.data.augment.strong`, and paste rectangles
        of other images instead of columns.

    Returns:
      ``[batch_size, H, W, C]`` and ``[batch_size]``.

    Example:
      >>> from awm_jax.defences import AWMConfig
      >>> settings = AWMConfig().resolve(3, (8, 8, 3))
      >>> minibatch(jax.random.key(0), jnp.ones((3, 8, 8, 3)), jnp.arange(3), settings)[0].shape
      (16, 8, 8, 3)
    """
    key_pick, key_crop, key_mix = jax.random.split(key, 3)
    count, size = len(images), settings.batch_size
    rounds = jax.random.split(key_pick, -(-size // count))
    picks = jax.vmap(lambda k: jax.random.permutation(k, count))(rounds).ravel()[:size]
    images, labels = images[picks], labels[picks]
    if settings.augment:
        change = augment.strong if strong else augment.crop_flip
        images = change(key_crop, images, flip=settings.flip)
        images = mixing.mix(key_mix, images, boxes=strong)
    return images, labels


def replayed(key: jax.Array, new: Any, old: Any, epoch: jax.Array, settings: Settings) -> Any:
    """One trigger an image: this epoch's, or with probability ``replay`` an earlier one.

    Args:
      key: PRNG key.
      new: this epoch's trigger, a tree of arrays such as ``[H, W, C]``.
      old: a tree like it of ``[epochs + suspects, ...]``, as `awm_steps.AWMState` keeps them.
      epoch: the epoch's number, from 0.
      settings: ``batch_size``, ``epochs`` and ``replay``.

    Returns:
      A tree of ``[batch_size, ...]``.

    Example:
      >>> from awm_jax.defences import AWMConfig
      >>> settings = AWMConfig(epochs=2).resolve(3, (8, 8, 3))
      >>> none = jnp.zeros((6, 8, 8, 3))
      >>> replayed(jax.random.key(0), jnp.ones((8, 8, 3)), none, jnp.array(0), settings).shape
      (16, 8, 8, 3)
    """
    key_old, key_which = jax.random.split(key)
    surveyed = len(jax.tree.leaves(old)[0]) - settings.epochs
    earlier = surveyed + epoch
    which = jax.random.randint(key_which, (settings.batch_size,), 0, jnp.maximum(earlier, 1))
    again = jax.random.bernoulli(key_old, settings.replay, (settings.batch_size, 1, 1, 1))
    # The survey's lie at the end, so the first of them is at -surveyed.
    return jax.tree.map(lambda this, before: jnp.where(again & (earlier > 0),
                                                       before[which - surveyed], this[None]),
                        new, old)
