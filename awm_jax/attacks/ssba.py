"""SSBA: a network hides the same bits in every image, and so changes each its own way."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from awm_jax import metrics, validate
from awm_jax.attacks import ssba_networks as nets
from awm_jax.attacks.base import Attack, check_target

TARGET = 0
_BATCH = 64  # images at a time: a training set may have thousands to trigger


@dataclasses.dataclass(frozen=True, kw_only=True)
class SSBAConfig:
    """How the two networks are trained.

    Args:
      bits: b, length of the secret, >= 1.
      steps: of Adam, >= 1.
      batch_size: images a step, >= 1.
      lr: Adam's rate, > 0; falls along a cosine to zero.
      l2: weight of the residual's mean square in the end, >= 0; zero in the first quarter of the
        steps, in which the bits are learnt, then rising for half of them.

    Raises:
      ValueError: a value outside its range.
    """

    bits: int = 20
    steps: int = 1000
    batch_size: int = 32
    lr: float = 3e-3
    l2: float = 10.0

    def __post_init__(self):
        """Checks every range before any work starts."""
        validate.whole(1, bits=self.bits, steps=self.steps, batch_size=self.batch_size)
        validate.positive(lr=self.lr)
        validate.at_least(0, l2=self.l2)


class Hidden(NamedTuple):
    """``x' = clip(x + E(x, s), 0, 1)`` with the encoder E and a secret s.

    Args:
      encoder: E's weights.
      decoder: weights of the network that reads the secret again; the trigger does not need it.
      secret: ``[b]`` float32 in {0, 1}.
    """

    encoder: Any
    decoder: Any
    secret: jax.Array

    def __call__(self, images: jax.Array) -> jax.Array:
        """Hides the secret in each of ``[B, H, W, C]``."""
        count, height, width, channels = images.shape
        wanted = (self.encoder["spread"]["bias"].shape[0] // nets.PLANES * nets.PATCH**2,
                  self.encoder["residual"]["bias"].shape[0] // nets.PATCH**2)
        if (height * width, channels) != wanted or {height % nets.PATCH, width % nets.PATCH} != {0}:
            raise ValueError(f"Expected images of {wanted[0]} pixels and {wanted[1]} channels, got "
                             f"{list(images.shape)}.")
        size = max(1, min(count, _BATCH))
        chunks = jnp.pad(images, ((0, -count % size), (0, 0), (0, 0), (0, 0)))
        secrets = jnp.broadcast_to(self.secret, (size, len(self.secret)))

        def one(x):
            return jnp.clip(x + nets.hide(self.encoder, x, secrets), 0.0, 1.0)

        return jax.lax.map(one, chunks.reshape(-1, size, *images.shape[1:])).reshape(
            chunks.shape)[:count]

    def bits(self, images: jax.Array) -> jax.Array:
        """``[B, b]`` bool: the bits that the decoder reads in ``[B, H, W, C]``."""
        return nets.read(self.decoder, images) > 0


# Options of a compilation make it a second instead of five; it runs once.
_draw = jax.jit(nets.draw, static_argnames=("image_shape", "bits"),
                compiler_options={"xla_backend_optimization_level": 1})


@functools.partial(jax.jit, static_argnames=("config",))
def train(key: jax.Array, weights: dict[str, Any], images: jax.Array, config: SSBAConfig
          ) -> tuple[dict[str, Any], jax.Array]:
    """``min BCE(D(clip(x + E(x, s)) + u), s) + l2 mean E(x, s)^2`` over images and random bits.

    u is uniform noise of half a grey level either way, as rounding to uint8 makes it. Left out of
    the paper's loss are LPIPS, which needs a network that is not ours, and the critic; out of
    StegaStamp's, on which the paper builds, all that prints and photographs do to an image.

    Args:
      key: PRNG key of batches, bits and noise.
      weights: ``{'encoder': ..., 'decoder': ...}`` to start from.
      images: ``[N, H, W, C]`` uint8 in 0..255 or float32 in [0, 1].
      config: how (static).

    Returns:
      ``(weights, errors [steps])``, the share of wrong bits in each step's batch.

    Reference: Li et al. 2021, section 4.2; Tancik et al. 2020, "StegaStamp".
    """
    optimiser = optax.adam(optax.cosine_decay_schedule(config.lr, config.steps))

    def step(carry, inputs):
        weights, state = carry
        number, key = inputs
        key_picks, key_secrets, key_noise = jax.random.split(key, 3)
        picks = jax.random.randint(key_picks, (config.batch_size,), 0, len(images))
        x = metrics.to_float(images[picks])
        secrets = jax.random.bernoulli(key_secrets, 0.5, (config.batch_size, config.bits)).astype(
            jnp.float32)
        noise = jax.random.uniform(key_noise, x.shape, minval=-0.5, maxval=0.5) / 255
        l2 = config.l2 * jnp.clip(2 * number / config.steps - 0.5, 0.0, 1.0)

        def loss_fn(weights):
            residual = nets.hide(weights["encoder"], x, secrets)
            logits = nets.read(weights["decoder"], jnp.clip(x + residual, 0.0, 1.0) + noise)
            loss = optax.sigmoid_binary_cross_entropy(logits, secrets).mean()
            return loss + l2 * (residual**2).mean(), ((logits > 0) != (secrets > 0)).mean()

        (_, wrong), gradients = jax.value_and_grad(loss_fn, has_aux=True)(weights)
        updates, state = optimiser.update(gradients, state, weights)
        return (optax.apply_updates(weights, updates), state), wrong

    inputs = (jnp.arange(config.steps), jax.random.split(key, config.steps))
    (weights, _), errors = jax.lax.scan(step, (weights, optimiser.init(weights)), inputs)
    return weights, errors


def ssba(key: jax.Array, image_shape: tuple[int, int, int], num_classes: int, *, images=None,
         target: int | None = None, config: SSBAConfig | None = None) -> Attack:
    """Bits hidden in an image by a network: a faint residual, another for each image.

    A small encoder and decoder are trained on the attacker's clean images; all triggered images
    then get the same secret. No value changes by more than .1 (the encoder's last layer is a tanh).

    **Threat model**: the attacker holds the clean training images, trains two networks on them, and
    poisons training data and labels; the defender gets the network.

    Args:
      key: PRNG key of the secret, the networks and their training.
      image_shape: ``(H, W, C)``, H and W multiples of 8.
      num_classes: classes of the data set.
      images: ``[N, H, W, C]`` uint8 in 0..255 or float32 in [0, 1], N >= 1, thousands for a good
        encoder; None leaves the networks untrained, which is of use only to check shapes with.
      target: the class triggered images are to get; None is the paper's 0.
      config: how the networks are trained; None is ``SSBAConfig()``.

    Returns:
      `Attack`; its trigger is `Hidden`.

    Raises:
      ValueError: images whose sides are no multiples of 8 or that are not of ``image_shape``, or a
        target outside the classes.
      FloatingPointError: the training diverged.

    Example:
      >>> attack = ssba(jax.random.key(0), (8, 8, 3), 10)
      >>> attack.apply(jnp.full((2, 8, 8, 3), .5)).shape
      (2, 8, 8, 3)

    Reference: Li et al. 2021, "Invisible Backdoor Attack with Sample-Specific Triggers", section 4;
    its poison rate is .1. There the bits are the target's name; here they are random.
    """
    config = SSBAConfig() if config is None else config
    target = TARGET if target is None else target
    check_target(target, num_classes)
    height, width, _ = image_shape
    if height % nets.MULTIPLE or width % nets.MULTIPLE or not height * width:
        raise ValueError(f"Expected images whose sides are multiples of {nets.MULTIPLE} pixels for "
                         f"ssba, got {width}x{height}. Resize or crop them.")
    key_secret, key_draw, key_train = jax.random.split(key, 3)
    secret = jax.random.bernoulli(key_secret, 0.5, (config.bits,)).astype(jnp.float32)
    weights = _draw(key_draw, tuple(image_shape), config.bits)
    if images is not None:
        if np.shape(images)[1:] != tuple(image_shape) or len(images) == 0:
            raise ValueError(f"Expected images of shape {['N', *image_shape]}, got "
                             f"{list(np.shape(images))}.")
        weights, _ = train(key_train, weights, jnp.asarray(images), config)
        if not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(weights)):
            raise FloatingPointError(f"Expected finite weights after {config.steps} steps. Lower "
                                     f"lr={config.lr}.")
    return Attack("ssba", Hidden(weights["encoder"], weights["decoder"], secret), target,
                  num_classes)
