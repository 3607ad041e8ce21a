"""The small networks of the papers: as PyTorch has them, logit for logit, and as published."""

import jax
import numpy as np
import pytest

from awm_jax import models
from awm_jax.types import Arch

torch = pytest.importorskip("torch")
from awm_jax import torch_compat  # noqa: E402

RELU = torch.nn.functional.relu


def _conv(before, after, size, stride=1, groups=1):
    return torch.nn.Conv2d(before, after, size, stride, size // 2, groups=groups, bias=False)


def _number(net, *convolutions):
    """Sets conv1, bn1, conv2, bn2 and so on."""
    for i, layer in enumerate(convolutions, start=1):
        setattr(net, f"conv{i}", layer)
        setattr(net, f"bn{i}", torch.nn.BatchNorm2d(layer.out_channels))


def _normed(net, i, x):
    return getattr(net, f"bn{i}")(getattr(net, f"conv{i}")(x))


class Unit(torch.nn.Module):
    """A unit of ShuffleNet V2: at stride 1 on half of the channels, else with two branches."""

    def __init__(self, before, after, stride):
        super().__init__()
        half, self.stride = after // 2, stride
        if stride == 1:
            _number(self, _conv(half, half, 1), _conv(half, half, 3, 1, half),
                    _conv(half, half, 1))
        else:
            _number(self, _conv(before, before, 3, 2, before), _conv(before, half, 1),
                    _conv(before, half, 1), _conv(half, half, 3, 2, half), _conv(half, half, 1))

    def forward(self, x):
        if self.stride == 1:
            left, right = x.chunk(2, dim=1)
            right = _normed(self, 2, RELU(_normed(self, 1, right)))
            right = RELU(_normed(self, 3, right))
        else:
            left = RELU(_normed(self, 2, _normed(self, 1, x)))
            right = RELU(_normed(self, 5, _normed(self, 4, RELU(_normed(self, 3, x)))))
        both = torch.stack([left, right], dim=1)
        return both.transpose(1, 2).flatten(1, 2)


class ShuffleNet(torch.nn.Module):
    """ShuffleNet V2 0.5x for 32x32 images."""

    def __init__(self, classes):
        super().__init__()
        _number(self, _conv(3, 24, 3), _conv(192, 1024, 1))
        before = 24
        for stage, (features, units) in enumerate([(48, 4), (96, 8), (192, 4)], start=1):
            first = Unit(before, features, 2)
            rest = [Unit(features, features, 1) for _ in range(units - 1)]
            setattr(self, f"layer{stage}", torch.nn.Sequential(first, *rest))
            before = features
        self.linear = torch.nn.Linear(1024, classes)

    def forward(self, x):
        x = self.layer3(self.layer2(self.layer1(RELU(_normed(self, 1, x)))))
        return self.linear(RELU(_normed(self, 2, x)).mean((2, 3)))


class Inverted(torch.nn.Module):
    """A block of MobileNet V2."""

    def __init__(self, before, after, expansion, stride):
        super().__init__()
        wide, self.stride = expansion * before, stride
        _number(self, _conv(before, wide, 1), _conv(wide, wide, 3, stride, wide),
                _conv(wide, after, 1))
        self.shortcut = torch.nn.Sequential()
        if stride == 1 and before != after:
            self.shortcut = torch.nn.Sequential(_conv(before, after, 1),
                                                torch.nn.BatchNorm2d(after))

    def forward(self, x):
        y = _normed(self, 3, RELU(_normed(self, 2, RELU(_normed(self, 1, x)))))
        return y + self.shortcut(x) if self.stride == 1 else y


class MobileNet(torch.nn.Module):
    """MobileNet V2 for 32x32 images."""

    def __init__(self, classes):
        super().__init__()
        _number(self, _conv(3, 32, 3), _conv(320, 1280, 1))
        layers, before = [], 32
        for expansion, after, strides in [
                (1, 16, [1]), (6, 24, [1, 1]), (6, 32, [2, 1, 1]), (6, 64, [2, 1, 1, 1]),
                (6, 96, [1, 1, 1]), (6, 160, [2, 1, 1]), (6, 320, [1])]:
            for stride in strides:
                layers.append(Inverted(before, after, expansion, stride))
                before = after
        self.layers = torch.nn.Sequential(*layers)
        self.linear = torch.nn.Linear(1280, classes)

    def forward(self, x):
        x = self.layers(RELU(_normed(self, 1, x)))
        return self.linear(RELU(_normed(self, 2, x)).mean((2, 3)))


class Dense(torch.nn.Module):
    """Five dense layers."""

    def __init__(self, classes, inputs):
        super().__init__()
        widths = [inputs, 500, 500, 500, 500, classes]
        for i in range(1, 6):
            setattr(self, f"fc{i}", torch.nn.Linear(widths[i - 1], widths[i]))

    def forward(self, x):
        x = x.flatten(1)
        for i in range(1, 5):
            x = RELU(getattr(self, f"fc{i}")(x))
        return self.fc5(x)


class Digits(torch.nn.Module):
    """The convolutional network for MNIST of the BadNets paper."""

    def __init__(self, classes, channels, inputs):
        super().__init__()
        self.conv1, self.conv2 = torch.nn.Conv2d(channels, 16, 5), torch.nn.Conv2d(16, 32, 5)
        self.fc1, self.fc2 = torch.nn.Linear(inputs, 512), torch.nn.Linear(512, classes)

    def forward(self, x):
        for layer in (self.conv1, self.conv2):
            x = torch.nn.functional.avg_pool2d(RELU(layer(x)), 2)
        return self.fc2(RELU(self.fc1(x.flatten(1))))


# Sizes that halve unevenly or are not square, so that height and width must not be mixed up.
NETWORKS = [
    ("shufflenet_v2", lambda: ShuffleNet(5), (13, 8, 3)),
    ("mobilenet_v2", lambda: MobileNet(5), (13, 8, 3)),
    ("mlp", lambda: Dense(5, 2 * 8 * 9), (8, 9, 2)),
    ("cnn", lambda: Digits(5, 2, 32 * 1 * 4), (17, 28, 2)),
]


def _random(net, images):
    """BatchNorm whose numbers matter, with the statistics of these images, so that they do too."""
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.normal_(module.bias, 0.0, 0.3)
            module.momentum = 1.0
    with torch.no_grad():
        net.train()(images)
    return net.eval()


@pytest.mark.parametrize("name, build, shape", NETWORKS)
def test_there_and_back(name, build, shape):
    torch.manual_seed(0)
    images = np.random.default_rng(0).random((4, *shape), np.float32)
    seen = torch.tensor(images.transpose(0, 3, 1, 2))
    net = _random(build(), seen)
    params = torch_compat.params_from_state_dict(net.state_dict(), image_shape=shape)
    assert params.arch == Arch(name=name, num_classes=5, image_shape=shape)
    with torch.no_grad():
        theirs = net(seen).numpy()
    ours = np.asarray(jax.jit(models.apply)(params, images))
    assert np.ptp(theirs, axis=0).min() > 1e-3  # images matter
    np.testing.assert_allclose(ours, theirs, atol=1e-4, rtol=1e-4)
    back = torch_compat.state_dict_from_params(params)
    assert set(back) == set(net.state_dict())
    assert all(torch.equal(back[k], v) for k, v in net.state_dict().items()
               if v.ndim)  # batch counters apart
    again = torch_compat.params_from_state_dict(back, image_shape=shape)
    jax.tree.map(np.testing.assert_array_equal, again, params)


# The first two are what `sum(p.numel() ...)` of the CIFAR repositories' networks is reported as
# (kuangliu's collection for MobileNet V2; for ShuffleNet V2 0.5x chenyaofo's too); the two for
# MNIST are counted by hand from ANP's tables 5 and 6.
@pytest.mark.parametrize("name, net, shape, count", [
    ("shufflenet_v2", lambda: ShuffleNet(10), (32, 32, 3), 352_042),
    ("mobilenet_v2", lambda: MobileNet(10), (32, 32, 3), 2_296_922),
    ("mlp", lambda: Dense(10, 784), (28, 28, 1), 785 * 500 + 3 * 501 * 500 + 501 * 10),
    ("cnn", lambda: Digits(10, 1, 512), (28, 28, 1), 26 * 16 + 401 * 32 + 513 * 512 + 5130),
])
def test_parameter_counts(name, net, shape, count):
    arch = Arch(name=name, num_classes=10, image_shape=shape)
    ours = jax.eval_shape(lambda k: models.create(k, arch), jax.random.key(0))
    assert sum(leaf.size for leaf in jax.tree.leaves(ours.weights)) == count
    assert sum(p.numel() for p in net().parameters()) == count


def test_another_image_size_is_told_apart():
    with pytest.raises(ValueError, match=r"fc1\.weight \(500, 784\) instead of \(500, 3072\)"):
        torch_compat.params_from_state_dict(Dense(10, 784).state_dict())
