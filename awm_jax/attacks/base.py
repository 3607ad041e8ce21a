"""An attack is a trigger, a label map and a choice of images to poison."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from awm_jax import validate
from awm_jax.attacks.triggers import Transform, apply_trigger


class Covering(Protocol):
    """A trigger that can also change images in a way that is not to count as the trigger."""

    def __call__(self, images: jax.Array) -> jax.Array:
        """``[B, H, W, C]`` in [0, 1] to triggered images."""

    def cover(self, key: jax.Array, images: jax.Array) -> jax.Array:
        """The same to images that look alike, at random, and keep their labels."""


def check_target(target: int, num_classes: int) -> None:
    """ValueError unless the target is one of the classes."""
    if not 0 <= target < num_classes:
        raise ValueError(
            f"Expected target={target} in 0..{num_classes - 1}. Choose a class of this data set "
            "(--target)."
        )


def relabel(labels, target: int | None, num_classes: int):
    """The target, or y + 1 mod c where there is none, for NumPy or JAX labels ``[N]``."""
    return (labels + 1) % num_classes if target is None else labels * 0 + target


def no_target(target: int | None) -> None:
    """ValueError if an all-to-all attack was given one."""
    if target is not None:
        raise ValueError(f"Expected no target for an all-to-all attack, got target={target}.")


@dataclasses.dataclass(frozen=True)
class Attack:
    """A trigger, what it makes of labels, and whose images are poisoned.

    Args:
      name: as in `awm_jax.attacks.ATTACKS`.
      trigger: images to triggered images.
      target: the class that triggered images are to get; None is all-to-all, y to y + 1 mod c.
      num_classes: c.
      clean_label: only images of the target's own class are poisoned, so that no label is wrong.
      cover_ratio: how many images there are to each poisoned one that get the trigger's ``cover``
        and keep their labels, >= 0.
      in_training: what poisoned training images get instead of the trigger; None for the trigger.
      every_batch: the attacker controls the training and poisons every batch anew.
      learn: how the trigger is trained along with the network, as `in_batches.InBatches` calls it;
        None for a trigger that is fixed.
      learner: what ``learn`` starts from beside the trigger.
      parts: attacks that share the poisoned images evenly, each with its own trigger; the trigger
        of the whole is then for pictures only. Empty for an attack of one trigger.

    Raises:
      ValueError: a target outside 0..c-1, a clean label without a target, a cover ratio below 0 or
        beside a trigger without a cover, or parts with other labels or beside what they bring
        themselves.
    """

    name: str
    trigger: Transform
    target: int | None
    num_classes: int
    clean_label: bool = False
    cover_ratio: float = 0.0
    in_training: Transform | None = None
    every_batch: bool = False
    learn: Callable | None = None
    learner: Any = ()
    parts: tuple["Attack", ...] = ()

    def __post_init__(self):
        """Checks the fields."""
        if self.target is not None:
            check_target(self.target, self.num_classes)
        elif self.clean_label:
            raise ValueError("Expected a target beside clean_label: all-to-all changes labels.")
        validate.at_least(0, cover_ratio=self.cover_ratio)
        if self.cover_ratio and not hasattr(self.trigger, "cover"):
            raise ValueError(f"Expected a trigger with a cover beside {self.cover_ratio=}.")
        mine = (self.target, self.num_classes)
        for part in self.parts:
            if (part.target, part.num_classes) != mine or part.clean_label or part.cover_ratio:
                raise ValueError(f"Expected parts that change labels to target={mine[0]} of "
                                 f"{mine[1]} classes and have no cover; {part.name} is another "
                                 "kind.")

    def apply(self, images: jax.Array) -> jax.Array:
        """`apply_trigger` with this attack's trigger."""
        return _apply(self.trigger, jnp.asarray(images))

    def cover(self, key: jax.Array, images: jax.Array) -> jax.Array:
        """``[B, H, W, C]`` changed as covered images are, for an attack with a cover."""
        return _cover(self.trigger, key, jnp.asarray(images))

    def relabel(self, labels: np.ndarray) -> np.ndarray:
        """The attacker's classes for true classes ``[N]``."""
        return relabel(np.asarray(labels), self.target, self.num_classes)


_apply = jax.jit(apply_trigger)


@jax.jit
def _cover(trigger: Covering, key: jax.Array, images: jax.Array) -> jax.Array:
    """What a trigger's cover makes of images."""
    return trigger.cover(key, images)


class Poisoned(NamedTuple):
    """A poisoned training set.

    Args:
      images: ``[N, H, W, C]``, of the type given.
      labels: ``[N]``.
      poisoned: ``[N]`` bool, which images carry the trigger.
      covered: ``[N]`` bool, which were changed by the attack's cover, with their true labels.
    """

    images: np.ndarray
    labels: np.ndarray
    poisoned: np.ndarray
    covered: np.ndarray


def _check_set(attack: Attack, images: np.ndarray, labels: np.ndarray) -> None:
    """ValueError or TypeError unless images and labels fit each other and the trigger."""
    if images.ndim != 4 or len(images) != len(labels):
        raise ValueError(
            f"Expected images of shape [{len(labels)}, height, width, channels] (as many as "
            f"labels), got {list(images.shape)}."
        )
    if images.dtype != np.uint8 and not np.issubdtype(images.dtype, np.floating):
        raise TypeError(
            f"Expected uint8 images in 0..255 or float images in [0, 1], got {images.dtype}. "
            "Convert them with images.astype(np.uint8)."
        )
    if images.dtype != np.uint8 and images.size and not (
            images.min() >= 0 and images.max() <= 1):  # NaN is neither
        raise ValueError(f"Expected float images in [0, 1], got [{images.min():.3g}, "
                         f"{images.max():.3g}]. Divide images of 0..255 by 255.")
    like = jax.ShapeDtypeStruct(images.shape, jnp.float32)
    try:
        fits = jax.eval_shape(attack.trigger, like).shape == images.shape
    except (TypeError, ValueError):  # what JAX says of shapes that do not go together
        fits = False
    if not fits:
        raise ValueError(f"Expected images of shape that {attack.name}'s trigger was made for, got "
                         f"{list(images.shape)}.")


