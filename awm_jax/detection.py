"""Is there a backdoor? What small changes of images do to a network, read from a few of them."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from awm_jax import models, projections, validate
from awm_jax.defences import AWMConfig, awm_batches, awm_losses, awm_steps
from awm_jax.defences.awm_config import Settings
from awm_jax.defences.base import as_batch, as_key, sound_network
from awm_jax.defences.neural_cleanse import anomaly_index
from awm_jax.defences.survey import (
    KEEPS_ABOVE,
    LEADS_BELOW,
    LEAST_DAMAGE,
    STAYS_BELOW,
    Survey,
)
from awm_jax.types import Batch, Params

# Chosen on GTSRB, where the first class of two networks without a backdoor led by 1.07 and 1.11.
LEADS_BY = 1.35
_UNIVERSAL_STEPS = 50


class Findings(NamedTuple):
    """What a scan measures; a tree of arrays.

    Args:
      survey: one trigger a class, and what they do (`awm_jax.defences.survey.Survey`).
      anomaly: ``[c]`` how many standard deviations the logarithm of a class's ``survey.damage``
        lies above the median class's; negative below it.
      universal: ``[H, W, C]`` the trigger that leads away from the network's own answers.
      flips: in [0, 1], the share of the given images whose answer it changes.
      concentration: in [0, 1], the share of those that then get the same class; 0 without any.
      arrivals: in [0, 1], the share of the given images, those it already has left out, that the
        survey's most damaging trigger sends into its class.
    """

    survey: Survey
    anomaly: jax.Array
    universal: jax.Array
    flips: jax.Array
    concentration: jax.Array
    arrivals: jax.Array

    @property
    def all_to_all(self) -> bool:
        """Whether what stands out moves every class into another one."""
        return int(self.survey.suspect) == len(self.survey.damage)

    @property
    def lead(self) -> float:
        """How many times farther the most damaging trigger drives than the next class's, >= 1."""
        return float(self.survey.lead)

    @property
    def score(self) -> float:
        """One number to rank networks by, >= 0: from 1 on, something stands out.

        The largest of ``log lead / log 1.35`` (one class), ``.15 / stay`` where a dispersal keeps
        classes apart (``kept > .5``) and no class stands out (``lead < 2``), and
        ``min(bent / .5, strain / 3.5)``, for a warp that changes the share bent of the answers, by
        strain nats; by 1.25 instead of 3.5 where no class gets a fifth of them, and ``lead < 2``.
        """
        apart = float(self.survey.kept) > KEEPS_ABOVE and self.lead < LEADS_BELOW
        spread = STAYS_BELOW / max(float(self.survey.stay), 1e-6) if apart else 0.0
        return max(math.log(self.lead) / math.log(LEADS_BY), spread,
                   float(self.survey.bending))


def signed_anomaly(damage: jax.Array) -> jax.Array:
    """Neural Cleanse's anomaly index of ``log damage``, with the sign of the deviation.

    Args:
      damage: ``[c]`` > 0, in nats.

    Returns:
      ``[c]``.

    Example:
      >>> [round(v, 3) for v in signed_anomaly(jnp.exp(jnp.array([1., 2., 3., 4., 9.]))).tolist()]
      [-1.349, -0.674, 0.0, 0.674, 4.047]

    Reference: Wang et al. 2019, section IV-C, there on the norms of masks.
    """
    logs = jnp.log(jnp.maximum(damage, LEAST_DAMAGE))
    return jnp.sign(logs - jnp.median(logs)) * anomaly_index(logs)


def universal(key: jax.Array, params: Params, images: jax.Array, settings: Settings,
              steps: int = _UNIVERSAL_STEPS) -> jax.Array:
    """``max_{||d||_1 <= 2 tau} CE(f(x + d), f(x))``: AWM's trigger phase on the network as it is.

    Args:
      key: PRNG key of minibatches.
      params: the network.
      images: ``[n, H, W, C]`` in [0, 1].
      settings: minibatches, and ``taus``, of which the first is tau; twice it, as in the survey.
      steps: normalised gradient steps, >= 1.

    Returns:
      ``[H, W, C]`` in [-1, 1].

    Example: `universal(key, params, images, AWMConfig().resolve(10, (32, 32, 3)))`.

    Reference: AWM paper, eq. 4.2.
    """
    def step(delta, key):
        x, _ = awm_batches.minibatch(key, images, jnp.zeros(len(images)), settings)
        own = models.apply(params, x).argmax(axis=1)
        gradient, _ = awm_losses.trigger_gradient(params, None, delta, x, own, clamp=True)
        ahead = projections.l1_ball(delta + projections.unit(gradient), 2 * settings.taus[0])
        return jnp.clip(ahead, -1.0, 1.0), None

    start = jnp.zeros(images.shape[1:], images.dtype)
    return jax.lax.scan(step, start, jax.random.split(key, steps))[0]


