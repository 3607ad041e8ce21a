"""A small encoder-decoder: from an image to a picture of the same size."""

import jax
import jax.numpy as jnp
from flax import linen as nn

from awm_jax.models import ops

_GROUPS = 8  # channels are normalised in so many groups, image by image


def _block(x: jax.Array, features: int, name: str) -> jax.Array:
    """A 3x3 convolution, normalised, and a ReLU."""
    x = nn.Conv(features, (3, 3), padding=1, name=f"{name}_conv",
                conv_general_dilated=ops.flax_conv)(x)
    return nn.relu(nn.GroupNorm(num_groups=_GROUPS, name=f"{name}_norm")(x))


class Generator(nn.Module):
    """Halves the image ``depth`` times, doubling the channels, and back up again.

    Normalised by groups of channels, not by batch, so that what an image gets does not depend on
    the others.

    Args:
      features: channels at full size, a multiple of 8.
      outputs: channels put out.
      depth: how often the size is halved.
    """

    features: int
    outputs: int
    depth: int = 3

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """``[B, H, W, C]`` to ``[B, H, W, outputs]``, unbounded; H, W multiples of 2^depth."""
        for level in range(self.depth):
            x = ops.max_pool_2x2(_block(x, self.features * 2**level, f"down{level}"))
        x = _block(x, self.features * 2 ** (self.depth - 1), "middle")
        for level in reversed(range(self.depth)):
            x = jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)
            x = _block(x, self.features * 2 ** max(level - 1, 0), f"up{level}")
        return nn.Conv(self.outputs, (3, 3), padding=1, name="out",
                       conv_general_dilated=ops.flax_conv)(x)


def check_size(image_shape: tuple[int, int, int], depth: int, name: str) -> None:
    """ValueError unless height and width can be halved ``depth`` times."""
    height, width, _ = image_shape
    if height % 2**depth or width % 2**depth or min(height, width) < 2**depth:
        raise ValueError(f"Expected images whose height and width are multiples of {2**depth} for "
                         f"{name}, got {width}x{height}. Resize them.")
