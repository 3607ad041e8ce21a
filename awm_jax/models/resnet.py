"""ResNet-18 and its pre-activation form for CIFAR: a 3x3 stem, no stem pooling."""

from flax import linen as nn

from awm_jax.models import layers
from awm_jax.models.layers import conv, norm


def _stages(network, block, x, train):
    """Four stages of two blocks, each stage but the first at half the size; each stage is sown."""
    for stage, features in enumerate((64, 128, 256, 512), start=1):
        for i in range(2):
            stride = 2 if stage > 1 and i == 0 else 1
            x = block(features, stride, name=f"layer{stage}_{i}")(x, train)
        x = layers.block(network, f"block{stage}", x)
    return x


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut."""

    features: int
    stride: int

    @nn.compact
    def __call__(self, x, train: bool):
        """Images [B, H, W, C] to [B, H/stride, W/stride, features]."""
        y = conv(self.features, 3, self.stride, "conv1")(x)
        y = nn.relu(norm(train, "bn1")(y))
        y = norm(train, "bn2")(conv(self.features, 3, 1, "conv2")(y))
        if x.shape != y.shape:
            x = conv(self.features, 1, self.stride, "shortcut_conv")(x)
            x = norm(train, "shortcut_bn")(x)
        return nn.relu(x + y)


class ResNet18(nn.Module):
    """Eight basic blocks of 64, 128, 256 and 512 features, average pool, one dense layer."""

    num_classes: int

    @staticmethod
    def norm_inputs():
        """BatchNorm layers and the convolution that feeds each."""
        pairs = {"bn1": "conv1"}
        for stage in range(1, 5):
            for block in range(2):
                name = f"layer{stage}_{block}"
                pairs |= {f"{name}/bn{i}": f"{name}/conv{i}" for i in (1, 2)}
                if stage > 1 and block == 0:
                    pairs[f"{name}/shortcut_bn"] = f"{name}/shortcut_conv"
        return pairs

    @nn.compact
    def __call__(self, x, train: bool):
        """Logits [B, num_classes] of images [B, H, W, C]."""
        x = nn.relu(norm(train, "bn1")(conv(64, 3, 1, "conv1")(x)))
        x = _stages(self, BasicBlock, x, train)
        return nn.Dense(self.num_classes, name="dense")(x.mean(axis=(1, 2)))


class PreActBlock(nn.Module):
    """BatchNorm and ReLU before each of two 3x3 convolutions, and a shortcut."""

    features: int
    stride: int

    @nn.compact
    def __call__(self, x, train: bool):
        """Images [B, H, W, C] to [B, H/stride, W/stride, features]."""
        y = nn.relu(norm(train, "bn1")(x))
        if self.stride != 1 or x.shape[-1] != self.features:
            x = conv(self.features, 1, self.stride, "shortcut_conv")(y)
        y = conv(self.features, 3, self.stride, "conv1")(y)
        return x + conv(self.features, 3, 1, "conv2")(nn.relu(norm(train, "bn2")(y)))


class PreActResNet18(nn.Module):
    """Eight pre-activation blocks of 64, 128, 256 and 512 features, average pool, one dense layer.

    He et al. 2016, "Identity Mappings in Deep Residual Networks", without a last BatchNorm, as the
    repositories of backdoor research have it.
    """

    num_classes: int

    @staticmethod
    def norm_inputs():
        """BatchNorm layers that one convolution feeds: others get the sum of a block."""
        blocks = [f"layer{stage}_{block}" for stage in range(1, 5) for block in range(2)]
        return {"layer1_0/bn1": "conv1", **{f"{name}/bn2": f"{name}/conv1" for name in blocks}}

    @nn.compact
    def __call__(self, x, train: bool):
        """Logits [B, num_classes] of images [B, H, W, C]."""
        x = _stages(self, PreActBlock, conv(64, 3, 1, "conv1")(x), train)
        return nn.Dense(self.num_classes, name="dense")(x.mean(axis=(1, 2)))
