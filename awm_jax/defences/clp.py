"""Channel Lipschitz Pruning (CLP): without data, switches off channels that amplify the most."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from awm_jax import models, validate
from awm_jax.defences.base import NORMS, Defence, by_path, map_weights
from awm_jax.types import Params

# Flax keeps BatchNorm's epsilon in the module, not in the weights; every network here uses this.
_EPSILON = 1e-5


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


def spectral_norms(kernels: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """``sigma_max(W_c)``, where ``W_c`` is what makes channel c, as a matrix ``[I, kh * kw]``.

    All layers whose matrices have the same smaller side share one decomposition: some twenty of
    them in one program can wait for each other's threads forever (XLA:CPU of JAX 0.10, two cores).

    Args:
      kernels: ``{layer: [kh, kw, I, O]}``.

    Returns:
      ``{layer: [O]}``, >= 0.

    Example:
      >>> spectral_norms({'a': jnp.ones((3, 3, 1, 2)), 'b': jnp.ones((1, 1, 4, 1))})['a'].tolist()
      [3.0, 3.0]

    Reference: as `channel_lipschitz`.
    """
    # The largest eigenvalue of at most a [9, 9] matrix instead of an SVD of [I, 9]: accelerators
    # have fast batches of the former.
    grams = {}
    for layer, kernel in kernels.items():
        height, width, channels_in, channels_out = kernel.shape
        matrices = kernel.reshape(height * width, channels_in, channels_out)
        smaller = "pio,qio->opq" if height * width <= channels_in else "pio,pjo->oij"
        grams[layer] = jnp.einsum(smaller, matrices, matrices)
    squares: dict[str, jax.Array] = {}
    for size in sorted({gram.shape[1] for gram in grams.values()}):
        alike = {layer: gram for layer, gram in grams.items() if gram.shape[1] == size}
        stacked = jnp.concatenate(list(alike.values()))
        values = stacked[:, 0, 0] if size == 1 else jnp.linalg.eigvalsh(stacked)[:, -1]
        ends = np.cumsum([len(gram) for gram in alike.values()])
        squares |= dict(zip(alike, jnp.split(values, ends[:-1]), strict=True))
    return {layer: jnp.sqrt(jnp.maximum(squares[layer], 0.0)) for layer in kernels}


def channel_lipschitz(kernel: jax.Array, scale: jax.Array, variance: jax.Array) -> jax.Array:
    """``sigma_max(W_c) * |gamma_c| / sqrt(v_c + eps)``, how much each channel can amplify.

    ``W_c`` is the part of the kernel that makes channel c, as a matrix ``[I, kh * kw]``; gamma and
    v are the scale and the running variance of the BatchNorm that follows.

    Args:
      kernel: ``[kh, kw, I, O]``.
      scale: ``[O]``.
      variance: ``[O]``, >= 0.

    Returns:
      ``[O]``, >= 0.

    Example:
      >>> channel_lipschitz(jnp.ones((1, 1, 4, 2)), jnp.ones(2), jnp.ones(2)).round(2).tolist()
      [2.0, 2.0]

    Reference: Zheng et al., ECCV 2022, "Data-free Backdoor Removal based on Channel Lipschitzness",
    section 4 (UCLC); the reshaping is its code's.
    """
    return _normed(spectral_norms({"": kernel})[""], scale, variance)


def _normed(sigma: jax.Array, scale: jax.Array, variance: jax.Array) -> jax.Array:
    """How much BatchNorm leaves of a convolution's amplification."""
    return sigma * jnp.abs(scale) / jnp.sqrt(variance + _EPSILON)


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
    pairs, bounds, pruned = models.norm_inputs(params.arch), {}, {}
    if not pairs:
        raise ValueError(f"Expected a network with BatchNorm, whose channels CLP prunes; "
                         f"{params.arch.name} has none.")
    sigma = spectral_norms({norm: weights[f"{conv}/kernel"] for norm, conv in pairs.items()})
    for norm in pairs:
        bounds[norm] = _normed(sigma[norm], weights[f"{norm}/scale"], stats[f"{norm}/var"])
        pruned[norm] = outliers(bounds[norm], config.u)

    def prune(path, leaf):
        norm, _, part = path.rpartition("/")
        if norm in pruned and part in ("scale", "bias"):
            return jnp.where(pruned[norm], 0.0, leaf)
        return leaf

    purified = dataclasses.replace(params, weights=map_weights(prune, params.weights))
    return purified, {"lipschitz": bounds, "pruned": pruned}


clp = Defence(
    name="clp", method=_method, default=CLPConfig(), remit=NORMS, needs="nothing",
    paper="Zheng et al., ECCV 2022, section 4",
)
