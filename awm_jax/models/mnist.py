"""The two networks for MNIST of ANP's supplement, section C.2. Neither has BatchNorm."""

from flax import linen as nn

from awm_jax.models import layers, ops


def _avg_pool_2x2(x):
    """Halves height and width; an odd last row or column is left out."""
    b, h, w, c = x.shape
    x = x[:, : h // 2 * 2, : w // 2 * 2]
    return x.reshape(b, h // 2, 2, w // 2, 2, c).mean(axis=(2, 4))


class MLP(nn.Module):
    """Five fully connected layers with ReLU: four of 500 neurons, and the classes.

    The supplement says 5 layers and 2000 neurons (Table 5), in which classes do not count, as those
    of Table 6 show; that the four are of equal width is this project's reading.
    """

    num_classes: int

    @staticmethod
    def norm_inputs():
        """There is no BatchNorm."""
        return {}

    @nn.compact
    def __call__(self, x, train: bool):
        """Logits [B, num_classes] of images [B, H, W, C]; each block sown is [B, 1, 1, 500]."""
        del train
        x = x.reshape(x.shape[0], -1)
        for index in range(1, 5):
            x = nn.relu(nn.Dense(500, name=f"fc{index}")(x))
            self.sow("intermediates", f"block{index}", x[:, None, None])
        return nn.Dense(self.num_classes, name="dense")(x)


class CNN(nn.Module):
    """Two 5x5 convolutions, each with ReLU and average pooling, 512 neurons, and the classes.

    Table 6 gives 48 convolution channels and 512 neurons in 2 + 1 + 1 layers. The network of Gu et
    al. 2017 ("BadNets", Table 1) has just these, so the other sizes are taken from there.
    """

    num_classes: int

    @staticmethod
    def norm_inputs():
        """There is no BatchNorm."""
        return {}

    @nn.compact
    def __call__(self, x, train: bool):
        """Logits [B, num_classes] of images [B, H, W, C], H and W at least 16."""
        del train
        for index, features in ((1, 16), (2, 32)):
            x = nn.relu(nn.Conv(features, (5, 5), padding=0, name=f"conv{index}",
                                conv_general_dilated=ops.flax_conv)(x))
            x = _avg_pool_2x2(layers.block(self, f"block{index}", x))
        x = nn.relu(nn.Dense(512, name="fc1")(x.reshape(x.shape[0], -1)))
        self.sow("intermediates", "block3", x[:, None, None])
        return nn.Dense(self.num_classes, name="dense")(x)
