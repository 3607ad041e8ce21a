"""FT-SAM: fine-tuning at the worst point near the weights, which shrinks the backdoor's neurons."""

import dataclasses

import jax
import jax.numpy as jnp
import optax

from awm_jax import losses, models, validate
from awm_jax.defences import tuning
from awm_jax.defences.base import EVERYTHING, Defence
from awm_jax.types import Params, Weights


@dataclasses.dataclass(frozen=True, kw_only=True)
class FTSAMConfig(tuning.TuneConfig):
    """Settings of `ft_sam`, beside those of `tuning.TuneConfig`.

    The defaults are the supplement's for CIFAR-10 (50 epochs for GTSRB). BackdoorBench's code
    differs in two: a weight decay of 5e-4, and a label smoothing of .1.

    Args:
      batch_size: images a step, >= 1; all of them where there are fewer.
      rho: length of the perturbation, > 0; None for 2, or .5 where ``adaptive`` is false. The
        paper takes 2 for PreAct-ResNet18 on CIFAR-10, 8 for the same on GTSRB and Tiny ImageNet, 6
        for VGG19-BN on all three, and .5 wherever the perturbation is not adaptive.
      adaptive: whether each weight moves in proportion to its square (eq. 4); false for the plain
        perturbation of SAM.
      label_smoothing: probability taken from the label and shared among all classes, in [0, 1].

    Raises:
      ValueError: a value outside its range.
    """

    batch_size: int = 256
    rho: float | None = None
    adaptive: bool = True
    label_smoothing: float = 0.0

    def __post_init__(self):
        """Checks every range before any work starts."""
        super().__post_init__()
        validate.boolean(adaptive=self.adaptive)
        validate.positive(rho=self.radius)
        validate.between(0.0, 1.0, label_smoothing=self.label_smoothing)

    @property
    def radius(self) -> float:
        """``rho``, or what stands for None."""
        if self.rho is None:
            return 2.0 if self.adaptive else 0.5
        return self.rho


def perturbation(weights: Weights, gradients: Weights, *, rho: float, adaptive: bool) -> Weights:
    """``eps = rho T^2 g / ||T g||_2`` with ``T = |w|``, or ``T = 1``, elementwise.

    To first order, the step that raises the loss most among those with ``||eps / T||_2 <= rho``;
    the norm runs over all the weights together.

    Args:
      weights: tree of arrays, the weights ``w``.
      gradients: tree of the same shapes, the loss's gradient ``g`` at them.
      rho: length of the perturbation, > 0, in units of ``T``.
      adaptive: ``T = |w|`` if true.

    Returns:
      A tree of the same shapes; zero where ``T g`` is zero everywhere.

    Example:
      >>> moved = perturbation(jnp.array([2., 1.]), jnp.array([1.5, 4.]), rho=1., adaptive=True)
      >>> [round(float(v), 6) for v in moved]
      [1.2, 0.8]

    Reference: FT-SAM (Zhu et al. 2023), supplement, eq. 4; ASAM (Kwon et al. 2021).
    """
    scales = jax.tree.map(jnp.abs if adaptive else jnp.ones_like, weights)
    ascent = jax.tree.map(jnp.multiply, scales, gradients)
    norm = optax.tree.norm(ascent)
    length = rho / jnp.where(norm > 0, norm, 1.0)
    return jax.tree.map(lambda scale, up: length * scale * up, scales, ascent)


def sharpness_aware(loss: tuning.Loss, *, rho: float, adaptive: bool) -> tuning.Gradient:
    """The gradient at ``w + eps``, for `tuning.descend`: ``grad L(w + eps(w))``.

    The BatchNorm statistics and the loss are those at ``w``; what the pass at ``w + eps`` makes of
    the statistics is discarded. Both passes see the same dropout.

    Args:
      loss: what is minimised.
      rho: as in `perturbation`.
      adaptive: as in `perturbation`.

    Returns:
      A `tuning.Gradient`.

    Example: see `awm_jax.defences.ft_sam`.

    Reference: FT-SAM, supplement, eq. 4 and 5.
    """
    plain = tuning.plain(loss)

    def gradient(key, params, images, labels):
        def look(offset, _):
            moved = jax.tree.map(jnp.add, params.weights, offset)
            found = plain(key, dataclasses.replace(params, weights=moved), images, labels)
            return perturbation(params.weights, found[0], rho=rho, adaptive=adaptive), found

        # A scan rather than two calls: the network is compiled once.
        nowhere = jax.tree.map(jnp.zeros_like, params.weights)
        _, (gradients, batch_stats, values) = jax.lax.scan(look, nowhere, length=2)
        here = jax.tree.map(lambda leaf: leaf[0], batch_stats)
        return jax.tree.map(lambda leaf: leaf[1], gradients), here, values[0]

    return gradient


def _method(key: jax.Array, params: Params, images: jax.Array, labels: jax.Array,
            config: FTSAMConfig) -> tuple[Params, dict]:
    """``min_w max_eps L(w + eps)`` by SGD on clean images, all weights, training mode."""

    def loss(key, params, images, labels):
        logits, batch_stats = models.apply_train(params, images, key=key)
        hot = jax.nn.one_hot(labels, params.arch.num_classes, dtype=logits.dtype)
        targets = optax.smooth_labels(hot, config.label_smoothing)
        return losses.soft_cross_entropy(logits, targets), batch_stats

    tuned, values = tuning.descend(
        key, params, images, labels, config,
        gradient=sharpness_aware(loss, rho=config.radius, adaptive=config.adaptive))
    return tuned, {"loss": values}


ft_sam = Defence(
    name="ft_sam", method=_method, default=FTSAMConfig(), remit=EVERYTHING,
    paper="FT-SAM (Zhu et al., ICCV 2023), supplement, eq. 1-5 and section B",
)
