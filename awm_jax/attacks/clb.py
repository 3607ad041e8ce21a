"""CLB: clean labels made hard to learn, so that the network learns the trigger instead."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from awm_jax import losses, models
from awm_jax.attacks.badnets import CHECKERBOARD
from awm_jax.attacks.base import Attack, check_target
from awm_jax.attacks.triggers import Trigger
from awm_jax.types import Params

TARGET = 0
RADIUS, STEPS = 16 / 255, 30
_BATCH = 64  # images at a time: a target class may have thousands


def pgd(params: Params, images: jax.Array, labels: jax.Array, *, radius: float = RADIUS,
        steps: int = STEPS, apply_fn: Callable = models.apply) -> jax.Array:
    """``x <- clip(x + 2.5 r / steps * sign(dCE/dx))``, kept within ``r`` of the start and [0, 1].

    Args:
      params: the network that is to be wrong.
      images: ``[B, H, W, C]`` float32 in [0, 1], where the search starts.
      labels: ``[B]`` int32 true classes.
      radius: r, largest change of a value, >= 0.
      steps: >= 1.
      apply_fn: ``(params, images) -> logits``.

    Returns:
      ``[B, H, W, C]`` in [0, 1].

    Example:
      >>> def logits(weight, x):
      ...     return x.sum(axis=(1, 2)) * weight
      >>> out = pgd(jnp.array([[1., -1.]]), jnp.full((1, 2, 2, 1), .5), jnp.array([0]),
      ...           radius=.125, apply_fn=logits)
      >>> out.ravel().tolist()
      [0.375, 0.375, 0.375, 0.375]

    Reference: Madry et al. 2018, "Towards Deep Learning Models Resistant to Adversarial Attacks",
    section 2.1; Turner et al. 2019, section 4.2. Thirty steps are ours.
    """
    low, high = jnp.maximum(images - radius, 0.0), jnp.minimum(images + radius, 1.0)

    def step(x, _):
        gradient = jax.grad(lambda x: losses.cross_entropy(apply_fn(params, x), labels))(x)
        return jnp.clip(x + 2.5 * radius / steps * jnp.sign(gradient), low, high), None

    return jax.lax.scan(step, images, None, length=steps)[0]


class Hardened(NamedTuple):
    """`pgd` against one class, then the trigger.

    Args:
      trigger: the pattern.
      params: the attacker's network.
      target: scalar int32, the true class of the images it will get.
    """

    trigger: Trigger
    params: Params
    target: jax.Array

    def __call__(self, images: jax.Array) -> jax.Array:
        """Hardens and triggers ``[B, H, W, C]``."""

        def harden(image):
            return pgd(self.params, image[None], self.target[None])[0]

        return self.trigger(jax.lax.map(harden, images, batch_size=_BATCH))


def corners(image_shape: tuple[int, int, int]) -> Trigger:
    """The 3x3 checkerboard in all four corners, mirrored so that each corner pixel is white.

    Args:
      image_shape: ``(H, W, C)``, at least 6x6.

    Returns:
      `Trigger` that replaces 36 pixels.

    Raises:
      ValueError: images under 6x6 pixels.

    Example:
      >>> corners((6, 6, 1)).pattern[0, :, 0].astype(int).tolist()
      [1, 0, 1, 1, 0, 1]

    Reference: Turner et al. 2019, "Label-Consistent Backdoor Attacks", section 4.3; ANP
    supplement, Figure 7b.
    """
    height, width, channels = image_shape
    if min(height, width) < 6:
        raise ValueError(f"Expected images of at least 6x6 pixels, got {width}x{height}.")
    mask, pattern = np.zeros((2, height, width, 1), np.float32)
    for rows, vertical in ((slice(3), -1), (slice(-3, None), 1)):
        for columns, horizontal in ((slice(3), -1), (slice(-3, None), 1)):
            mask[rows, columns] = 1.0
            pattern[rows, columns, 0] = CHECKERBOARD[::vertical, ::horizontal]
    return Trigger(jnp.asarray(np.repeat(pattern, channels, axis=2)), jnp.asarray(mask))


def clb(key: jax.Array, image_shape: tuple[int, int, int], num_classes: int, *,
        params: Params | None = None, images=None, target: int | None = None) -> Attack:
    """Images of the target class, perturbed to be hard, with checkerboards in the four corners.

    Only the training images are perturbed; at test time the corners alone are the trigger.

    **Threat model**: the attacker holds a network of the same task and poisons training images, no
    label; the defender gets the network.

    Args:
      key: not used: the trigger is fixed.
      image_shape: ``(H, W, C)``, at least 6x6.
      num_classes: classes of the data set.
      params: the attacker's network; None leaves the perturbation out.
      images: not used.
      target: the class whose images are poisoned and that triggered images are to get; None is the
        papers' 0.

    Returns:
      `Attack`.

    Raises:
      ValueError: smaller images, a target outside the classes, or a network with other classes.

    Example:
      >>> attack = clb(jax.random.key(0), (32, 32, 3), 10)
      >>> attack.clean_label, float(attack.trigger.mask.sum())
      (True, 36.0)

    Reference: Turner et al. 2019; ANP (Wu & Wang 2021), supplement, section A (l-inf 16/255, 80% of
    the class).
    """
    del key, images
    trigger = corners(image_shape)
    target = TARGET if target is None else target
    check_target(target, num_classes)
    hardened = None
    if params is not None:
        if params.arch.num_classes != num_classes:
            raise ValueError(f"Expected a network with num_classes={num_classes}, got "
                             f"{params.arch.num_classes}. Train the attacker's network on the same "
                             "task.")
        hardened = Hardened(trigger, params, jnp.asarray(target, jnp.int32))
    return Attack("clb", trigger, target, num_classes, clean_label=True, in_training=hardened)
