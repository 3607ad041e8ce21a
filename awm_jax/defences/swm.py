"""Soft weight masking (ANP+SWM), the first of the steps from ANP to AWM; for ablations."""

import dataclasses

import jax
import optax

from awm_jax import losses, models, validate
from awm_jax import masks as masking
from awm_jax.defences import neurons, tuning
from awm_jax.defences.base import HIDDEN_KERNELS, Defence
from awm_jax.types import Masks, Params


@dataclasses.dataclass(frozen=True, kw_only=True)
class SWMConfig:
    """Settings of soft weight masking.

    The paper gives none for this ablation. ``eps`` is ANP's; ``alpha``, the rate and its decay, the
    100 epochs of 10 mask steps and the one-shot batch size are those of AWM (appendix A, Table 7).
    As in ANP, and unlike AWM, every mask step has a perturbation of its own, of one sign step.

    Args:
      steps: mask steps, >= 1, rounded up to whole passes over the images; half of them in, the
        rate falls to a tenth.
      batch_size: images a step, >= 1; all of them where there are fewer.
      lr: Adam's rate, > 0.
      eps: bound of the perturbation of a mask, > 0.
      alpha: weight of the loss without perturbation, in [0, 1]; beta is ``1 - alpha``.
      layers: ``'conv'``, ``'all'`` or a tuple of layer names, as `awm_jax.masks.init` takes it.
      crop: largest random shift of an image in pixels, >= 0.
      flip: True if horizontal flips keep the label (CIFAR-10, not traffic signs or digits).

    Raises:
      ValueError: a value outside its range.
    """

    steps: int = 1000
    batch_size: int = 16
    lr: float = 0.01
    eps: float = 0.4
    alpha: float = 0.9
    layers: str | tuple[str, ...] = "conv"
    crop: int = 0
    flip: bool = False

    def __post_init__(self):
        """Checks every range before any work starts."""
        if isinstance(self.layers, list):  # the record is a static argument of `jit`: hashable
            object.__setattr__(self, "layers", tuple(self.layers))
        validate.layers(layers=self.layers)
        validate.whole(1, steps=self.steps, batch_size=self.batch_size)
        validate.positive(lr=self.lr, eps=self.eps)
        validate.between(0.0, 1.0, alpha=self.alpha)
        validate.whole(0, crop=self.crop)
        validate.boolean(flip=self.flip)


def learn_masks(key: jax.Array, params: Params, images: jax.Array, labels: jax.Array,
                config: SWMConfig) -> tuple[Masks, jax.Array]:
    """``min_{m in [0, 1]^d} alpha L(m o w) + (1 - alpha) max_{|d_i| <= eps} L((m + d) o w)``.

    Args:
      key: PRNG key.
      params: the suspect network; its BatchNorm statistics are frozen.
      images: ``[n, H, W, C]`` float32 in [0, 1].
      labels: ``[n]`` int32.
      config: `SWMConfig`.

    Returns:
      ``(masks, losses [steps])``.

    Raises:
      ValueError: ``config.layers`` selects nothing.

    Example: see `awm_jax.defences.swm`.

    Reference: AWM paper, eq. 4.1.
    """
    def gradient(key, carried, images, labels):
        def loss(key, masks):
            del key  # nothing here is random
            return losses.cross_entropy(models.apply(params, images, masks=masks), labels)

        found, value = neurons.perturbed_gradient(
            key, loss, carried.weights, eps=config.eps, alpha=config.alpha, project=True)
        return found, carried.batch_stats, value

    schedule = optax.piecewise_constant_schedule(config.lr, {config.steps // 2: 0.1})
    tune = tuning.for_steps(config.steps, len(images), config)
    masks = masking.init(params.weights, config.layers,
                         classifier=models.classifier(params.arch))
    # The masks take the place of the weights: what descends is the same to the scan.
    found, values = tuning.descend(
        key, Params(masks, {}, params.arch), images, labels, tune, gradient=gradient,
        optimiser=optax.adam(schedule), settle=masking.clip)
    return found.weights, values


def _method(key: jax.Array, params: Params, images: jax.Array, labels: jax.Array,
            config: SWMConfig) -> tuple[Params, dict]:
    """`learn_masks`, with the masks multiplied in."""
    masks, values = learn_masks(key, params, images, labels, config)
    purified = dataclasses.replace(params, weights=masking.apply(params.weights, masks))
    return purified, {"loss": values, "masks": masks}


swm = Defence(
    # Kernels only: of the convolutions, unless config.layers says otherwise.
    name="swm", method=_method, default=SWMConfig(), remit=HIDDEN_KERNELS,
    paper="AWM paper, eq. 4.1 and Table 4 (ANP+SWM)", ablation=True,
)
