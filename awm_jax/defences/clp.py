"""Channel Lipschitz Pruning (CLP): without data, switches off channels that amplify the most."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from awm_jax import models, validate
from awm_jax.defences.base import NORMS, Defence, by_path, map_weights, norms_needed
from awm_jax.types import Params

_EPSILON = 1e-5  # BatchNorm's, in our networks


@dataclasses.dataclass(frozen=True, kw_only=True)
class CLPConfig:
    """Settings of CLP.

    Args:
      u: a channel is pruned when its bound lies more than ``u`` standard deviations above its
        layer's mean, >= 0. The paper takes 3 for CIFAR-10 and 5 for Tiny ImageNet.

    Raises:
      ValueError: a value outside its range.
    """

    u: float = 3.0

    def __post_init__(self):
        """Checks every range before any work starts."""
        validate.at_least(0, u=self.u)


def channel_lipschitz(kernel: jax.Array, scale: jax.Array, variance: jax.Array, *,
                      epsilon: float | jax.Array = _EPSILON) -> jax.Array:
    """``sigma_max(W_c) * |gamma_c| / sqrt(v_c + eps)``, how much each channel can amplify.

    ``W_c`` is the part of the kernel that makes channel c, as a matrix ``[I, kh * kw]``; gamma and
    v are the scale and the running variance of the BatchNorm that follows.

    Args:
      kernel: ``[kh, kw, I, O]``.
      scale: ``[O]``.
      variance: ``[O]``, >= 0.
      epsilon: what the BatchNorm adds to it, >= 0.

    Returns:
      ``[O]``, >= 0.

    Example:
      >>> channel_lipschitz(jnp.ones((1, 1, 4, 2)), jnp.ones(2), jnp.ones(2)).round(2).tolist()
      [2.0, 2.0]

    Reference: Zheng et al., ECCV 2022, "Data-free Backdoor Removal based on Channel Lipschitzness",
    section 4 (UCLC); the reshaping is its code's.
    """
    return _bounds([(kernel, scale, variance, epsilon)])[0]


def _bounds(layers: list[tuple[jax.Array, jax.Array, jax.Array, float | jax.Array]]
            ) -> list[jax.Array]:
    """`channel_lipschitz` of several layers, whose eigenvalues come out of one call.

    Of two calls at once on two cores, each waits for ever: jaxlib's batched LAPACK blocks a worker
    of XLA's pool until other workers of that pool are done (seen with 0.10.2).
    """
    # The largest eigenvalue of a [9, 9] matrix instead of an SVD of [I, 9]: accelerators have
    # fast batches of the former.
    grams = []
    for kernel, _, _, _ in layers:
        height, width, channels_in, channels_out = kernel.shape
        matrices = kernel.reshape(height * width, channels_in, channels_out)
        grams.append(jnp.einsum("pio,qio->opq", matrices, matrices))
    size = max(gram.shape[-1] for gram in grams)
    # Zeros around a smaller matrix add eigenvalues of zero, and none of its own is less.
    padded = [jnp.pad(gram, ((0, 0), *((0, size - gram.shape[-1]),) * 2)) for gram in grams]
    largest = jnp.linalg.eigvalsh(jnp.concatenate(padded))[:, -1]
    ends = np.cumsum([len(gram) for gram in grams])[:-1]
    norms = (jnp.sqrt(jnp.maximum(own, 0.0)) for own in jnp.split(largest, ends))
    return [norm * jnp.abs(scale) / jnp.sqrt(variance + epsilon)
            for norm, (_, scale, variance, epsilon) in zip(norms, layers, strict=True)]


def outliers(values: jax.Array, u: float) -> jax.Array:
    """``x > mean(x) + u * std(x)``, with the unbiased deviation that its code uses.

    Example:
      >>> outliers(jnp.array([1., 1., 1., 5.]), 1.0).tolist()
      [False, False, False, True]
    """
    return values > values.mean() + u * jnp.std(values, ddof=min(1, len(values) - 1))


def _method(key: jax.Array, params: Params, images: jax.Array, labels: jax.Array,
            config: CLPConfig) -> tuple[Params, dict]:
    """Zero scale and bias for the channels whose Lipschitz bound stands out of their layer."""
    del key, images, labels
    weights, stats = by_path(params.weights), by_path(params.batch_stats)
    pairs = models.norm_inputs(params.arch)
    # A module's epsilon is told where it runs; of the run itself nothing is used.
    told = models.norm_moments(params, jnp.zeros((1, *params.arch.image_shape)))
    layers = {norm: (weights[f"{conv}/kernel"], weights[f"{norm}/scale"], stats[f"{norm}/var"],
                     told[norm].epsilon if norm in told else _EPSILON)
              for norm, conv in pairs.items()}
    bounds = dict(zip(layers, _bounds(list(layers.values())), strict=True))
    pruned = {norm: outliers(bound, config.u) for norm, bound in bounds.items()}

    def prune(path, leaf):
        norm, _, part = path.rpartition("/")
        if norm in pruned and part in ("scale", "bias"):
            return jnp.where(pruned[norm], 0.0, leaf)
        return leaf

    purified = dataclasses.replace(params, weights=map_weights(prune, params.weights))
    return purified, {"lipschitz": bounds, "pruned": pruned}


clp = Defence(
    name="clp", method=_method, default=CLPConfig(), remit=NORMS, needs="nothing",
    fits=norms_needed,
    paper="Zheng et al., ECCV 2022, section 4",
)