def answers(params: Params, images: jax.Array, triggers: jax.Array) -> jax.Array:
    """The class each image gets under each trigger.

    Args:
      params: the network.
      images: ``[n, H, W, C]`` in [0, 1].
      triggers: ``[k, H, W, C]``, each added to all images, which are then clipped.

    Returns:
      ``[k, n]`` classes.

    Example: `answers(params, images, jnp.zeros((1, 32, 32, 3)))[0]`, the network's own.
    """
    return jax.lax.map(lambda d: models.apply(
        params, jnp.clip(images + d[None], 0, 1)).argmax(axis=1), triggers)


def look(key: jax.Array, params: Params, images: jax.Array, labels: jax.Array,
         settings: Settings) -> Findings:
    """A whole scan as one traced function.

    Args:
      key: PRNG key.
      params: the network.
      images: ``[n, H, W, C]`` clean images in [0, 1].
      labels: ``[n]`` their classes.
      settings: of AWM's default variant, which has a survey.

    Returns:
      `Findings`; NaN where the network gives such, which `scan` refuses.

    Example: `jax.vmap(look, in_axes=(0, None, None, None, None))(keys, params, x, y, settings)`.
    """
    found = awm_steps.look(key, params, images, labels, settings)
    delta = universal(jax.random.fold_in(key, 1), params, images, settings)
    worst = found.damage.argmax()
    own, under, driven = answers(params, images, jnp.stack(
        [jnp.zeros_like(delta), delta, found.triggers[worst]]))
    moved = under != own
    counts = (jax.nn.one_hot(under, params.arch.num_classes) * moved[:, None]).sum(axis=0)
    others = own != worst
    return Findings(found, signed_anomaly(found.damage), delta, moved.mean(),
                    counts.max() / jnp.maximum(moved.sum(), 1),
                    ((driven == worst) & others).sum() / jnp.maximum(others.sum(), 1))


_jit_look = jax.jit(look, static_argnames="settings")


def scan(params: Params, batch: Batch, *, key: jax.Array | int | None = None,
         config: AWMConfig | None = None) -> Findings:
    """Looks for a backdoor with a few clean images, knowing neither trigger nor target.

    Args:
      params: the network.
      batch: clean images ``[n, H, W, C]`` float32 in [0, 1] and labels ``[n]``.
      key: PRNG key of minibatches, or a seed; the same key gives the same findings.
      config: AWM's default variant, whose survey and bounds are used.

    Returns:
      `Findings`, on the host.

    Raises:
      ValueError: images that do not fit the network, NaN in images, weights or what the network
        gives, or a variant of AWM without a survey.
      TypeError: no network, batch or key.

    Example: `scan(params, batch).score`.
    """
    config = AWMConfig() if config is None else config
    sound_network(params)
    batch = as_batch(batch)
    validate.labelled_images(batch.images, batch.labels, num_classes=params.arch.num_classes,
                             image_shape=params.arch.image_shape)
    settings = config.resolve(len(batch.images), params.arch.image_shape)
    if not settings.survey_steps:
        raise ValueError(f"Expected a variant with a survey, {config.variant} has none.")
    key = as_key(key)
    found = jax.device_get(_jit_look(key, params, jnp.asarray(batch.images, jnp.float32),
                                     jnp.asarray(batch.labels, jnp.int32), settings))
    if not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(found)):
        raise ValueError("Expected finite findings, the scan met NaN or infinity: the network's "
                         "logits overflow under small changes of its images. Check its weights "
                         "(a BatchNorm variance near 0?) and its normalisation.")
    return found
