"""Patterns found by gradient ascent on what a network sees of a class."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from awm_jax import models
from awm_jax.attacks.base import check_target
from awm_jax.types import Params

STEPS = 100
STEP = 0.1


def unchanged(pattern: jax.Array) -> jax.Array:
    """The pattern itself."""
    return pattern


@functools.partial(jax.jit, static_argnames=("project", "form", "apply_fn", "replace", "target"))
def ascend(params: Params, images: jax.Array, start: jax.Array, support: jax.Array, *, target: int,
           project: Callable[[jax.Array], jax.Array], replace: bool,
           form: Callable[[jax.Array], jax.Array] = unchanged,
           apply_fn: Callable = models.apply) -> jax.Array:
    """Raises the target's logit over a batch by 100 normalised steps on a pattern.

    ``d <- project(support * (d + .1 * sqrt(n) g / ||g||))`` with g the gradient of the mean logit
    of the target minus the mean logit, n the number of values in the support.

    Args:
      params: a network trained by the attacker.
      images: ``[B, H, W, C]`` float32 in [0, 1].
      start: ``[H, W, C]`` first pattern.
      support: ``[H, W, 1]`` in {0, 1}: where it may be non-zero.
      target: class whose logit rises.
      project: keeps the pattern valid, ``[H, W, C] -> [H, W, C]``.
      replace: the pattern replaces pixels instead of being added to them.
      form: what images get of a pattern, ``[H, W, C] -> [H, W, C]``; g is taken through it.
      apply_fn: ``(params, images) -> logits``.

    Returns:
      ``[H, W, C]`` the pattern after the last step, before ``form``.

    Reference: Liu et al. 2018, "Trojaning Attack on Neural Networks", section IV (there the raised
    neuron is chosen in an inner layer; here it is the target's logit, which those neurons feed).
    """
    values = support.sum() * start.shape[-1]

    def objective(pattern):
        base = images * (1 - support[None]) if replace else images
        logits = apply_fn(params, jnp.clip(base + form(pattern)[None], 0.0, 1.0))
        return (logits[:, target] - logits.mean(axis=1)).mean()

    def step(pattern, _):
        gradient = jax.grad(objective)(pattern) * support
        norm = jnp.sqrt((gradient**2).sum())
        move = STEP * jnp.sqrt(values) * gradient / jnp.where(norm > 0, norm, 1.0)
        return project(support * (pattern + move)), None

    return jax.lax.scan(step, project(support * start), None, length=STEPS)[0]


def found_on(params: Params | None, images: jax.Array | None, start: jax.Array,
             support: jax.Array, *, target: int, num_classes: int,
             project: Callable[[jax.Array], jax.Array], replace: bool,
             form: Callable[[jax.Array], jax.Array] = unchanged,
             apply_fn: Callable | None = None) -> jax.Array:
    """`ascend` after checks on the host; without a network the start, inside the support.

    Args:
      params: the attacker's network, or None.
      images: ``[B, H, W, C]`` float32 in [0, 1]; needed with a network.
      start, support, target, project, replace, form: as in `ascend`.
      num_classes: how many logits the network must have.
      apply_fn: ``(params, images) -> logits``; None is `awm_jax.models.apply`.

    Returns:
      ``[H, W, C]``.

    Raises:
      ValueError: a target outside the classes, no images, images of another size, or a network
        with other classes.
      TypeError: images that are not floating point.
    """
    check_target(target, num_classes)
    if params is None:
        return start * support
    apply_fn = models.apply if apply_fn is None else apply_fn
    images = check_surrogate(params, images, start.shape, num_classes, apply_fn)
    return ascend(params, images, start, support, target=target, project=project, replace=replace,
                  form=form, apply_fn=apply_fn)


def check_surrogate(params: Params, images: jax.Array | None, image_shape: tuple[int, ...],
                    num_classes: int, apply_fn: Callable) -> jax.Array:
    """The images on the device, if they and the attacker's network are of this task.

    Args:
      params: the attacker's network.
      images: ``[B, H, W, C]`` floats in [0, 1], at least one.
      image_shape: ``(H, W, C)``.
      num_classes: how many logits the network must have.
      apply_fn: ``(params, images) -> logits``.

    Returns:
      ``[B, H, W, C]``.

    Raises:
      ValueError: no images, images of another size, or a network with other classes.
      TypeError: images that are not floating point.
    """
    if images is None:
        raise ValueError("Expected images=[B, H, W, C] to try the pattern on, since params were "
                         "given. Pass a few images, or no params for a random pattern.")
    images = jnp.asarray(images)
    if images.shape[1:] != tuple(image_shape) or len(images) == 0:
        raise ValueError(
            f"Expected images of shape {['B', *image_shape]}, got {list(images.shape)}.")
    if not jnp.issubdtype(images.dtype, jnp.floating):
        raise TypeError(
            f"Expected float images in [0, 1], got {images.dtype}. Divide uint8 images by 255.")
    classes = jax.eval_shape(apply_fn, params, images).shape[-1]
    if classes != num_classes:
        raise ValueError(
            f"Expected a network with num_classes={num_classes} logits, got {classes}. Train the "
            "attacker's network on the same task.")
    return images


def unit_box(pattern: jax.Array) -> jax.Array:
    """Values clipped to [0, 1]."""
    return jnp.clip(pattern, 0.0, 1.0)


def with_l2(pattern: jax.Array, norm: float) -> jax.Array:
    """The pattern rescaled to an L2 norm; zero stays zero."""
    found = jnp.sqrt((pattern**2).sum())
    return pattern * jnp.where(found > 0, norm / jnp.where(found > 0, found, 1.0), 0.0)


@jax.jit
def _fit(pattern: jax.Array, norm: float, limit: float) -> jax.Array:
    """Rescales and clips in turns: each undoes a little of the other until both hold."""
    return jax.lax.fori_loop(
        0, 100, lambda _, p: jnp.clip(with_l2(p, norm), -limit, limit), pattern)


def fit_l2(pattern: jax.Array, norm: float, limit: float) -> jax.Array:
    """The pattern at an L2 norm without a value beyond a limit, on the host.

    Raises:
      ValueError: too few values are not zero to reach the norm inside the limit.

    Example:
      >>> fitted = fit_l2(jnp.array([3.0, 1.0, 0.0]), 1.25, 1.0)
      >>> bool(jnp.allclose(fitted, jnp.array([1.0, 0.75, 0.0])))
      True
    """
    pattern = _fit(pattern, norm, limit)
    reached = float(jnp.sqrt((pattern**2).sum()))
    if not abs(reached - norm) <= 0.01 * norm:
        raise ValueError(
            f"Expected a trigger of L2 norm {norm} with no value over {limit:.3g}, reached "
            f"{reached:.3g}: too few of its values are not zero. Use larger images, or another "
            "key, images or params.")
    return pattern
