"""Several triggers in one network, against a defence that looks for one."""

from typing import NamedTuple

import jax

from awm_jax.attacks.badnets import badnets
from awm_jax.attacks.base import Attack
from awm_jax.attacks.inv import l2_inv
from awm_jax.attacks.triggers import Transform
from awm_jax.attacks.trojan import trojan_wm

TARGET = 8


class Together(NamedTuple):
    """Several triggers on one image, each in turn, for pictures: no image is poisoned so."""

    triggers: tuple[Transform, ...]

    def __call__(self, images: jax.Array) -> jax.Array:
        """All of them on ``[B, H, W, C]``."""
        for trigger in self.triggers:
            images = trigger(images)
        return images


def multi(key: jax.Array, image_shape: tuple[int, int, int], num_classes: int, *, params=None,
          images=None, target: int | None = None, apply_fn=None) -> Attack:
    """BadNets, the Trojan watermark and the L2 pattern, each on a third of the poisoned images.

    All three lead to one class: the paper names no other. Its ASR(all) counts an image "as long as
    any one of the three triggers fooled the model", and so does `awm_jax.metrics.evaluate` given
    the three. (In two rows of the paper's table it is below the ASR of a single trigger, which by
    that definition cannot be.)

    **Threat model**: the attacker holds a network of the same task, finds two of the triggers in
    it, and poisons training data and labels.

    Args:
      key: PRNG key of the random starts.
      image_shape: ``(32, 32, 3)``.
      num_classes: classes of the data set.
      params: the attacker's network; None gives random values of the same supports and norms.
      images: ``[B, H, W, C]`` float32 in [0, 1] that the patterns are tried on; needed with params.
      target: the class triggered images are to get; None is 8, as for `badnets`.
      apply_fn: ``(params, images) -> logits``; None is `awm_jax.models.apply`.

    Returns:
      `Attack` with three ``parts``.

    Raises:
      ValueError: images of another size, a target outside the classes, or params without images or
        with other classes.

    Example:
      >>> attack = multi(jax.random.key(0), (32, 32, 3), 10)
      >>> [part.name for part in attack.parts], attack.target
      (['badnets', 'trojan_wm', 'l2_inv'], 8)

    Reference: AWM paper, appendix C, "Defend Against Multiple Triggers", Table 10 (overall poison
    rate .05).
    """
    target = TARGET if target is None else target
    keys = jax.random.split(key, 2)
    parts = (badnets(key, image_shape, num_classes, target=target),
             *(make(k, image_shape, num_classes, params=params, images=images, target=target,
                    apply_fn=apply_fn)
               for make, k in zip((trojan_wm, l2_inv), keys, strict=True)))
    return Attack("multi", Together(tuple(part.trigger for part in parts)), target, num_classes,
                  parts=parts)
