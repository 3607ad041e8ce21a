"""SSBA's two networks: one hides bits in an image, the other reads them from it.

Both work on patches of 4x4 pixels, each laid out as one place of many channels: on a CPU that is
several times as fast as convolutions at full size, and bits are learnt in hundreds of steps.
"""

from typing import Any, cast

import jax
import jax.numpy as jnp
from flax import linen as nn

from awm_jax.models import ops

PATCH = 4  # pixels a side
MULTIPLE = 2 * PATCH  # the encoder halves the patches once
PLANES = 16  # channels that the secret is spread to, each place its own
LIMIT = 0.1  # largest change of a value
_FEATURES = 64


def _conv(x, features, name, stride=1, gain=2.0):
    """A 3x3 convolution."""
    return nn.Conv(features, (3, 3), (stride, stride), padding=1, name=name,
                   kernel_init=nn.initializers.variance_scaling(gain, "fan_in", "normal"),
                   conv_general_dilated=ops.flax_conv)(x)


def patches(images: jax.Array) -> jax.Array:
    """``[B, H, W, C]`` to ``[B, H / 4, W / 4, 16 C]``.

    Example:
      >>> patches(jnp.arange(16.0).reshape(1, 4, 4, 1))[0, 0, 0, 3:6].tolist()
      [3.0, 4.0, 5.0]
    """
    count, height, width, channels = images.shape
    x = images.reshape(count, height // PATCH, PATCH, width // PATCH, PATCH, channels)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(*x.shape[:2], x.shape[3], -1)


def pixels(places: jax.Array) -> jax.Array:
    """The inverse of `patches`.

    Example:
      >>> images = jnp.arange(96.0).reshape(1, 4, 8, 3)
      >>> bool((pixels(patches(images)) == images).all())
      True
    """
    count, rows, columns, depth = places.shape
    x = places.reshape(count, rows, columns, PATCH, PATCH, depth // PATCH**2)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(count, rows * PATCH, columns * PATCH, -1)


class Encoder(nn.Module):
    """A U-net of two levels of patches; the secret comes in beside the image."""

    @nn.compact
    def __call__(self, images, secrets):
        """Residuals [B, H, W, C] in [-.1, .1] of images [B, H, W, C] and bits [B, b] in {0, 1}."""
        x = patches(images) - 0.5
        spread = nn.Dense(x.shape[1] * x.shape[2] * PLANES, name="spread")(2 * secrets - 1)
        spread = spread.reshape(*x.shape[:3], PLANES)
        fine = ops.elu(_conv(jnp.concatenate([x, spread], axis=-1), _FEATURES, "down1"))
        coarse = ops.elu(_conv(fine, _FEATURES, "down2", stride=2))
        coarse = coarse.repeat(2, axis=1).repeat(2, axis=2)
        x = ops.elu(_conv(jnp.concatenate([coarse, fine, spread], axis=-1), _FEATURES, "up"))
        # A large start, which the decoder hears from the first step; the loss turns it down later.
        x = _conv(x, PATCH**2 * images.shape[3], "residual", gain=4.0)
        return LIMIT * jnp.tanh(pixels(x))


class Decoder(nn.Module):
    """Two convolutions of patches and one dense layer."""

    bits: int

    @nn.compact
    def __call__(self, images):
        """Logits [B, b] of the bits in images [B, H, W, C]."""
        x = ops.elu(_conv(patches(images) - 0.5, _FEATURES, "conv1"))
        x = ops.elu(_conv(x, _FEATURES, "conv2"))
        return nn.Dense(self.bits, name="dense")(x.reshape(len(x), -1))


def draw(key: jax.Array, image_shape: tuple[int, int, int], bits: int) -> dict[str, Any]:
    """Random weights of both networks: ``{'encoder': ..., 'decoder': ...}``."""
    key_encoder, key_decoder = jax.random.split(key)
    images = jnp.zeros((1, *image_shape))
    return {"encoder": Encoder().init(key_encoder, images, jnp.zeros((1, bits)))["params"],
            "decoder": Decoder(bits).init(key_decoder, images)["params"]}


def hide(encoder: Any, images: jax.Array, secrets: jax.Array) -> jax.Array:
    """What `Encoder` adds to images ``[B, H, W, C]`` for bits ``[B, b]``."""
    return cast(jax.Array, Encoder().apply({"params": encoder}, images, secrets))


def read(decoder: Any, images: jax.Array) -> jax.Array:
    """Logits ``[B, b]`` of what `Decoder` sees in images ``[B, H, W, C]``."""
    bits = decoder["dense"]["bias"].shape[0]
    return cast(jax.Array, Decoder(bits).apply({"params": decoder}, images))
