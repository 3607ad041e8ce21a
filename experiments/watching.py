"""FT-SAM's own run, watched: gradient norms at its worst point and the ASR, epoch by epoch."""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from awm_jax import explain, models
from awm_jax.defences import tuning
from awm_jax.defences.ft_sam import FTSAMConfig, sharpness_aware
from awm_jax.types import Params


class Watched(NamedTuple):
    """What was seen at the first batch of each epoch, before its step.

    Args:
      params: the network after the last of these epochs.
      norms: ``[epochs, k]``, `explain.neuron_norms` of the gradient that is followed.
      asr: ``[epochs]`` in [0, 1], of the triggered images that were given.
    """

    params: Params
    norms: jax.Array
    asr: jax.Array


def watch(key: jax.Array, params: Params, images: jax.Array, labels: jax.Array,
          config: FTSAMConfig, triggered: jax.Array, wanted: jax.Array,
          count: int = 8) -> Watched:
    """The first epochs of the run that `defences.ft_sam` makes with this key, as it makes them.

    Triggered images are looked at beside each step, for analysis only: the step does not depend
    on them.

    Args:
      key: PRNG key, the defence's.
      params: the suspect network.
      images: ``[n, H, W, C]`` float32 in [0, 1], the defence's clean images.
      labels: ``[n]`` int32.
      config: the defence's settings, without label smoothing.
      triggered: ``[m, H, W, C]`` float32 in [0, 1].
      wanted: ``[m]`` the attacker's classes for them.
      count: epochs, >= 1; all of the run's where it has fewer.

    Returns:
      `Watched`.

    Raises:
      ValueError: settings with label smoothing, or a network without a convolution.

    Example: see `experiments.visualise`.

    Reference: FT-SAM (Zhu et al. 2023), supplement, section F and Figure 1.
    """
    if config.label_smoothing:
        raise ValueError(f"Expected label_smoothing=0, got {config.label_smoothing}.")
    return _watch(key, params, jnp.asarray(images), jnp.asarray(labels), triggered, wanted,
                  config=config, count=count)


@functools.partial(jax.jit, static_argnames=("config", "count"))
def _watch(key, params, images, labels, triggered, wanted, *, config, count) -> Watched:
    """`watch` as one program."""
    layer = explain.last_convolution(params.arch)
    gradient = sharpness_aware(tuning.cross_entropy, rho=config.radius, adaptive=config.adaptive)

    def watched(key, params, images, labels):
        gradients, batch_stats, _ = gradient(key, params, images, labels)
        hits = models.apply(params, triggered).argmax(axis=1) == wanted
        seen = explain.neuron_norms(gradients, layer), hits.mean()
        return gradients, batch_stats, seen

    steps = -(-len(images) // min(config.batch_size, len(images)))  # an epoch's
    # The learning rate falls as in the whole run; orders and keys of its first epochs are the same.
    short = dataclasses.replace(config, epochs=min(count, config.epochs))
    after, (norms, asr) = tuning.descend(
        key, params, images, labels, short, gradient=watched,
        optimiser=tuning.sgd(config, steps * config.epochs))
    return Watched(after, norms[::steps], asr[::steps])
