"""Neural Cleanse: a smallest trigger for every class; an outlier among them is unlearned."""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from awm_jax import losses, models, validate
from awm_jax.defences import tuning
from awm_jax.defences.base import EVERYTHING, Defence
from awm_jax.types import Params


@dataclasses.dataclass(frozen=True, kw_only=True)
class NCConfig(tuning.TuneConfig):
    """Settings of Neural Cleanse, and of the fine-tuning that unlearns what it finds.

    The search's are the official code's (with 80 epochs, BackdoorBench's; the official code makes
    1000 of fixed size). Fine-tuning is one epoch, as in the paper, whose clean set is a tenth of
    the training set: **with few images give it more**. Triggers stay put as images are shifted.

    Args:
      search_epochs: passes over the images for each class, >= 1.
      search_batch_size: images a step of the search, >= 1; all of them where there are fewer.
      search_lr: Adam's learning rate on mask and pattern, > 0.
      cost: initial weight of the mask's L1 norm, > 0.
      cost_up: factor of the cost once the trigger has succeeded for ``patience`` epochs, > 1.
      cost_down: divisor once it has failed for as many, > 1.
      patience: epochs, >= 1.
      success: share of images that the trigger must move to the class, in [0, 1].
      threshold: anomaly index above which a class is suspect, > 0.
      stamped: share of images that carry the trigger while it is unlearned, in [0, 1].
      always: True to unlearn the smallest trigger even if no class is suspect; otherwise the
        network then stays as it is, as in the paper.
      chunk: classes searched side by side, >= 1; each takes the memory of one training step.

    Raises:
      ValueError: a value outside its range.
    """

    epochs: int = 1
    batch_size: int = 32
    search_epochs: int = 80
    search_batch_size: int = 32
    search_lr: float = 0.1
    cost: float = 1e-3
    cost_up: float = 2.0
    cost_down: float = 2.0**1.5
    patience: int = 5
    success: float = 0.98
    threshold: float = 2.0
    stamped: float = 0.2
    always: bool = False
    chunk: int = 1

    def __post_init__(self):
        """Checks every range before any work starts."""
        super().__post_init__()
        validate.whole(1, search_epochs=self.search_epochs, patience=self.patience,
                       search_batch_size=self.search_batch_size, chunk=self.chunk)
        validate.positive(search_lr=self.search_lr, cost=self.cost, threshold=self.threshold)
        validate.boolean(always=self.always)
        for name in ("cost_up", "cost_down"):
            value = getattr(self, name)
            validate.at_least(1, **{name: value})
            if value == 1:
                raise ValueError(f"Expected {name}={value} > 1.")
        validate.between(0.0, 1.0, success=self.success, stamped=self.stamped)


class Reversed(NamedTuple):
    """The smallest trigger found for every class.

    Args:
      masks: ``[c, H, W, 1]`` in [0, 1], how much of each pixel the pattern replaces.
      patterns: ``[c, H, W, C]`` in [0, 1].
      norms: ``[c]``, the masks' L1 norms, in pixels.
      success: ``[c]`` in [0, 1], the share of images moved to the class over the steps of the epoch
        that ended with this mask. Where no epoch reaches ``config.success``, the last one's.
    """

    masks: jax.Array
    patterns: jax.Array
    norms: jax.Array
    success: jax.Array


class _Search(NamedTuple):
    """What the search for one class carries from epoch to epoch."""

    free: tuple[jax.Array, jax.Array]  # mask and pattern before their tanh
    opt_state: optax.OptState
    cost: jax.Array
    ups: jax.Array
    downs: jax.Array
    best: Reversed


def stamp(images: jax.Array, mask: jax.Array, pattern: jax.Array) -> jax.Array:
    """``(1 - m) x + m p``.

    Args:
      images: ``[B, H, W, C]`` in [0, 1].
      mask: ``[H, W, 1]`` in [0, 1].
      pattern: ``[H, W, C]`` in [0, 1].

    Returns:
      ``[B, H, W, C]`` in [0, 1].

    Example:
      >>> stamp(jnp.zeros((1, 1, 2, 1)), jnp.array([[[0.], [.5]]]), jnp.ones((1, 2, 1))).ravel(
      ...     ).tolist()
      [0.0, 0.5]

    Reference: Wang et al. 2019, section IV-B, equation 2.
    """
    return (1 - mask[None]) * images + (mask * pattern)[None]


