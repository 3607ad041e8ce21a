"""What the two phases of Adversarial Weight Masking raise and lower, and its slopes."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from awm_jax import losses, models, projections, warps
from awm_jax import masks as masking
from awm_jax.defences import awm_spare, chunks
from awm_jax.defences.awm_config import Settings
from awm_jax.defences.survey import objective
from awm_jax.types import Masks, Params

_PART = 16  # images of a mask step whose activations a CPU holds at once


class AWMInfo(NamedTuple):
    """What is only logged, one value an epoch (means over its mask steps).

    Args:
      clean_loss: loss on clean images.
      trigger_loss: loss on the same images with the trigger.
      clean_agreement: share of clean images on which the network gives what it should, in [0, 1].
      trigger_agreement: the same with the trigger.
      mask_mean: mean mask value, in [0, 1].
      trigger_l1: L1 norm of the triggers in the batch, their mean.
    """

    clean_loss: jax.Array
    trigger_loss: jax.Array
    clean_agreement: jax.Array
    trigger_agreement: jax.Array
    mask_mean: jax.Array
    trigger_l1: jax.Array


def trigger_gradient(params: Params, masks: Masks | None, delta: jax.Array, images: jax.Array,
                     labels: jax.Array, *, clamp: bool,
                     towards: tuple[jax.Array, jax.Array] | None = None,
                     warp: jax.Array | None = None) -> tuple[jax.Array, jax.Array | None]:
    """``d/d(delta, w)  mean CE(f(bend(x, w) + delta; m * w), y)``.

    Args:
      params: the network.
      masks: weight masks, or None for the network as it is.
      delta: ``[H, W, C]`` the trigger.
      images: ``[B, H, W, C]`` in [0, 1].
      labels: ``[B]`` what the trigger moves predictions away from.
      clamp: clip ``x + delta`` to [0, 1].
      towards: ``(whether, suspect)``, scalars: if true, the gradient of `survey.objective` for that
        suspect instead.
      warp: ``[k, k, 2]`` pixels; None for no bending.

    Returns:
      ``[H, W, C]``, and ``[k, k, 2]`` or None.

    Example: `trigger_gradient(params, None, delta, images, labels, clamp=True)[0]`.

    Reference: AWM paper, Algorithm 1, line 7; of the warp, `awm_jax.warps`.
    """

    def loss(delta, warp):
        bent = images if warp is None else warps.bend(images, warp)
        logits = models.apply(params, _add(bent, delta, clamp), masks=masks)
        away = losses.cross_entropy(logits, labels)
        if towards is None:
            return away
        return jnp.where(towards[0], objective(logits, towards[1], labels), away)

    return jax.grad(loss, argnums=(0, 1))(delta, warp)


def mask_loss(params: Params, masks: Masks, delta: jax.Array, images: jax.Array,
              target: jax.Array, settings: Settings,
              alpha: jax.Array | float | None = None) -> tuple[jax.Array, AWMInfo]:
    """``alpha L(f(x; m*w), t) + (1-alpha) L(f(x+delta; m*w), t) + gamma ||m||_1`` (eq. 4.4).

    Two passes, not one over both: on a CPU a batch of 32 takes a fifth longer than two of 16,
    whose buffers stay in the cache.

    Args:
      params: the network.
      masks: weight masks.
      delta: ``[H, W, C]`` the trigger, or ``[B, H, W, C]`` one an image.
      images: ``[B, H, W, C]`` in [0, 1].
      target: ``[B]`` labels or ``[B, c]`` probabilities.
      settings: ``alpha``, ``gamma`` and ``clamp_outer``.
      alpha: a scalar instead of ``settings.alpha``.

    Returns:
      The loss, a scalar, and `AWMInfo`.

    Example: `mask_loss(params, masks, delta, images, labels, settings)[0]`.

    Reference: AWM paper, eq. 4.4.
    """
    clean = models.apply(params, images, masks=masks)
    triggered = models.apply(params, _add(images, delta, settings.clamp_outer), masks=masks)
    loss = losses.cross_entropy if target.ndim == 1 else losses.soft_cross_entropy
    clean_loss, trigger_loss = loss(clean, target), loss(triggered, target)
    norm = masking.l1(masks)
    share = jnp.asarray(settings.alpha if alpha is None else alpha, clean_loss.dtype)
    total = share * clean_loss + (1 - share) * trigger_loss + settings.gamma * norm
    wanted = target if target.ndim == 1 else target.argmax(axis=1)
    info = AWMInfo(
        clean_loss, trigger_loss, (clean.argmax(axis=1) == wanted).mean(),
        (triggered.argmax(axis=1) == wanted).mean(), norm / masking.size(masks),
        projections.l1_norm(delta) / (len(images) if delta.ndim == 4 else 1),
    )
    return total, info


def mask_gradient(params: Params, masks: Masks, delta: jax.Array, images: jax.Array,
                  target: jax.Array, settings: Settings,
                  alpha: jax.Array | float | None) -> tuple[Masks, AWMInfo]:
    """The gradient of `mask_loss` and its info; on a CPU a large batch in parts, to save memory.

    BatchNorm's statistics rest, so the parts make the same step.

    Args: as `mask_loss`.

    Returns:
      A tree like ``masks``, and `AWMInfo`.

    Example: `mask_gradient(params, masks, delta, images, labels, settings, None)[0]`.

    Reference: AWM paper, eq. 4.4.
    """
    def slopes(images, target, *own):
        def loss(m):
            m = awm_spare.held(m, params.arch) if settings.spared else m
            return mask_loss(params, m, own[0] if own else delta, images, target, settings, alpha)

        return jax.grad(loss, has_aux=True)(masks)

    each = (images, target, delta) if delta.ndim == 4 else (images, target)
    return chunks.mean(slopes, each, _PART if jax.default_backend() == "cpu" else len(images))


def _add(images: jax.Array, delta: jax.Array, clamp: bool) -> jax.Array:
    """Triggered images, from one trigger or one an image."""
    images = images + (delta[None] if delta.ndim == 3 else delta)
    return jnp.clip(images, 0.0, 1.0) if clamp else images
