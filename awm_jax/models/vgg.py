"""The small VGG of the AWM paper's appendix A (Table 6), and VGG-19 for CIFAR."""

from flax import linen as nn

from awm_jax.models import layers, ops


def _conv_norm(x, features, index, train):
    """A 3x3 convolution and its BatchNorm, with PyTorch's constants."""
    x = nn.Conv(features, (3, 3), padding=1, name=f"conv{index}",
                conv_general_dilated=ops.flax_conv)(x)
    return nn.BatchNorm(use_running_average=not train, momentum=0.9, epsilon=1e-5,
                        name=f"bn{index}")(x)


class SmallVGG(nn.Module):
    """Six 3x3 convolutions, each with BatchNorm and ELU, in three blocks, and one dense layer."""

    num_classes: int

    @staticmethod
    def norm_inputs():
        """BatchNorm layers and the convolution that feeds each."""
        return {f"bn{i}": f"conv{i}" for i in range(1, 7)}

    @nn.compact
    def __call__(self, x, train: bool):
        """Logits [B, num_classes] of images [B, H, W, C]."""
        index = 0
        for block, (features, dropout) in enumerate(((32, 0.3), (64, 0.4), (128, 0.4)), start=1):
            for _ in range(2):
                index += 1
                x = ops.elu(_conv_norm(x, features, index, train))
            x = ops.max_pool_2x2(layers.block(self, f"block{block}", x))
            x = nn.Dropout(dropout, deterministic=not train)(x)
        return nn.Dense(self.num_classes, name="dense")(x.reshape(x.shape[0], -1))


class VGG19BN(nn.Module):
    """Sixteen 3x3 convolutions, each with BatchNorm and ReLU, in five blocks, and one dense layer.

    Simonyan & Zisserman 2015, configuration E, in its CIFAR form: no hidden dense layers.
    """

    num_classes: int

    @staticmethod
    def norm_inputs():
        """BatchNorm layers and the convolution that feeds each."""
        return {f"bn{i}": f"conv{i}" for i in range(1, 17)}

    @nn.compact
    def __call__(self, x, train: bool):
        """Logits [B, num_classes] of images [B, H, W, C], H and W at least 32."""
        index = 0
        blocks = ((64, 2), (128, 2), (256, 4), (512, 4), (512, 4))
        for block, (features, count) in enumerate(blocks, start=1):
            for _ in range(count):
                index += 1
                x = nn.relu(_conv_norm(x, features, index, train))
            x = ops.max_pool_2x2(layers.block(self, f"block{block}", x))
        return nn.Dense(self.num_classes, name="dense")(x.mean(axis=(1, 2)))
