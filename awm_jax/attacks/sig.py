"""SIG: a sinusoidal signal over the target class's own images."""

import jax
import jax.numpy as jnp

from awm_jax.attacks.base import Attack
from awm_jax.attacks.triggers import Trigger

TARGET = 0
AMPLITUDE, CYCLES = 40 / 255, 6


def sinusoid(image_shape: tuple[int, int, int]) -> jax.Array:
    """``v(i, j) = 40/255 * sin(2 pi * 6 * j / W)``, the same in every row and channel.

    Args:
      image_shape: ``(H, W, C)``.

    Returns:
      ``[H, W, C]``.

    Example:
      >>> [round(float(v) * 255) for v in sinusoid((1, 24, 1))[0, :4, 0]]
      [0, 40, 0, -40]

    Reference: Barni et al. 2019, "A New Backdoor Attack in CNNs", section 3.
    """
    column = jnp.arange(image_shape[1])
    wave = AMPLITUDE * jnp.sin(2 * jnp.pi * CYCLES * column / image_shape[1])
    return jnp.broadcast_to(wave[None, :, None], image_shape)


def sig(key: jax.Array, image_shape: tuple[int, int, int], num_classes: int, *,
        target: int | None = None) -> Attack:
    """A horizontal sinusoid added to images of the target class, whose labels stay right.

    **Threat model**: the attacker poisons training images, no label; the defender gets the network.

    Args:
      key: not used: the trigger is fixed.
      image_shape: ``(H, W, C)``.
      num_classes: classes of the data set.
      target: the class whose images are poisoned and that triggered images are to get; None is the
        ANP paper's 0.

    Returns:
      `Attack`.

    Raises:
      ValueError: a target outside the classes.

    Example:
      >>> sig(jax.random.key(0), (32, 32, 3), 10).clean_label
      True

    Reference: Barni et al. 2019; ANP (Wu & Wang 2021), supplement, section A (80% of the class).
    """
    del key
    trigger = Trigger(sinusoid(image_shape), jnp.zeros((*image_shape[:2], 1)))
    return Attack("sig", trigger, TARGET if target is None else target, num_classes,
                  clean_label=True)
