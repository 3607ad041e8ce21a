"""AWM's default masks convolutions at the first resolution against all-to-all backdoors only."""

import dataclasses

import jax
import jax.numpy as jnp

from awm_jax import masks as masking
from awm_jax import models
from awm_jax.defences.awm_config import Settings
from awm_jax.defences.survey import Survey
from awm_jax.types import Arch, Masks


def spared(stepped: Masks, masks: Masks, move_all: jax.Array, arch: Arch) -> Masks:
    """The masks after a step, those at the first resolution as before it unless all may move.

    Args:
      stepped: the masks after the step.
      masks: the same before it.
      move_all: whether all may move, a boolean scalar.
      arch: the network's.
    """
    first = _at_first_resolution(arch)
    return jax.tree_util.tree_map_with_path(
        lambda path, new, old: jnp.where(move_all, new, old) if first(path) else new,
        stepped, masks)


def held(masks: Masks, arch: Arch) -> Masks:
    """The masks, those at the first resolution as constants: nothing is derived for those layers.

    Args:
      masks: the masks.
      arch: the network's.
    """
    first = _at_first_resolution(arch)
    return jax.tree_util.tree_map_with_path(
        lambda path, m: jax.lax.stop_gradient(m) if first(path) else m, masks)


def after_survey(settings: Settings, found: Survey | None, arch: Arch) -> Settings:
    """The same run for less work, once its survey is known outside of a traced function.

    Args:
      settings: from `AWMConfig.resolve`.
      found: from `awm_steps.look`; None in a variant without a survey.
      arch: the network's.

    Returns:
      Settings with which `awm_steps.epochs` does the same, but for rounding: without the gradients
      of masks that stay 1, or without asking whether they do.

    Example:
      >>> from awm_jax.defences import AWMConfig
      >>> arch = Arch(name='small_vgg', num_classes=10)
      >>> after_survey(AWMConfig().resolve(10, arch.image_shape), None, arch).spared
      True
    """
    if not settings.spare:
        return settings
    all_move = found is not None and int(found.suspect) == arch.num_classes
    return dataclasses.replace(settings, spare=not all_move, spared=not all_move)


def _at_first_resolution(arch):
    """Whether a mask, by its tree path, is of such a convolution."""
    deep = models.deep_convolutions(arch)
    return lambda path: bool(deep) and masking.layer_of(path) not in deep
