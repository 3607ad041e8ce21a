"""ShuffleNet V2 for CIFAR: a 3x3 stem of stride 1, no stem pooling."""

import jax.numpy as jnp
from flax import linen as nn

from awm_jax.models import layers
from awm_jax.models.layers import conv, depthwise, norm


def _shuffled(left, right):
    """Concatenation and channel shuffle in two groups: the channels of both in turn."""
    return jnp.stack([left, right], axis=-1).reshape(*left.shape[:-1], -1)


class SplitUnit(nn.Module):
    """Half of the channels pass by, half go through a 1x1, a depthwise and a 1x1 convolution."""

    @nn.compact
    def __call__(self, x, train: bool):
        """Images [B, H, W, C] to the same shape."""
        half = x.shape[-1] // 2
        y = nn.relu(norm(train, "bn1")(conv(half, 1, 1, "conv1")(x[..., half:])))
        y = norm(train, "bn2")(depthwise(half, 1, "conv2")(y))
        y = nn.relu(norm(train, "bn3")(conv(half, 1, 1, "conv3")(y)))
        return _shuffled(x[..., :half], y)


class DownUnit(nn.Module):
    """Two branches at half the size, each giving half of the channels."""

    features: int

    @nn.compact
    def __call__(self, x, train: bool):
        """Images [B, H, W, C] to [B, H/2, W/2, features]."""
        half = self.features // 2
        left = norm(train, "bn1")(depthwise(x.shape[-1], 2, "conv1")(x))
        left = nn.relu(norm(train, "bn2")(conv(half, 1, 1, "conv2")(left)))
        right = nn.relu(norm(train, "bn3")(conv(half, 1, 1, "conv3")(x)))
        right = norm(train, "bn4")(depthwise(half, 2, "conv4")(right))
        right = nn.relu(norm(train, "bn5")(conv(half, 1, 1, "conv5")(right)))
        return _shuffled(left, right)


class ShuffleNetV2(nn.Module):
    """Stages of 48, 96 and 192 features (0.5x), 1024 at the end, average pool, one dense layer.

    Ma et al. 2018, "ShuffleNet V2", Table 5, in the CIFAR form that AWM's experiments use.
    """

    num_classes: int
    stages = ((48, 4), (96, 8), (192, 4))  # features and units

    @staticmethod
    def norm_inputs():
        """BatchNorm layers and the convolution that feeds each."""
        pairs = {"bn1": "conv1"}
        for stage, (_, units) in enumerate(ShuffleNetV2.stages, start=1):
            for unit in range(units):
                name = f"layer{stage}_{unit}"
                count = 3 if unit else 5
                pairs |= {f"{name}/bn{i}": f"{name}/conv{i}" for i in range(1, count + 1)}
        return pairs | {"bn2": "conv2"}

    @nn.compact
    def __call__(self, x, train: bool):
        """Logits [B, num_classes] of images [B, H, W, C]."""
        x = nn.relu(norm(train, "bn1")(conv(24, 3, 1, "conv1")(x)))
        for stage, (features, units) in enumerate(self.stages, start=1):
            x = layers.block(self, f"block{stage}", x)
            x = DownUnit(features, name=f"layer{stage}_0")(x, train)
            for unit in range(1, units):
                x = SplitUnit(name=f"layer{stage}_{unit}")(x, train)
        x = nn.relu(norm(train, "bn2")(conv(1024, 1, 1, "conv2")(x)))
        x = layers.block(self, "block4", x)
        return nn.Dense(self.num_classes, name="dense")(x.mean(axis=(1, 2)))
