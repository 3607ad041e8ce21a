"""Anti-Backdoor Learning (ABL): what is learnt too easily is set apart, then unlearnt."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from awm_jax import models, validate
from awm_jax.data import augment
from awm_jax.defences import chunks, tuning
from awm_jax.defences.base import EVERYTHING, Defence
from awm_jax.types import Params

_VARIANTS = ("sample", "batch")
_each_loss = optax.softmax_cross_entropy_with_integer_labels


@dataclasses.dataclass(frozen=True, kw_only=True)
class ABLConfig:
    """Settings of ABL: three stages of SGD, of which only the second one shifts its images.

    Args:
      tune_epochs: passes with local gradient ascent, >= 1.
      finetune_epochs: passes over the images that were not isolated, >= 1.
      unlearn_epochs: passes of gradient ascent over those that were, >= 1.
      gamma: loss around which the first stage keeps every image, >= 0, in nats.
      ascent: ``'sample'`` compares each image's loss with gamma, as in the paper; ``'batch'``
        their mean, as its code and BackdoorBench.
      isolate: share of the training images set apart, in (0, 0.5]; at least one image.
      batch_size: images a step, >= 1; all of them where there are fewer.
      lr: learning rate of the first stage, > 0.
      finetune_lr: that of the second, > 0; a tenth of it in its last third.
      unlearn_lr: that of the third, > 0 (5e-4 in the paper; BackdoorBench's code runs 1e-4).
      momentum: in [0, 1].
      weight_decay: coefficient of the weights added to their gradient, >= 0.
      crop: largest random shift of an image in pixels, >= 0.
      flip: True if horizontal flips keep the label.

    Raises:
      ValueError: a value outside its range.
    """

    tune_epochs: int = 20
    finetune_epochs: int = 60
    unlearn_epochs: int = 20
    gamma: float = 0.5
    ascent: str = "sample"
    isolate: float = 0.01
    batch_size: int = 64
    lr: float = 0.1
    finetune_lr: float = 0.1
    unlearn_lr: float = 5e-4
    momentum: float = 0.9
    weight_decay: float = 1e-4
    crop: int = 4
    flip: bool = False

    def __post_init__(self):
        """Checks every range before any work starts."""
        validate.whole(1, tune_epochs=self.tune_epochs, finetune_epochs=self.finetune_epochs,
                       unlearn_epochs=self.unlearn_epochs, batch_size=self.batch_size)
        validate.whole(0, crop=self.crop)
        validate.boolean(flip=self.flip)
        validate.at_least(0, gamma=self.gamma, weight_decay=self.weight_decay)
        validate.choice(_VARIANTS, ascent=self.ascent)
        validate.between(0.0, 0.5, isolate=self.isolate)
        validate.positive(isolate=self.isolate, lr=self.lr, finetune_lr=self.finetune_lr,
                          unlearn_lr=self.unlearn_lr)
        validate.between(0.0, 1.0, momentum=self.momentum)


class Plan(NamedTuple):
    """Every step of the three stages, in order.

    Args:
      places: ``[S, B]``, which images a step sees, as places in their present order; the isolated
        ones come last in it.
      stage: ``[S]``: 0 ascent around gamma, 1 fine-tuning, 2 unlearning.
      lr: ``[S]``.
      isolate: ``[S]`` bool, True where the images are put in order before the step.
    """

    places: jax.Array
    stage: jax.Array
    lr: jax.Array
    isolate: jax.Array


def num_isolated(count: int, config: ABLConfig) -> int:
    """How many of ``count`` images are set apart: their share, at least 1 and never all.

    Example:
      >>> num_isolated(39209, ABLConfig()), num_isolated(3, ABLConfig())
      (392, 1)
    """
    return min(max(1, round(config.isolate * count)), max(1, count - 1))


def _decay(lr: float, steps: int) -> jax.Array:
    """A tenth of ``lr`` in the last third of the steps."""
    return jnp.where(jnp.arange(steps) < 2 * steps / 3, lr, lr / 10)


def plan(key: jax.Array, count: int, config: ABLConfig) -> Plan:
    """Draws the minibatches of all stages.

    Args:
      key: PRNG key.
      count: training images, >= 1.
      config: settings.

    Returns:
      `Plan`.

    Example:
      >>> drawn = plan(jax.random.key(0), 10, ABLConfig(batch_size=4))
      >>> drawn.places.shape, bool((drawn.places[-1] == 9).all())
      ((260, 4), True)
    """
    size, apart = min(config.batch_size, count), num_isolated(count, config)
    rest = max(1, count - apart)
    stages = ((0, count, config.tune_epochs), (0, rest, config.finetune_epochs),
              (count - apart, apart, config.unlearn_epochs))
    places = []
    for key_stage, (start, images, epochs) in zip(jax.random.split(key, 3), stages, strict=True):
        drawn = tuning.minibatches(key_stage, images, size, epochs)
        # One shape for all: a stage of fewer images than a batch repeats them.
        places.append(start + drawn[:, jnp.arange(size) % drawn.shape[1]])
    steps = [len(rows) for rows in places]
    stage = jnp.repeat(jnp.arange(3), jnp.asarray(steps), total_repeat_length=sum(steps))
    lr = jnp.concatenate([jnp.full(steps[0], config.lr), _decay(config.finetune_lr, steps[1]),
                          jnp.full(steps[2], config.unlearn_lr)])
    return Plan(jnp.concatenate(places), stage, lr, jnp.arange(sum(steps)) == steps[0])


def objective(losses: jax.Array, stage: jax.Array, config: ABLConfig) -> jax.Array:
    """What a step descends: ``mean sign(L_i - gamma) L_i``, then ``mean L_i``, then its opposite.

    Args:
      losses: ``[B]``, the cross-entropy of each image.
      stage: scalar in 0..2.
      config: its ``gamma`` and ``ascent``.

    Returns:
      A scalar.

    Example:
      >>> losses = jnp.array([0.25, 2.25])
      >>> [float(objective(losses, jnp.int32(stage), ABLConfig())) for stage in range(3)]
      [1.0, 1.25, -1.25]

    Reference: Li et al., NeurIPS 2021, "Anti-Backdoor Learning", section 3 (local gradient ascent
    and global gradient ascent).
    """
    mean = losses.mean()
    if config.ascent == "sample":
        local = (jnp.sign(losses - config.gamma) * losses).mean()
    else:
        local = jnp.sign(mean - config.gamma) * mean
    return jnp.stack([local, mean, -mean])[stage]


def hardest_first(params: Params, images: jax.Array, labels: jax.Array) -> jax.Array:
    """The images' numbers by falling loss in evaluation mode, so that the isolated come last.

    Args:
      params: the network after the first stage.
      images: ``[N, H, W, C]`` uint8.
      labels: ``[N]`` int32.

    Returns:
      ``[N]`` int32.

    Example: see `abl`.
    """
    logits = chunks.over_images(lambda x: models.apply(params, x), images)
    return jnp.argsort(-_each_loss(logits, labels)).astype(jnp.int32)


def _step(params: Params, x: jax.Array, y: jax.Array, key: jax.Array, stage: jax.Array,
          config: ABLConfig) -> tuple[Any, Any, jax.Array]:
    """Gradients, new BatchNorm statistics and the plain loss of one minibatch."""
    key_crop, key_dropout = jax.random.split(key)
    x = x.astype(jnp.float32) / 255.0
    shifted = augment.crop_flip(key_crop, x, pad=config.crop, flip=config.flip)
    x = jnp.where(stage == 1, shifted, x)

    def loss(weights):
        logits, batch_stats = models.apply_train(
            dataclasses.replace(params, weights=weights), x, key=key_dropout)
        each = _each_loss(logits, y)
        return objective(each, stage, config), (batch_stats, each.mean())

    gradients, (batch_stats, mean) = jax.grad(loss, has_aux=True)(params.weights)
    return gradients, batch_stats, mean


def _method(key: jax.Array, params: Params, images: jax.Array, labels: jax.Array,
            config: ABLConfig) -> tuple[Params, dict]:
    """All stages from new weights, as one scan; of the suspect network only its kind is used."""
    key_init, key_plan, key_steps = jax.random.split(key, 3)
    steps = plan(key_plan, len(images), config)
    start = models.create(key_init, params.arch)
    rule = optax.chain(optax.add_decayed_weights(config.weight_decay),
                       optax.sgd(lambda count: steps.lr[count], config.momentum, nesterov=True))

    def step(carry, inputs):
        params, opt_state, order = carry
        now, key = inputs
        order = jax.lax.cond(now.isolate, lambda: hardest_first(params, images, labels),
                             lambda: order)
        picks = order[now.places]
        gradients, batch_stats, loss = _step(params, images[picks], labels[picks], key, now.stage,
                                             config)
        updates, opt_state = rule.update(gradients, opt_state, params.weights)
        weights = optax.apply_updates(params.weights, updates)
        return (Params(weights, batch_stats, params.arch), opt_state, order), loss

    carry = (start, rule.init(start.weights), jnp.arange(len(images), dtype=jnp.int32))
    keys = jax.random.split(key_steps, len(steps.stage))
    (cleaned, _, order), losses = jax.lax.scan(step, carry, (steps, keys))
    apart = order[len(images) - num_isolated(len(images), config):]
    isolated = jnp.zeros(len(images), bool).at[apart].set(True)
    return cleaned, {"loss": losses, "isolated": isolated}


abl = Defence(
    name="abl", method=_method, default=ABLConfig(), remit=EVERYTHING, needs="training",
    paper="Li et al., NeurIPS 2021, section 3",
)
