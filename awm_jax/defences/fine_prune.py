"""Fine-Pruning (FP): channels asleep on clean images are removed, then the network is tuned."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from awm_jax import models, validate
from awm_jax.defences import chunks, tuning
from awm_jax.defences.base import EVERYTHING, Defence
from awm_jax.types import Params


@dataclasses.dataclass(frozen=True, kw_only=True)
class FinePruneConfig(tuning.TuneConfig):
    """Settings of Fine-Pruning; those of the tuning as in `tuning.TuneConfig`.

    Args:
      max_drop: pruning stops before the accuracy on held-out clean images falls by more than this
        share of what it was, in [0, 1] (0.1 is BackdoorBench's, which measures on test images).
      held_out: share of the clean images, drawn by the key, on which that is measured, in (0, 1];
        at least one and, of two or more, never all. The others rank the channels; all of them tune
        the network.

    Raises:
      ValueError: a value outside its range.
    """

    max_drop: float = 0.1
    held_out: float = 0.5

    def __post_init__(self):
        """Checks every range before any work starts."""
        super().__post_init__()
        validate.between(0.0, 1.0, max_drop=self.max_drop, held_out=self.held_out)
        validate.positive(held_out=self.held_out)


class Head(NamedTuple):
    """What the classifier, the network's last dense layer, sees.

    Args:
      inputs: ``[n, F]``: the last block's channels, flattened ``[h, w, c]`` or pooled ``[c]``.
      activity: ``[n, c]``, the last block's output averaged over each image; of a foreign module,
        whose blocks are its own matter, the inputs themselves.
    """

    inputs: jax.Array
    activity: jax.Array


def head(params: Params, images: jax.Array) -> Head:
    """What the classifier of the frozen network sees.

    Args:
      params: a network that a dense layer ends.
      images: ``[n, H, W, C]`` float32 in [0, 1].

    Returns:
      `Head`.

    Raises:
      ValueError: it has no such layer.

    Example:
      >>> from awm_jax.types import Arch
      >>> arch = Arch(name='small_vgg', num_classes=4, image_shape=(8, 8, 3))
      >>> found = head(models.create(jax.random.key(0), arch), jnp.zeros((2, 8, 8, 3)))
      >>> found.inputs.shape, found.activity.shape
      ((2, 128), (2, 128))
    """
    def one(batch):
        return models.features(params, batch), models.last_features(params, batch)

    return Head(*chunks.over_images(one, images))


def prune(kernel: jax.Array, pruned: jax.Array) -> jax.Array:
    """Zero rows in the classifier's kernel for every channel pruned, at each place of the image.

    Args:
      kernel: ``[F, classes]``.
      pruned: ``[c]`` bool; the kernel's rows are ``[h, w, c]`` in row-major order, or ``[c]``.

    Returns:
      A kernel of the same shape.

    Example:
      >>> prune(jnp.ones((4, 1)), jnp.array([True, False])).ravel().tolist()
      [0.0, 1.0, 0.0, 1.0]
    """
    rows = kernel.reshape(-1, len(pruned), kernel.shape[-1])
    return jnp.where(pruned[None, :, None], 0.0, rows).reshape(kernel.shape)


def choose(accuracies: jax.Array, max_drop: float) -> jax.Array:
    """The last candidate before accuracy first falls by more than ``max_drop`` of the first one's.

    Args:
      accuracies: ``[m]`` in [0, 1], the first one unpruned.
      max_drop: in [0, 1].

    Returns:
      Its index, int32; 0 where nothing was right in the first place, as nothing is learnt then.

    Example:
      >>> int(choose(jnp.array([.8, .78, .6, .8]), 0.1))
      1
    """
    # The tolerance keeps a share that is exactly reached, such as 9 images of 10, from rounding.
    enough = accuracies >= (1 - max_drop) * accuracies[0] - 1e-6
    fell = jnp.argmin(enough)
    last = jnp.where(enough.all(), len(accuracies) - 1, fell - 1)
    return jnp.where(accuracies[0] > 0, last, 0)


def _candidates(channels: int) -> np.ndarray:
    """How many channels to prune: steps of 1%, never all."""
    return np.unique(channels * np.arange(100) // 100)


def _accuracies(inputs: jax.Array, labels: jax.Array, dense: dict, ranks: jax.Array,
                counts: np.ndarray) -> jax.Array:
    """Accuracy with each number of channels pruned; only the classifier has to be run again."""
    channels = len(ranks)
    inputs = inputs.reshape(len(labels), -1, channels)
    kernel = dense["kernel"].reshape(inputs.shape[1], channels, -1)

    def accuracy(count):
        logits = jnp.einsum("bpc,pck->bk", inputs * (ranks >= count)[None, None], kernel)
        if "bias" in dense:
            logits += dense["bias"][None]
        return (logits.argmax(axis=1) == labels).mean()

    return jax.lax.map(accuracy, jnp.asarray(counts))


def _method(key: jax.Array, params: Params, images: jax.Array, labels: jax.Array,
            config: FinePruneConfig) -> tuple[Params, dict]:
    """Prunes the classifier's least active inputs, then fine-tunes what is left."""
    key_split, key_tune = jax.random.split(key)
    count = len(images)
    num_held = min(max(1, round(config.held_out * count)), max(1, count - 1))
    order = jax.random.permutation(key_split, count)
    held, ranking = (order, order) if count < 2 else (order[:num_held], order[num_held:])

    found = head(params, images)
    activity = found.activity[ranking].mean(axis=0)
    ranks = jnp.argsort(jnp.argsort(activity))
    counts = _candidates(len(activity))
    name = models.needed_classifier(params.arch)
    accuracies = _accuracies(found.inputs[held], labels[held],
                             models.layer(params.weights, name), ranks, counts)
    number = jnp.asarray(counts)[choose(accuracies, config.max_drop)]
    pruned = ranks < number

    def settle(weights):
        dense = models.layer(weights, name)
        return models.with_layer(weights, name, {**dense, "kernel": prune(dense["kernel"], pruned)})

    start = dataclasses.replace(params, weights=settle(params.weights))
    tuned, losses = tuning.descend(key_tune, start, images, labels, config, settle=settle)
    return tuned, {"loss": losses, "pruned": pruned, "number": number, "activity": activity,
                   "accuracies": accuracies, "candidates": jnp.asarray(counts)}


fp = Defence(
    name="fp", method=_method, default=FinePruneConfig(), remit=EVERYTHING,
    fits=models.needed_classifier,
    paper="Liu et al., RAID 2018, \"Fine-Pruning\", sections 3 and 4",
)
