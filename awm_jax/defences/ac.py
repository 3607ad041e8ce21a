"""Activation Clustering (AC): the odd part of each class is left out and the network retrained."""

import dataclasses

import jax
import jax.numpy as jnp

from awm_jax import models, training, validate
from awm_jax.defences import chunks
from awm_jax.defences.base import EVERYTHING, Defence
from awm_jax.types import Params

_RULES = ("smaller", "relative_size")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ACConfig(training.TrainConfig):
    """Settings of AC; those of the retraining as in `training.TrainConfig`.

    Args:
      components: principal components kept of each class's features, >= 1 (fewer where the network
        has fewer features). The paper prefers independent components; BackdoorBench takes these.
      rule: ``'smaller'`` drops the smaller cluster of every class, as BackdoorBench does, poisoned
        or not; ``'relative_size'`` only where it is small enough, one of the paper's tests.
      max_size: for that test, the share of its class below which a cluster is dropped, in [0, 0.5];
        0.35 as in IBM's Adversarial Robustness Toolbox.

    Raises:
      ValueError: a value outside its range.
    """

    components: int = 10
    rule: str = "smaller"
    max_size: float = 0.35

    def __post_init__(self):
        """Checks every range before any work starts."""
        super().__post_init__()
        validate.whole(1, components=self.components)
        validate.choice(_RULES, rule=self.rule)
        validate.between(0.0, 0.5, max_size=self.max_size)


def features(params: Params, images: jax.Array) -> jax.Array:
    """The last block's channels, averaged over each image; of a foreign module its last features.

    The paper takes the last hidden layer. In the small VGG that is 16 places of 128 channels;
    their average keeps the covariance of a class at ``[128, 128]``.

    Args:
      params: the network.
      images: ``[N, H, W, C]``, uint8 or floats in [0, 1].

    Returns:
      ``[N, d]`` float32.

    Example:
      >>> from awm_jax.types import Arch
      >>> arch = Arch(name='small_vgg', num_classes=4, image_shape=(8, 8, 3))
      >>> params = models.create(jax.random.key(0), arch)
      >>> features(params, jnp.zeros((2, 8, 8, 3), jnp.uint8)).shape
      (2, 128)
    """
    def one(batch):
        return models.last_features(params, batch)

    return chunks.over_images(one, images)


def two_means(points: jax.Array, weights: jax.Array, steps: int = 20) -> jax.Array:
    """Which of two clusters each point belongs to: Lloyd's algorithm from two fixed starts.

    One start is the point farthest from the mean and the one farthest from that, which finds a
    small distant cluster; the other is the two halves along the first axis, which no single
    outlier can spoil. The tighter result is returned.

    Args:
      points: ``[N, k]``, their weighted mean zero.
      weights: ``[N]`` >= 0; points of weight 0 do not count.
      steps: of Lloyd's algorithm.

    Returns:
      ``[N]`` bool; all False where the counted points are alike to rounding.

    Example:
      >>> second = two_means(jnp.array([[-1.], [-1.], [2.]]), jnp.ones(3))
      >>> bool(second[0] == second[1]), bool(second[1] == second[2])
      (True, False)
    """
    def squares(centres):
        return ((points[:, None] - centres[None]) ** 2).sum(axis=-1)

    def mean(chosen, otherwise):
        total = chosen.sum()
        return jnp.where(total > 0, chosen @ points / jnp.where(total > 0, total, 1.0), otherwise)

    def lloyd(centres):
        def step(centres, _):
            second = (squares(centres).argmin(axis=1) == 1) * weights
            return jnp.stack([mean(weights - second, centres[0]), mean(second, centres[1])]), None

        centres = jax.lax.scan(step, centres, None, length=steps)[0]
        distances = squares(centres)
        return (distances.min(axis=1) * weights).sum(), distances.argmin(axis=1) == 1

    zero = jnp.zeros((1, points.shape[1]), points.dtype)
    counted = jnp.where(weights > 0, 1.0, 0.0)
    first = points[(squares(zero)[:, 0] * counted).argmax()]
    second = points[(squares(first[None])[:, 0] * counted).argmax()]
    right = (points[:, 0] > 0) * weights
    halves = jnp.stack([mean(weights - right, zero[0]), mean(right, zero[0])])
    inertia, chosen = jax.vmap(lloyd)(jnp.stack([jnp.stack([first, second]), halves]))
    return chosen[inertia.argmin()] & (weights > 0)