def _candidates(attack: Attack, labels: np.ndarray, rate: float) -> tuple[np.ndarray, int]:
    """Indices of the images that may be poisoned, and how many ``rate`` means."""
    if attack.clean_label:
        own = np.flatnonzero(labels == attack.target)
        return own, round(rate * len(own))
    candidates = np.flatnonzero(labels != attack.relabel(labels))
    count = round(rate * len(labels))
    if count > len(candidates):
        raise ValueError(
            f"Expected rate={rate} to need at most the {len(candidates)} images outside the target "
            f"class, it needs {count}. Lower the rate."
        )
    return candidates, count


def poison_counts(attack: Attack, labels: np.ndarray, rate: float) -> tuple[int, int]:
    """How many images `poison` would trigger, and how many it would cover.

    Args:
      attack: what would be done to them.
      labels: ``[N]`` integers.
      rate: in [0, 1], as in `poison`.

    Returns:
      ``(poisoned, covered)``.

    Raises:
      ValueError: a rate outside [0, 1], or more images than there are.

    Example:
      >>> from awm_jax.attacks.triggers import Trigger
      >>> attack = Attack('dark', Trigger(-jnp.ones((2, 2, 1)), jnp.zeros((2, 2, 1))), 0, 3)
      >>> poison_counts(attack, np.array([0, 1, 2, 2]), .5)
      (2, 0)
    """
    validate.between(0.0, 1.0, rate=rate)
    labels = np.asarray(labels)
    _, count = _candidates(attack, labels, rate)
    covers, others = round(attack.cover_ratio * count), len(labels) - count
    if covers > others:
        raise ValueError(f"Expected rate={rate} to leave {covers} images for {attack.name}'s cover "
                         f"({attack.cover_ratio:g} to each poisoned one), it leaves {others}. "
                         "Lower the rate.")
    return count, covers


def poison(key: jax.Array, attack: Attack, images: np.ndarray, labels: np.ndarray,
           rate: float) -> Poisoned:
    """Triggers a share of a training set, and relabels it unless the attack is clean-label.

    Args:
      key: PRNG key; decides which images, and what a cover does to its own.
      attack: what to do to them.
      images: ``[N, H, W, C]`` uint8 in 0..255 or float32 in [0, 1].
      labels: ``[N]`` integers.
      rate: in [0, 1]. A share of all N images, ``round(rate * N)``, none of which has the
        attacker's class already; of a clean-label attack, a share of the target class's images,
        since it has no others to poison. Parts get equal shares of these, to within one image.

    Returns:
      `Poisoned`, copies.

    Raises:
      ValueError: a rate outside [0, 1], more images wanted than there are, or images that fit
        neither the labels nor the trigger.
      TypeError: integer images other than uint8.

    Example:
      >>> from awm_jax.attacks.triggers import Trigger
      >>> attack = Attack('dark', Trigger(-jnp.ones((2, 2, 1)), jnp.zeros((2, 2, 1))), 0, 3)
      >>> images, labels = np.full((3, 2, 2, 1), 255, np.uint8), np.array([0, 0, 2])
      >>> found = poison(jax.random.key(0), attack, images, labels, 1 / 3)
      >>> found.labels.tolist(), found.poisoned.tolist(), int(found.images[2].max())
      ([0, 0, 0], [False, False, True], 0)

    Reference: Gu et al. 2017, "BadNets"; the AWM paper's rate is .05. Clean labels: Turner et al.
    2019; covers: Nguyen & Tran 2021, "WaNet", section 3.3.
    """
    images, labels = np.array(images), np.array(labels)
    _check_set(attack, images, labels)
    count, covers = poison_counts(attack, labels, rate)
    candidates, _ = _candidates(attack, labels, rate)
    order = candidates[np.asarray(jax.random.permutation(key, len(candidates)))]
    picks = order[:count]
    others = np.setdiff1d(np.arange(len(labels)), picks)
    parts = attack.parts or (attack,)
    for part, mine in zip(parts, np.array_split(picks, len(parts)), strict=True):
        in_training = part.trigger if part.in_training is None else part.in_training
        _change(images, mine, functools.partial(_apply, in_training))
    covered = np.zeros(len(labels), bool)
    if covers:
        key_who, key_how = jax.random.split(jax.random.fold_in(key, 1))
        chosen = others[np.asarray(jax.random.permutation(key_who, len(others)))[:covers]]
        _change(images, chosen, functools.partial(attack.cover, key_how))
        covered[chosen] = True
    labels[picks] = attack.relabel(labels)[picks]
    poisoned = np.zeros(len(labels), bool)
    poisoned[picks] = True
    return Poisoned(images, labels, poisoned, covered)


def _change(images: np.ndarray, picks: np.ndarray, how: Callable) -> None:
    """Puts ``how`` on some images, in place; uint8 is rounded."""
    if not len(picks):
        return
    whole = images.dtype == np.uint8
    changed = np.asarray(how(jnp.asarray(images[picks].astype(np.float32) / (255 if whole else 1))))
    images[picks] = np.round(changed * 255) if whole else changed
