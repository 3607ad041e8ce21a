"""MobileNet V2 for CIFAR: stem and 24-channel stage at full size, ReLU."""

from flax import linen as nn

from awm_jax.models import layers
from awm_jax.models.layers import conv, depthwise, norm


class InvertedResidual(nn.Module):
    """1x1 to more channels, depthwise, 1x1 to few without ReLU; a shortcut at stride 1."""

    features: int
    expansion: int
    stride: int

    @nn.compact
    def __call__(self, x, train: bool):
        """Images [B, H, W, C] to [B, H/stride, W/stride, features]."""
        wide = self.expansion * x.shape[-1]
        y = nn.relu(norm(train, "bn1")(conv(wide, 1, 1, "conv1")(x)))
        y = nn.relu(norm(train, "bn2")(depthwise(wide, self.stride, "conv2")(y)))
        y = norm(train, "bn3")(conv(self.features, 1, 1, "conv3")(y))
        if self.stride != 1:
            return y
        if x.shape[-1] != self.features:
            x = norm(train, "shortcut_bn")(conv(self.features, 1, 1, "shortcut_conv")(x))
        return x + y


class MobileNetV2(nn.Module):
    """Seventeen inverted residual blocks, 1280 features, average pool, one dense layer.

    Sandler et al. 2018, "MobileNetV2", Table 2, in the form of the CIFAR repositories, which have
    ReLU for ReLU6 and a shortcut convolution where a block of stride 1 changes the channels. Sown
    are the last block of each size, which has no activation, and the 1280 features.
    """

    num_classes: int
    # Expansion, features, blocks and the first one's stride. The paper's 24 features have stride 2.
    stages = ((1, 16, 1, 1), (6, 24, 2, 1), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1),
              (6, 160, 3, 2), (6, 320, 1, 1))

    @classmethod
    def blocks(cls):
        """Each block's expansion, features, stride and whether its shortcut is a convolution."""
        found, before = [], 32
        for expansion, features, count, stride in cls.stages:
            for i in range(count):
                step = 1 if i else stride
                found.append((expansion, features, step, step == 1 and before != features))
                before = features
        return found

    @staticmethod
    def norm_inputs():
        """BatchNorm layers and the convolution that feeds each."""
        pairs = {"bn1": "conv1"}
        for block, (*_, shortcut) in enumerate(MobileNetV2.blocks()):
            name = f"layers_{block}"
            pairs |= {f"{name}/bn{i}": f"{name}/conv{i}" for i in (1, 2, 3)}
            if shortcut:
                pairs[f"{name}/shortcut_bn"] = f"{name}/shortcut_conv"
        return pairs | {"bn2": "conv2"}

    @nn.compact
    def __call__(self, x, train: bool):
        """Logits [B, num_classes] of images [B, H, W, C]."""
        x, sown = nn.relu(norm(train, "bn1")(conv(32, 3, 1, "conv1")(x))), 0
        for block, (expansion, features, stride, _) in enumerate(self.blocks()):
            if stride != 1:
                sown += 1
                x = layers.block(self, f"block{sown}", x)
            x = InvertedResidual(features, expansion, stride, name=f"layers_{block}")(x, train)
        x = nn.relu(norm(train, "bn2")(conv(1280, 1, 1, "conv2")(x)))
        x = layers.block(self, f"block{sown + 1}", x)
        return nn.Dense(self.num_classes, name="dense")(x.mean(axis=(1, 2)))
