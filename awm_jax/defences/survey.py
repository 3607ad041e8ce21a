"""What it takes to send every image into one class: a sparse trigger for each class in turn."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from awm_jax import losses, models, projections
from awm_jax.types import Params


class Survey(NamedTuple):
    """One trigger a class, and what it does.

    Args:
      triggers: ``[c, H, W, C]`` the trigger towards each class, added to images in [0, 1].
      damage: ``[c]`` mean cross-entropy, under that trigger, of what the network says without it:
        how far past the decision the trigger drives, in nats. A backdoor drives several times
        farther than any other class can be driven with so few changed pixels.
    """

    triggers: jax.Array
    damage: jax.Array


def log_odds(logits: jax.Array, target: jax.Array) -> jax.Array:
    """Mean of ``log p_t / (1 - p_t)`` over images.

    Cross-entropy towards a class stops rising once the class is reached; these odds do not, so
    the search goes on to where the network's answer is strongest, and that is the backdoor.

    Args:
      logits: ``[B, c]``.
      target: the class, a scalar integer.

    Returns:
      A scalar, any sign.

    Example:
      >>> float(log_odds(jnp.zeros((1, 2)), jnp.array(0)))
      0.0
    """
    others = jnp.where(jnp.arange(logits.shape[1]) == target, -jnp.inf, logits)
    return (logits[:, target] - jax.nn.logsumexp(others, axis=1)).mean()


def survey(key: jax.Array, params: Params, draw: Callable[[jax.Array], jax.Array], *, steps: int,
           tau: float) -> Survey:
    """``max_{||d||_1 <= tau} mean log p_t(x + d) / (1 - p_t(x + d))`` for every class t.

    Normalised gradient steps of length 1, each followed by the nearest point of the L1 ball, on
    fresh minibatches; class by class, so memory does not grow with their number.

    Args:
      key: PRNG key.
      params: the suspect network.
      draw: a key to a minibatch ``[B, H, W, C]`` in [0, 1].
      steps: steps a class, >= 1.
      tau: L1 bound, > 0.

    Returns:
      `Survey`.

    Example: `survey(key, params, lambda key: images, steps=10, tau=50.0)`.

    Reference: the search of Neural Cleanse (Wang et al. 2019) with another objective and norm.
    """

    def one(target):
        def ascend(delta, key):
            images = draw(key)
            gradient = jax.grad(lambda d: log_odds(
                models.apply(params, jnp.clip(images + d[None], 0, 1)), target))(delta)
            return jnp.clip(projections.l1_ball(
                delta + projections.unit(gradient), tau), -1.0, 1.0), None

        keys = jax.random.split(jax.random.fold_in(key, target), steps + 1)
        images = draw(keys[0])
        delta, _ = jax.lax.scan(ascend, jnp.zeros(images.shape[1:]), keys[1:])
        both = jnp.concatenate([images, jnp.clip(images + delta[None], 0, 1)])
        without, triggered = jnp.split(models.apply(params, both), 2)
        return Survey(delta, losses.cross_entropy(triggered, without.argmax(axis=1)))

    return jax.lax.map(one, jnp.arange(params.arch.num_classes))
