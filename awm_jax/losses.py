"""Losses over logits."""

import jax
import jax.numpy as jnp


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Mean of ``-log softmax(z)[y]``.

    Args:
      logits: ``[B, c]``.
      labels: ``[B]`` integers in 0..c-1.

    Returns:
      A scalar >= 0.

    Example:
      >>> bool(jnp.isclose(cross_entropy(jnp.zeros((2, 4)), jnp.array([0, 3])), jnp.log(4)))
      True
    """
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], axis=1).mean()


def soft_cross_entropy(logits: jax.Array, probabilities: jax.Array) -> jax.Array:
    """Mean of ``-sum_k p_k log softmax(z)_k``: KL(p || softmax(z)) plus p's own entropy.

    Args:
      logits: ``[B, c]``.
      probabilities: ``[B, c]``, rows sum to 1.

    Returns:
      A scalar >= 0.

    Example:
      >>> p = jnp.array([[1., 0.]])
      >>> bool(soft_cross_entropy(jnp.zeros((1, 2)), p) == cross_entropy(jnp.zeros((1, 2)),
      ...                                                               jnp.array([0])))
      True

    Reference: Hinton et al. 2015, "Distilling the Knowledge in a Neural Network", section 2 (T=1).
    """
    return -(probabilities * jax.nn.log_softmax(logits)).sum(axis=1).mean()
