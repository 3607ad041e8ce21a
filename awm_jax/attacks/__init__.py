"""Attacks: triggers, label maps and poisoned training sets."""

from collections.abc import Callable

import jax

from awm_jax import validate
from awm_jax.attacks.badnets import badnets
from awm_jax.attacks.base import (
    Attack,
    Trigger,
    apply_trigger,
    poison,
    trigger_from_png,
    trigger_norms,
)
from awm_jax.attacks.inv import l0_inv, l2_inv
from awm_jax.attacks.trojan import trojan_a2a, trojan_sq, trojan_wm

ATTACKS: dict[str, Callable[..., Attack]] = {
    "badnets": badnets,
    "trojan_sq": trojan_sq,
    "trojan_wm": trojan_wm,
    "l0_inv": l0_inv,
    "l2_inv": l2_inv,
    "trojan_a2a": trojan_a2a,
}

__all__ = ["ATTACKS", "Attack", "Trigger", "apply_trigger", "make", "poison", "trigger_from_png",
           "trigger_norms"]


def make(name: str, key: jax.Array, image_shape: tuple[int, int, int], num_classes: int,
         **options) -> Attack:
    """The attack of a name; ValueError lists the known ones.

    Example:
      >>> make('badnets', jax.random.key(0), (32, 32, 3), 10).target
      8
    """
    validate.choice(ATTACKS, attack=name)
    return ATTACKS[name](key, image_shape, num_classes, **options)