def cluster(features: jax.Array, labels: jax.Array, num_classes: int, *, components: int = 10,
            rule: str = "smaller", max_size: float = 0.35) -> jax.Array:
    """Images to keep: in each class, those outside the smaller of two clusters.

    Args:
      features: ``[N, d]``.
      labels: ``[N]`` in 0..num_classes-1.
      num_classes: how many classes.
      components: principal components of a class that are clustered.
      rule: as in `ACConfig`.
      max_size: as in `ACConfig`.

    Returns:
      ``[N]`` bool. A class whose clusters are of equal size, or whose features are all alike, is
      kept whole.

    Example:
      >>> points = jnp.array([[0., 0.], [0., 1.], [1., 0.], [9., 9.]])
      >>> cluster(points, jnp.zeros(4, jnp.int32), 1, components=2).tolist()
      [True, True, True, False]

    Reference: Chen et al. 2018, "Detecting Backdoor Attacks on Deep Neural Networks by Activation
    Clustering", Algorithm 1 and its test of relative size.
    """
    def dropped(label):
        weights = (labels == label).astype(features.dtype)
        count = jnp.maximum(weights.sum(), 1.0)
        centred = (features - (weights @ features / count)[None]) * weights[:, None]
        # Ascending order: the last eigenvectors are the principal components.
        _, axes = jnp.linalg.eigh(centred.T @ centred / count)
        points = centred @ axes[:, ::-1][:, :components]
        second = two_means(points, weights)
        share = second.sum() / count
        small = jnp.where(share < 0.5, second, (weights > 0) & ~second)
        size = jnp.minimum(share, 1 - share)
        limit = max_size if rule == "relative_size" else 0.5
        # Rounding alone splits copies of one image: their spread is no more than that of float32.
        spread = (centred**2).sum() > 1e-8 * ((features * weights[:, None]) ** 2).sum()
        return small & (size < limit) & spread

    return ~jax.lax.map(dropped, jnp.arange(num_classes)).any(axis=0)


def rotation(kept: jax.Array, epoch: jax.Array) -> jax.Array:
    """The images of an epoch as long as all: the kept ones in turn, from where the last one ended.

    Args:
      kept: ``[N]`` bool, at least one True.
      epoch: scalar int >= 0.

    Returns:
      ``[N]`` int32.

    Example:
      >>> rotation(jnp.array([True, False, True, True]), jnp.int32(1)).tolist()
      [2, 3, 0, 2]
    """
    count, num_kept = len(kept), jnp.maximum(kept.sum(), 1)
    kept_first = jnp.argsort(~kept, stable=True)
    # Not count * epoch, which would leave int32 for large sets and many epochs.
    start = (epoch * (count % num_kept)) % num_kept
    return kept_first[(start + jnp.arange(count)) % num_kept]


def retrain(key: jax.Array, params: Params, images: jax.Array, labels: jax.Array, kept: jax.Array,
            config: training.TrainConfig) -> tuple[Params, jax.Array]:
    """A new network of the same kind, trained from scratch on the images kept.

    Shapes stay fixed: every epoch is as long as with all images; see `rotation`.

    Args:
      key: PRNG key of weights, order, crops and dropout.
      params: only its ``arch`` is used.
      images: ``[N, H, W, C]`` uint8.
      labels: ``[N]`` int32.
      kept: ``[N]`` bool, at least one True.
      config: how to train; a smaller ``batch_size`` where there are fewer images.

    Returns:
      ``(params, losses [epochs])``.

    Example: see `ac`.
    """
    count = len(images)
    config = dataclasses.replace(config, batch_size=min(config.batch_size, count))
    key_init, key_run = jax.random.split(key)

    def epoch(state, number):
        picks = rotation(kept, number)
        return training.epoch(key_run, state, images[picks], labels[picks], params.arch, config)

    state = training.init(key_init, params.arch, config, count)
    state, losses = jax.lax.scan(epoch, state, jnp.arange(config.epochs))
    return Params(state.weights, state.batch_stats, params.arch), losses


def _method(key: jax.Array, params: Params, images: jax.Array, labels: jax.Array,
            config: ACConfig) -> tuple[Params, dict]:
    """Clusters the suspect network's features class by class, then retrains without the odd."""
    kept = cluster(features(params, images), labels, params.arch.num_classes,
                   components=config.components, rule=config.rule, max_size=config.max_size)
    retrained, losses = retrain(key, params, images, labels, kept, config)
    return retrained, {"kept": kept, "loss": losses}


ac = Defence(
    name="ac", method=_method, default=ACConfig(), remit=EVERYTHING, needs="training",
    paper="Chen et al. 2018, Algorithm 1",
)
