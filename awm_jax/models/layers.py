"""Layers that several networks share, with PyTorch's constants. All are without a bias."""

from flax import linen as nn

from awm_jax.models import ops


def conv(features, size, stride, name, groups=1):
    """A convolution with as many zeros around as keep the size at stride 1."""
    return nn.Conv(features, (size, size), strides=stride, padding=size // 2, use_bias=False,
                   feature_group_count=groups, name=name, conv_general_dilated=ops.flax_conv)


def depthwise(features, stride, name):
    """A 3x3 convolution of each channel by itself."""
    return conv(features, 3, stride, name, groups=features)


def norm(train, name):
    """BatchNorm, with its own scale and shift."""
    return nn.BatchNorm(use_running_average=not train, momentum=0.9, epsilon=1e-5, name=name)


def block(network, name, x):
    """What a block puts out: sown under its name, and moved where an offset of that name is given.

    The offset, Flax's perturbation, is for the gradient with respect to what the block puts out.
    """
    x = network.perturb(name, x)
    network.sow("intermediates", name, x)
    return x
