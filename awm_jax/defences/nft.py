"""Neural mask fine-tuning (NFT): soft BatchNorm masks learnt from mixed clean images."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax

from awm_jax import losses, models, validate
from awm_jax.data import mixing
from awm_jax.defences import neurons, tuning
from awm_jax.defences.base import Defence, Remit, by_path
from awm_jax.defences.neurons import Factors
from awm_jax.types import Arch, Params


@dataclasses.dataclass(frozen=True, kw_only=True)
class NFTConfig(tuning.MinibatchConfig):
    """Settings of NFT; the rest are `tuning.MinibatchConfig`'s.

    ``lr``, ``gamma``, ``floor`` and ``decay`` are the method's; the paper was not at hand for the
    rest, which is this project's choice: how long it runs, the momentum, MixUp's uniform shares,
    frozen BatchNorm statistics (what is optimised is what is returned), a depth l that counts from
    0, and N_c read as the number of clean images per class.

    Args:
      lr: learning rate of the masks, > 0.
      momentum: in [0, 1].
      gamma: weight of ``||1 - m||_1 / N_c``, >= 0.
      floor: lower bound of the first layer's masks, in [0, 1].
      decay: how fast the bound falls with depth, >= 0.

    Raises:
      ValueError: a value outside its range.
    """

    lr: float = 0.05
    momentum: float = 0.9
    gamma: float = 1e-3
    floor: float = 0.8
    decay: float = 0.5

    def __post_init__(self):
        """Checks every range before any work starts."""
        super().__post_init__()
        validate.positive(lr=self.lr)
        validate.between(0.0, 1.0, momentum=self.momentum, floor=self.floor)
        validate.at_least(0, gamma=self.gamma, decay=self.decay)


def bounds(params: Params, config: NFTConfig) -> dict[str, float]:
    """``floor e^{-decay l}``: how low the masks of the l-th BatchNorm layer may fall.

    Args:
      params: the network; its layers come in the order of `awm_jax.models.norm_inputs`, or
        of the numbers in their names where that leaves some out.
      config: ``floor`` and ``decay``.

    Returns:
      ``{layer: bound}``.

    Raises:
      ValueError: the network has no BatchNorm.

    Example:
      >>> from awm_jax.types import Arch
      >>> arch = Arch(name='small_vgg', num_classes=2, image_shape=(8, 8, 3))
      >>> bounds(models.create(jax.random.key(0), arch), NFTConfig())['bn1']
      0.8

    Reference: Karim et al. 2024 (NFT).
    """
    if not neurons.has_norms(params):
        raise ValueError("Expected a network with BatchNorm, whose channels NFT masks; "
                         f"{params.arch.name} has none. Choose another defence.")
    layers = list(models.norm_inputs(params.arch))
    found = [path.removesuffix("/scale") for path in by_path(params.weights)
             if path.endswith("/scale")]
    if set(layers) != set(found):  # a pre-activation network: some are fed by no one convolution
        layers = sorted(found, key=lambda path: [int(n) for n in re.findall(r"\d+", path)])
    return {layer: config.floor * float(np.exp(-config.decay * depth))
            for depth, layer in enumerate(layers)}


def _fits(arch: Arch) -> None:
    """ValueError for a network without BatchNorm."""
    bounds(jax.eval_shape(lambda key: models.create(key, arch), jax.random.key(0)), NFTConfig())


def mask_loss(params: Params, masks: dict[str, jax.Array], images: jax.Array,
              probabilities: jax.Array, weight: float) -> jax.Array:
    """``CE(f(x; m o w), p) + weight ||1 - m||_1``, with frozen statistics.

    Args:
      params: the network.
      masks: ``{layer: [c]}``.
      images: ``[B, H, W, C]``.
      probabilities: ``[B, c]``.
      weight: gamma / N_c.

    Example: see `awm_jax.defences.nft`.
    """
    logits = models.apply(neurons.multiply(params, Factors(masks, {})), images)
    drift = sum((jnp.abs(1 - m).sum() for m in masks.values()), start=jnp.zeros(()))
    return losses.soft_cross_entropy(logits, probabilities) + weight * drift


def _method(key: jax.Array, params: Params, images: jax.Array, labels: jax.Array,
            config: NFTConfig) -> tuple[Params, dict]:
    """``min_m CE(f(mixup(x); m o w), mixup(y)) + gamma ||1 - m||_1 / N_c``, m in its bounds."""
    lowest = bounds(params, config)
    classes = params.arch.num_classes
    weight = config.gamma / max(1.0, len(images) / classes)

    def gradient(key, carried, images, labels):
        mixed, probabilities = mixing.mixup(key, images, labels, classes)
        value, found = jax.value_and_grad(
            lambda m: mask_loss(params, m, mixed, probabilities, weight))(carried.weights)
        return found, carried.batch_stats, value

    def settle(masks):
        return {layer: jnp.clip(m, lowest[layer], 1.0) for layer, m in masks.items()}

    # The masks take the place of the weights: what descends is the same to the scan.
    start = Params(neurons.ones(params).weight, {}, params.arch)
    found, values = tuning.descend(key, start, images, labels, config, gradient=gradient,
                                   optimiser=optax.sgd(config.lr, config.momentum), settle=settle)
    purified = neurons.multiply(params, Factors(found.weights, {}))
    return purified, {"loss": values, "masks": found.weights}


nft = Defence(
    name="nft", method=_method, default=NFTConfig(),
    remit=Remit(lambda path, leaf: path.endswith("scale"), False), fits=_fits,
    paper="Karim et al. 2024, Augmented Neural Fine-Tuning (ECCV)",
)