def adapt(cost: jax.Array, ups: jax.Array, downs: jax.Array, reached: jax.Array,
          config: NCConfig) -> tuple[jax.Array, jax.Array, jax.Array]:
    """One epoch's change of the norm's weight: up after a run of successes, down after failures.

    Args:
      cost: scalar > 0.
      ups: successes in a row since the last change.
      downs: failures in a row since the last change.
      reached: scalar bool, whether this epoch succeeded.
      config: ``patience``, ``cost_up``, ``cost_down``.

    Returns:
      ``(cost, ups, downs)``.

    Example:
      >>> [float(v) for v in adapt(1., 4, 0, True, NCConfig())]
      [2.0, 0.0, 0.0]
    """
    ups, downs = jnp.where(reached, ups + 1, 0), jnp.where(reached, 0, downs + 1)
    up, down = ups >= config.patience, downs >= config.patience
    cost = cost * jnp.where(up, config.cost_up, jnp.where(down, 1 / config.cost_down, 1.0))
    return cost, jnp.where(up, 0, ups), jnp.where(down, 0, downs)


def _squash(free: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """Mask and pattern in (0, 1) of any numbers."""
    mask, pattern = (jnp.tanh(value) / 2 + 0.5 for value in free)
    return mask, pattern


def _objective(free, params, images, target, cost):
    """``CE(f(stamped x), target) + cost ||m||_1``, and the share of images that arrive."""
    mask, pattern = _squash(free)
    logits = models.apply(params, stamp(images, mask, pattern))
    loss = losses.cross_entropy(logits, jnp.full(len(images), target))
    return loss + cost * mask.sum(), (logits.argmax(axis=1) == target).mean(dtype=logits.dtype)


def _start(key: jax.Array, images: jax.Array, rule: optax.GradientTransformation,
           config: NCConfig) -> _Search:
    """Mask and pattern drawn uniformly, as in the official code; nothing found yet."""
    keys = jax.random.split(key)
    height, width, channels = images.shape[1:]
    mask, pattern = (jax.random.uniform(k, (height, width, n), images.dtype, 0.01, 0.99)
                     for k, n in zip(keys, (1, channels), strict=True))
    free = (jnp.arctanh(2 * mask - 1), jnp.arctanh(2 * pattern - 1))
    nothing, zero = jnp.asarray(jnp.inf, images.dtype), jnp.zeros((), images.dtype)
    return _Search(free, rule.init(free), zero + config.cost, jnp.array(0), jnp.array(0),
                   Reversed(mask, pattern, nothing, zero))


def _reverse_one(params: Params, images: jax.Array, config: NCConfig,
                 inputs: tuple[jax.Array, jax.Array]) -> Reversed:
    """The whole search for one class, ``inputs`` being its key and number."""
    (key, target), rule = inputs, optax.adam(config.search_lr, b1=0.5, b2=0.9)
    key_start, key_order = jax.random.split(key)
    order = tuning.minibatches(key_order, len(images), config.search_batch_size,
                               config.search_epochs)
    order = order.reshape(config.search_epochs, -1, order.shape[1])

    def epoch(state, batches):
        def step(carry, picks):
            free, opt_state = carry
            gradient, hit = jax.grad(_objective, has_aux=True)(free, params, images[picks], target,
                                                               state.cost)
            updates, opt_state = rule.update(gradient, opt_state)
            return (optax.apply_updates(free, updates), opt_state), hit

        (free, opt_state), hits = jax.lax.scan(step, (state.free, state.opt_state), batches)
        mask, pattern = _squash(free)
        now = Reversed(mask, pattern, mask.sum(), hits.mean())
        reached = now.success >= config.success
        # Until an epoch succeeds, the newest is kept; its infinite norm marks it as beaten by any.
        better = (reached & (now.norms < state.best.norms)) | jnp.isinf(state.best.norms)
        best = jax.tree.map(lambda new, old: jnp.where(better, new, old),
                            now._replace(norms=jnp.where(reached, now.norms, jnp.inf)), state.best)
        return _Search(free, opt_state,
                       *adapt(state.cost, state.ups, state.downs, reached, config), best), None

    best = jax.lax.scan(epoch, _start(key_start, images, rule, config), order)[0].best
    return best._replace(norms=best.masks.sum())


def reverse(key: jax.Array, params: Params, images: jax.Array, *, config: NCConfig) -> Reversed:
    """For each class ``y``: ``min_(m, p) mean CE(f((1 - m) x + m p), y) + cost ||m||_1``.

    Args:
      key: PRNG key of starts and orders.
      params: the network.
      images: ``[n, H, W, C]`` in [0, 1], of any classes.
      config: the search's settings.

    Returns:
      `Reversed`; of the epochs in which the trigger succeeds, the one with the smallest mask.

    Example: see `neural_cleanse.nc`, whose ``info`` holds all of it.

    Reference: Wang et al. 2019, section IV-B, equation 3.
    """
    classes = params.arch.num_classes
    one = functools.partial(_reverse_one, params, images, config)
    return jax.lax.map(one, (jax.random.split(key, classes), jnp.arange(classes)),
                       batch_size=config.chunk if config.chunk > 1 else None)


def anomaly_index(norms: jax.Array) -> jax.Array:
    """``|v - median| / (1.4826 * median |v - median|)``, in standard deviations of a normal law.

    Args:
      norms: ``[c]``.

    Returns:
      ``[c]`` >= 0; large rather than infinite where over half of the norms are equal.

    Example:
      >>> [round(v, 3) for v in anomaly_index(jnp.array([1., 10., 11., 12., 13.])).tolist()]
      [6.745, 0.674, 0.0, 0.674, 1.349]

    Reference: Wang et al. 2019, section IV-C (and Hampel 1974): over 2 is an outlier.
    """
    distance = jnp.abs(norms - jnp.median(norms))
    return distance / (1.4826 * jnp.maximum(jnp.median(distance), 1e-6))


def suspect(found: Reversed, config: NCConfig) -> tuple[jax.Array, jax.Array]:
    """The class with the smallest working trigger, and whether it is an outlier.

    Args:
      found: from `reverse`.
      config: ``success``, ``threshold``.

    Returns:
      ``(class, flagged)``, int32 and bool scalars. A mask that does not reach ``success`` is no
      trigger: it is never flagged, and only chosen where no class has a better one.

    Example:
      >>> norms = jnp.array([20., 9., 21., 22., 23.])
      >>> target, flagged = suspect(Reversed(None, None, norms, jnp.ones(5)), NCConfig())
      >>> int(target), bool(flagged)
      (1, True)
    """
    works = found.success >= config.success
    target = jnp.argmin(found.norms + jnp.where(works, 0, found.norms.max()))
    outlies = anomaly_index(found.norms)[target] > config.threshold
    return target, works[target] & outlies & (found.norms[target] < jnp.median(found.norms))


def _method(key: jax.Array, params: Params, images: jax.Array, labels: jax.Array,
            config: NCConfig) -> tuple[Params, dict]:
    """Finds a trigger for each class and fine-tunes on images that carry an outlier's.

    They keep their true labels; a fifth of each batch carries it, drawn image by image.
    """
    key_reverse, key_tune = jax.random.split(key)
    found = reverse(key_reverse, params, images, config=config)
    target, flagged = suspect(found, config)
    mask, pattern = found.masks[target], found.patterns[target]

    def stamped_loss(key, params, x, y):
        key_stamp, key_loss = jax.random.split(key)
        chosen = jax.random.bernoulli(key_stamp, config.stamped, (len(x), 1, 1, 1))
        return tuning.cross_entropy(key_loss, params, jnp.where(chosen, stamp(x, mask, pattern), x),
                                    y)

    tuned, values = tuning.descend(key_tune, params, images, labels, config,
                                   gradient=tuning.plain(stamped_loss))
    act = flagged | config.always
    kept = jax.tree.map(lambda new, old: jnp.where(act, new, old), tuned, params)
    return kept, {"loss": values, "target": target, "flagged": flagged,
                  "anomaly_index": anomaly_index(found.norms), **found._asdict()}


nc = Defence(
    name="nc", method=_method, default=NCConfig(), remit=EVERYTHING,
    paper="Wang et al., Neural Cleanse: Identifying and Mitigating Backdoor Attacks in Neural "
    "Networks, S&P 2019, sections IV and VI-C",
)
