"""Attacks: triggers, label maps and poisoned training sets."""

from collections.abc import Callable

import jax

from awm_jax import validate
from awm_jax.attacks.badnets import badnets, badnets_a2a, badnets_checkerboard
from awm_jax.attacks.base import Attack, Poisoned, poison, poison_counts
from awm_jax.attacks.blended import blended, blended_gaussian
from awm_jax.attacks.clb import clb, pgd
from awm_jax.attacks.in_batches import InBatches, State, in_batches
from awm_jax.attacks.input_aware import InputAware, input_aware, input_aware_a2a
from awm_jax.attacks.inv import l0_inv, l2_inv
from awm_jax.attacks.lf import lf
from awm_jax.attacks.multi import multi
from awm_jax.attacks.sig import sig
from awm_jax.attacks.ssba import SSBAConfig, ssba
from awm_jax.attacks.triggers import (
    Trigger,
    apply_trigger,
    blend,
    trigger_from_png,
    trigger_norms,
)
from awm_jax.attacks.trojan import trojan_a2a, trojan_sq, trojan_wm
from awm_jax.attacks.trojannn import trojannn
from awm_jax.attacks.wanet import Warp, wanet, wanet_a2a

ATTACKS: dict[str, Callable[..., Attack]] = {
    "badnets": badnets,
    "trojan_sq": trojan_sq,
    "trojan_wm": trojan_wm,
    "l0_inv": l0_inv,
    "l2_inv": l2_inv,
    "trojan_a2a": trojan_a2a,
    "badnets_a2a": badnets_a2a,
    "badnets_checkerboard": badnets_checkerboard,
    "blended": blended,
    "blended_gaussian": blended_gaussian,
    "sig": sig,
    "clb": clb,
    "wanet": wanet,
    "wanet_a2a": wanet_a2a,
    "input_aware": input_aware,
    "input_aware_a2a": input_aware_a2a,
    "lf": lf,
    "trojannn": trojannn,
    "ssba": ssba,
    "multi": multi,
}

# The six of the AWM paper's main tables (Tables 1 and 8).
AWM_ATTACKS = ("badnets", "trojan_sq", "trojan_wm", "l0_inv", "l2_inv", "trojan_a2a")

# Those for which the attacker needs a clean network of the same task: they take params and images.
ON_SURROGATE = frozenset({"trojan_sq", "trojan_wm", "l0_inv", "l2_inv", "trojan_a2a",
                          "clb", "lf", "trojannn", "multi"})

# Those whose attacker trains the trigger itself on clean images: they take images, all there are.
ON_TRAINING_SET = frozenset({"ssba", "input_aware", "input_aware_a2a"})

# Those that poison every batch anew: their attacker trains the network.
IN_TRAINING = frozenset({"wanet", "wanet_a2a", "input_aware", "input_aware_a2a"})

_RATES = {"blended_gaussian": 0.01, "sig": 0.8, "clb": 0.8, "wanet": 0.1, "wanet_a2a": 0.1,
          "input_aware": 0.1, "input_aware_a2a": 0.1, "lf": 0.1, "ssba": 0.1}

__all__ = ["ATTACKS", "AWM_ATTACKS", "IN_TRAINING", "ON_SURROGATE", "ON_TRAINING_SET", "Attack",
           "InBatches", "InputAware", "Poisoned", "SSBAConfig", "State", "Trigger", "Warp",
           "apply_trigger", "blend", "in_batches", "make", "pgd", "poison", "poison_counts",
           "poison_rate", "trigger_from_png", "trigger_norms"]


def make(name: str, key: jax.Array, image_shape: tuple[int, int, int], num_classes: int,
         **options) -> Attack:
    """The attack of a name; ValueError lists the known ones.

    Example:
      >>> make('badnets', jax.random.key(0), (32, 32, 3), 10).target
      8
    """
    validate.choice(ATTACKS, attack=name)
    return ATTACKS[name](key, image_shape, num_classes, **options)


def poison_rate(name: str) -> float:
    """The rate of an attack's paper, for `poison`; the AWM paper's .05 where that names none.

    Args:
      name: a key of `ATTACKS`.

    Returns:
      A share in (0, 1]: of all images, or of the target class's where labels stay clean.

    Raises:
      ValueError: an unknown name.

    Example:
      >>> poison_rate('badnets'), poison_rate('sig')
      (0.05, 0.8)
    """
    validate.choice(ATTACKS, attack=name)
    return _RATES.get(name, 0.05)
