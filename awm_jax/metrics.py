"""Accuracy and attack success, counted, so that batches and seeds add up exactly."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from awm_jax import models
from awm_jax.models import bfloat16
from awm_jax.types import Params


class Scores(NamedTuple):
    """Percentages of one network under one attack.

    Args:
      acc: clean test images given their true label.
      asr: triggered images given the attacker's label, images of that label left out (the field's
        usual definition; for all-to-all nothing is left out).
      asr_all: the same over all test images (AWM's and I-BAU's: some 100/c for a clean network).
      recovered: triggered images given their true label, over the images that `asr` counts.
      asr_parts: of an attack with several triggers, the ASR of each; `asr` and `asr_all` then count
        an image that any of them leads astray, `recovered` one that none does. Empty otherwise.
    """

    acc: float
    asr: float
    asr_all: float
    recovered: float
    asr_parts: tuple[float, ...] = ()


@jax.jit
def _predict(params: Params, images: jax.Array) -> jax.Array:
    """Most likely class of float images; on a CPU in float32, as others will run the network."""
    with bfloat16.refused():
        return models.apply(params, images).argmax(axis=1)


def predict(params: Params, images: np.ndarray | jax.Array, *,
            transform: Callable[[jax.Array], jax.Array] | None = None,
            batch_size: int | None = None) -> np.ndarray:
    """Most likely class of each image.

    Args:
      params: the network.
      images: ``[N, H, W, C]``, uint8 in 0..255 or float in [0, 1].
      transform: applied to each float batch first (a trigger, say).
      batch_size: images at a time; the last batch is padded, so one compilation serves all. By
        default 250, on a CPU 32: what larger ones write does not stay in its cache, which makes
        the small VGG a third slower.

    Returns:
      ``[N]`` int32.

    Example:
      >>> from awm_jax.types import Arch
      >>> arch = Arch(name='small_vgg', num_classes=4, image_shape=(8, 8, 3))
      >>> params = models.create(jax.random.key(0), arch)
      >>> predict(params, np.zeros((3, 8, 8, 3), np.uint8), batch_size=4).shape
      (3,)
    """
    out = []
    batch_size = batch_size or (32 if jax.default_backend() == "cpu" else 250)
    for start in range(0, len(images), batch_size):
        chunk = np.asarray(images[start : start + batch_size])
        size = len(chunk)
        if size < batch_size:
            chunk = np.concatenate([chunk, np.zeros((batch_size - size, *chunk.shape[1:]),
                                                    chunk.dtype)])
        batch = to_float(chunk)
        out.append(np.asarray(_predict(params, batch if transform is None else transform(batch)))
                   [:size])
    return np.concatenate(out) if out else np.zeros(0, np.int32)


@jax.jit
def to_float(images: jax.Array) -> jax.Array:
    """Images as float32 in [0, 1], whether they came as uint8 or as floats.

    Example:
      >>> float(to_float(jnp.array([255], jnp.uint8))[0])
      1.0
    """
    images = jnp.asarray(images)
    scale = 255.0 if images.dtype == jnp.uint8 else 1.0
    return images.astype(jnp.float32) / scale


def success_bound(num_classes: int) -> float:
    """The paper's success test in percent: a backdoor is erased when ``ASR < 150 / c``.

    Example:
      >>> success_bound(10)
      15.0

    Reference: AWM paper, section 5, "Evaluations".
    """
    return 150.0 / num_classes


def defence_effectiveness(before: Scores, after: Scores) -> float:
    """``DER = (max(0, ASR_before - ASR_after) - max(0, ACC_before - ACC_after) + 1) / 2``.

    Args:
      before: scores of the suspect network.
      after: scores of the purified one.

    Returns:
      Percent in [0, 100]: 50 where nothing changed, 100 where a perfect attack is gone for free.

    Example:
      >>> defence_effectiveness(Scores(90., 100., 100., 0.), Scores(80., 0., 10., 80.))
      95.0

    Reference: Zhu et al. 2023 (FT-SAM), section 4.1. (BackdoorBench's code adds the drop in ACC.)
    """
    gained, lost = max(0.0, before.asr - after.asr), max(0.0, before.acc - after.acc)
    return (gained - lost + 100.0) / 2


def scores(predictions: np.ndarray, triggered_predictions: np.ndarray, labels: np.ndarray,
           wanted: np.ndarray) -> Scores:
    """`Scores` from predictions.

    Args:
      predictions: ``[N]`` classes given to clean images.
      triggered_predictions: ``[N]`` classes given to the same images with the trigger, or
        ``[P, N]`` with each of P triggers.
      labels: ``[N]`` true classes.
      wanted: ``[N]`` the attacker's class for each image.

    Returns:
      `Scores` in percent.

    Raises:
      ValueError: the lengths differ, or no image is left once the attacker's class is left out.

    Example:
      >>> scores(np.array([0, 1]), np.array([0, 0]), np.array([0, 1]), np.array([0, 0]))
      Scores(acc=100.0, asr=100.0, asr_all=100.0, recovered=0.0, asr_parts=())
    """
    each = np.atleast_2d(triggered_predictions)
    lengths = {len(predictions), each.shape[1], len(labels), len(wanted)}
    if len(lengths) != 1:
        raise ValueError(f"Expected arrays of one length, got lengths {sorted(lengths)}.")
    other = labels != wanted
    if not other.any():
        raise ValueError(
            "Expected images outside the attacker's class, got none: ASR has no meaning here."
        )
    hits = each == wanted
    hit = hits.any(axis=0)

    def percent(mask: np.ndarray) -> float:
        return 100.0 * float(mask.mean())

    return Scores(
        acc=percent(predictions == labels),
        asr=percent(hit[other]),
        asr_all=percent(hit),
        recovered=percent((each == labels).all(axis=0)[other]),
        asr_parts=tuple(percent(part[other]) for part in hits) if len(hits) > 1 else (),
    )


def evaluate(params: Params, images: np.ndarray, labels: np.ndarray, *,
             trigger: Callable[[jax.Array], jax.Array] | Sequence[Callable],
             relabel: Callable[..., np.ndarray], batch_size: int | None = None) -> Scores:
    """ACC, both ASRs and the accuracy on triggered images of one network.

    Args:
      params: the network.
      images: ``[N, H, W, C]`` uint8 in 0..255 or float in [0, 1].
      labels: ``[N]`` true classes.
      trigger: float images in [0, 1] to triggered images in [0, 1]; or several such.
      relabel: true classes to the attacker's classes.
      batch_size: images at a time, as `predict` has it.

    Returns:
      `Scores` in percent.

    Example: `evaluate(params, test.images, test.labels, trigger=attack.apply,
    relabel=attack.relabel)`.
    """
    labels = np.asarray(labels)
    triggers = [trigger] if callable(trigger) else trigger
    return scores(
        predict(params, images, batch_size=batch_size),
        np.stack([predict(params, images, transform=one, batch_size=batch_size)
                  for one in triggers]),
        labels,
        np.asarray(relabel(labels)),
    )
