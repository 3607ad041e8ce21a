"""Adversarial Neuron Pruning (ANP): neurons that a small perturbation turns harmful are pruned."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from awm_jax import losses, models, validate
from awm_jax import masks as masking
from awm_jax.defences import neurons, tuning
from awm_jax.defences.base import WEIGHTS, Defence
from awm_jax.defences.neurons import Factors, PruneConfig
from awm_jax.types import Params


@dataclasses.dataclass(frozen=True, kw_only=True)
class ANPConfig(PruneConfig):
    """Settings of ANP; the rest are `PruneConfig`'s.

    Args:
      variant: ``'paper'``: the perturbation is clipped to [-eps, eps] after its step, the set of
        eq. 3.1; ``'official'``: it is not, as in the published code, so it reaches 2 eps. Nothing
        else differs.
      steps: mask steps, >= 1, rounded up to whole passes over the images.
      batch_size: images a step, >= 1; all of them where there are fewer.
      lr: learning rate of the masks, > 0 (BackdoorBench's settings use .01).
      momentum: in [0, 1].
      eps: bound of the perturbation relative to a neuron's weights, > 0.
      alpha: weight of the loss without perturbation, in [0, 1]; beta is ``1 - alpha``.
      crop: largest random shift of an image in pixels, >= 0.
      flip: True if horizontal flips keep the label (CIFAR-10, not traffic signs or digits).

    Raises:
      ValueError: a value outside its range.
    """

    variant: str = "paper"
    steps: int = 2000
    batch_size: int = 128
    lr: float = 0.2
    momentum: float = 0.9
    eps: float = 0.4
    alpha: float = 0.2
    crop: int = 2
    flip: bool = False

    def __post_init__(self):
        """Checks every range before any work starts."""
        super().__post_init__()
        validate.choice(("paper", "official"), variant=self.variant)
        validate.whole(1, steps=self.steps, batch_size=self.batch_size)
        validate.positive(lr=self.lr, eps=self.eps)
        validate.between(0.0, 1.0, momentum=self.momentum, alpha=self.alpha)
        validate.whole(0, crop=self.crop)
        validate.boolean(flip=self.flip)


class Proportions(NamedTuple):
    """How a network predicts once its neurons are perturbed.

    Args:
      shares: ``[c]`` share of the predictions that each class gets, sums to 1.
      error_rate: scalar, share of the images given another class than their label's, in [0, 1].
    """

    shares: jax.Array
    error_rate: jax.Array


def training_loss(key: jax.Array, params: Params, factors: Factors, images: jax.Array,
                  labels: jax.Array) -> jax.Array:
    """Cross-entropy of ``f(x; a o w, b o bias)`` in training mode: batch statistics, dropout."""
    logits, _ = models.apply_train(neurons.multiply(params, factors), images, key=key)
    return losses.cross_entropy(logits, labels)


def learn_masks(key: jax.Array, params: Params, images: jax.Array, labels: jax.Array,
                config: ANPConfig) -> tuple[dict[str, jax.Array], jax.Array]:
    """``min_m alpha L(m o w, b) + (1 - alpha) max_{d, xi} L((m + d) o w, (1 + xi) o b)``.

    Args:
      key: PRNG key.
      params: the suspect network.
      images: ``[n, H, W, C]`` float32 in [0, 1].
      labels: ``[n]`` int32.
      config: `ANPConfig`.

    Returns:
      ``(masks {layer: [c]} in [0, 1], losses [steps])``.

    Example: see `awm_jax.defences.anp`.

    Reference: AWM paper, eq. 3.1 and 3.2, with m relaxed to [0, 1] as ANP does.
    """
    unmasked = neurons.ones(params)

    def gradient(key, carried, images, labels):
        found, value = neurons.perturbed_gradient(
            key, lambda k, factors: training_loss(k, params, factors, images, labels),
            Factors(carried.weights, unmasked.bias), eps=config.eps, alpha=config.alpha,
            project=config.variant == "paper")
        return found.weight, carried.batch_stats, value

    tune = tuning.for_steps(config.steps, len(images), config)
    # The masks take the place of the weights: what descends is the same to the scan.
    found, values = tuning.descend(
        key, Params(unmasked.weight, {}, params.arch), images, labels, tune, gradient=gradient,
        optimiser=optax.sgd(config.lr, config.momentum), settle=masking.clip)
    return found.weights, values


def prediction_proportions(key: jax.Array, params: Params, images: jax.Array, labels: jax.Array,
                           *, eps: float = 0.4, steps: int = 1) -> Proportions:
    """What a network predicts once its neurons are perturbed to do the most harm.

    ``max_{d, xi in [-eps, eps]^n} L(f(x; (1 + d) o w, (1 + xi) o b), y)`` by sign steps of length
    ``eps / steps`` from a random start, each followed by clipping. A network with a backdoor tends
    to give many images the attacker's class. BatchNorm's statistics are frozen: this is the network
    as it is used.

    Args:
      key: PRNG key of the start.
      params: the network.
      images: ``[n, H, W, C]`` float32 in [0, 1], all perturbed and predicted as one batch.
      labels: ``[n]`` int32.
      eps: bound of the perturbation relative to a neuron's weights, > 0.
      steps: sign steps, >= 1.

    Returns:
      `Proportions`.

    Raises:
      ValueError: ``eps`` or ``steps`` outside its range.

    Example:
      >>> from awm_jax.types import Arch
      >>> arch = Arch(name='small_vgg', num_classes=4, image_shape=(8, 8, 3))
      >>> params = models.create(jax.random.key(0), arch)
      >>> images, labels = jnp.full((2, 8, 8, 3), .5), jnp.array([0, 1])
      >>> found = prediction_proportions(jax.random.key(1), params, images, labels)
      >>> found.shares.shape, float(found.shares.sum())
      ((4,), 1.0)

    Reference: AWM paper, eq. 3.1 and Figure 1; ANP supplement, section B, Figures 8 and 9.
    """
    validate.positive(eps=eps)
    validate.whole(1, steps=steps)
    unmasked = neurons.ones(params)
    start, shaped = neurons.uniform(key, unmasked, eps)

    def loss(noise):
        factors = jax.tree.map(jnp.add, unmasked, shaped(noise))
        logits = models.apply(neurons.multiply(params, factors), images)
        return losses.cross_entropy(logits, labels), logits.argmax(axis=1)

    def step(noise, _):
        gradient, predicted = jax.grad(loss, has_aux=True)(noise)
        return jnp.clip(noise + eps / steps * jnp.sign(gradient), -eps, eps), predicted

    # One turn more than there are steps: the last one only predicts, without a second network.
    predicted = jax.lax.scan(step, start, None, length=steps + 1)[1][-1]
    shares = jax.nn.one_hot(predicted, params.arch.num_classes).mean(axis=0)
    return Proportions(shares, (predicted != labels).mean())


def _method(key: jax.Array, params: Params, images: jax.Array, labels: jax.Array,
            config: ANPConfig) -> tuple[Params, dict]:
    """`learn_masks`, then `neurons.choose` on the original network."""
    key_held, key_masks = jax.random.split(key)
    learnt, held = neurons.hold_out(key_held, len(images), config)
    masks, values = learn_masks(key_masks, params, images[learnt], labels[learnt], config)
    pruned, info = neurons.choose(params, masks, images[held], labels[held], config)
    return pruned, {"loss": values, **info}


anp = Defence(
    # With BatchNorm only scales change; without it, kernels and biases.
    name="anp", method=_method, default=ANPConfig(), remit=WEIGHTS,
    paper="Wu & Wang 2021, Adversarial Neuron Pruning; AWM paper, eq. 3.1 and 3.2",
)
