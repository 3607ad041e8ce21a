"""Who may see which image: the defender's pool and the images that only measure."""

from typing import NamedTuple

import numpy as np

from awm_jax.data.dataset import Dataset

_SEED = 2022  # of the one fixed permutation of the test set; never a parameter


class Split(NamedTuple):
    """Two disjoint sets of indices into the test set, neither of them seen by the attacker.

    Args:
      pool_indices: sorted indices the defender may draw clean images from.
      eval_indices: shuffled indices that every score is measured on.
    """

    pool_indices: np.ndarray
    eval_indices: np.ndarray


def defender_split(dataset: Dataset) -> Split:
    """Splits a test set in two by a fixed permutation.

    Args:
      dataset: with M test images.

    Returns:
      `Split` with 5,000 images in the pool (the papers' largest clean set) if M >= 10,000, else a
      third; the rest measures. Where that leaves a class without an image in either part, a third
      of each class instead, rounded, as long as it has two.

    Example:
      >>> from awm_jax.data import load
      >>> split = defender_split(load('digits'))
      >>> bool(np.intersect1d(split.pool_indices, split.eval_indices).size)
      False
    """
    count = len(dataset.test_labels)
    pool = 5000 if count >= 10_000 else count // 3
    order = np.random.default_rng(_SEED).permutation(count)
    parts, present = (order[:pool], order[pool:]), np.unique(dataset.test_labels)
    if any(len(np.unique(dataset.test_labels[part])) < len(present) for part in parts):
        parts = _stratified(order, dataset.test_labels)
    return Split(np.sort(parts[0]), parts[1])


def _stratified(order: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The first third of each class, in the order given, and the rest."""
    drawn = np.zeros(len(order), bool)
    for label in np.unique(labels):
        own = np.flatnonzero(labels[order] == label)
        drawn[own[: max(round(len(own) / 3), len(own) >= 2)]] = True
    return order[drawn], order[~drawn]


def draw_clean(seed: int, labels: np.ndarray, num_classes: int,
               samples: str | int = "one-shot") -> np.ndarray:
    """Draws the defender's clean images.

    Args:
      seed: decides which.
      labels: ``[P]`` classes of the pool.
      num_classes: how many classes.
      samples: ``'one-shot'``, one image of each class, or a number >= 1, spread over the classes as
        evenly as the pool allows.

    Returns:
      Sorted indices into ``labels``, all different.

    Raises:
      ValueError: a class has no image, or more images are wanted than there are.

    Example:
      >>> draw_clean(0, np.array([0, 0, 1, 1]), 2).shape
      (2,)
    """
    rng = np.random.default_rng(seed)
    by_class = [rng.permutation(np.flatnonzero(labels == c)) for c in range(num_classes)]
    empty = [c for c, members in enumerate(by_class) if not len(members)]
    if samples == "one-shot":
        if empty:
            raise ValueError(f"Expected an image of every class, found none of {empty}.")
        return np.sort(np.array([members[0] for members in by_class]))
    if not 1 <= int(samples) <= len(labels):
        raise ValueError(f"Expected samples={samples} in 1..{len(labels)} (the defender's pool).")
    # Round by round, one image of each class that still has some; the last round by lot.
    chosen: list[int] = []
    depth = 0
    while len(chosen) < int(samples):
        row = rng.permutation([members[depth] for members in by_class if len(members) > depth])
        chosen += row[: int(samples) - len(chosen)].tolist()
        depth += 1
    return np.sort(np.array(chosen))
