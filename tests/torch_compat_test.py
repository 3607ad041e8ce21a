"""PyTorch files in and out, logit for logit."""

import argparse
import os
import pickle

import jax
import numpy as np
import pytest

from awm_jax import models
from awm_jax.types import Arch

torch = pytest.importorskip("torch")
from awm_jax import torch_compat  # noqa: E402

SUSPECTS = ["badnets_8_02", "trojan_sq_2_02", "gtsrbbadnets_8_02", "gtsrbtrojan_wm_2_02"]
IMAGES = np.random.default_rng(0).random((4, 32, 32, 3), np.float32)


class Vgg(torch.nn.Module):
    """Table 6 of the AWM paper."""

    def __init__(self, classes):
        super().__init__()
        layers, width = [], 3
        for features, dropout in ((32, 0.3), (64, 0.4), (128, 0.4)):
            for _ in range(2):
                layers += [torch.nn.Conv2d(width, features, 3, padding=1),
                           torch.nn.BatchNorm2d(features), torch.nn.ELU()]
                width = features
            layers += [torch.nn.MaxPool2d(2), torch.nn.Dropout(dropout)]
        self.features = torch.nn.Sequential(*layers)
        self.classifier = torch.nn.Linear(2048, classes)

    def forward(self, x):
        return self.classifier(self.features(x).flatten(1))


class Block(torch.nn.Module):
    """A basic residual block, shortcut under the name ``name``."""

    def __init__(self, before, after, stride, name):
        super().__init__()
        self.conv1 = torch.nn.Conv2d(before, after, 3, stride, 1, bias=False)
        self.bn1 = torch.nn.BatchNorm2d(after)
        self.conv2 = torch.nn.Conv2d(after, after, 3, 1, 1, bias=False)
        self.bn2 = torch.nn.BatchNorm2d(after)
        self.way = name
        skip = torch.nn.Sequential()
        if stride != 1 or before != after:
            skip = torch.nn.Sequential(torch.nn.Conv2d(before, after, 1, stride, bias=False),
                                       torch.nn.BatchNorm2d(after))
        setattr(self, name, skip)

    def forward(self, x):
        y = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        return torch.relu(y + getattr(self, self.way)(x))


class ResNet(torch.nn.Module):
    """ResNet-18 for 32x32 images, in either spelling."""

    def __init__(self, classes, shortcut, dense):
        super().__init__()
        self.conv1 = torch.nn.Conv2d(3, 64, 3, 1, 1, bias=False)
        self.bn1 = torch.nn.BatchNorm2d(64)
        width = 64
        for stage, features in enumerate((64, 128, 256, 512), start=1):
            first = Block(width, features, 1 if stage == 1 else 2, shortcut)
            setattr(self, f"layer{stage}", torch.nn.Sequential(
                first, Block(features, features, 1, shortcut)))
            width = features
        self.dense = dense
        setattr(self, dense, torch.nn.Linear(512, classes))

    def forward(self, x):
        x = torch.relu(self.bn1(self.conv1(x)))
        for stage in range(1, 5):
            x = getattr(self, f"layer{stage}")(x)
        return getattr(self, self.dense)(x.mean((2, 3)))


class PreActBlock(torch.nn.Module):
    """BatchNorm and ReLU before each convolution."""

    def __init__(self, before, after, stride):
        super().__init__()
        self.bn1 = torch.nn.BatchNorm2d(before)
        self.conv1 = torch.nn.Conv2d(before, after, 3, stride, 1, bias=False)
        self.bn2 = torch.nn.BatchNorm2d(after)
        self.conv2 = torch.nn.Conv2d(after, after, 3, 1, 1, bias=False)
        if stride != 1 or before != after:
            self.shortcut = torch.nn.Sequential(
                torch.nn.Conv2d(before, after, 1, stride, bias=False))

    def forward(self, x):
        y = torch.relu(self.bn1(x))
        x = self.shortcut(y) if hasattr(self, "shortcut") else x
        return x + self.conv2(torch.relu(self.bn2(self.conv1(y))))


class PreActResNet(torch.nn.Module):
    """Pre-activation ResNet-18 for 32x32 images."""

    def __init__(self, classes):
        super().__init__()
        self.conv1 = torch.nn.Conv2d(3, 64, 3, 1, 1, bias=False)
        width = 64
        for stage, features in enumerate((64, 128, 256, 512), start=1):
            first = PreActBlock(width, features, 1 if stage == 1 else 2)
            setattr(self, f"layer{stage}", torch.nn.Sequential(
                first, PreActBlock(features, features, 1)))
            width = features
        self.linear = torch.nn.Linear(512, classes)

    def forward(self, x):
        x = self.conv1(x)
        for stage in range(1, 5):
            x = getattr(self, f"layer{stage}")(x)
        return self.linear(x.mean((2, 3)))


class Vgg19(torch.nn.Module):
    """VGG-19 with BatchNorm for 32x32 images."""

    def __init__(self, classes):
        super().__init__()
        layers, width = [], 3
        for features, count in ((64, 2), (128, 2), (256, 4), (512, 4), (512, 4)):
            for _ in range(count):
                layers += [torch.nn.Conv2d(width, features, 3, padding=1),
                           torch.nn.BatchNorm2d(features), torch.nn.ReLU()]
                width = features
            layers.append(torch.nn.MaxPool2d(2))
        self.features = torch.nn.Sequential(*layers)
        self.classifier = torch.nn.Linear(512, classes)

    def forward(self, x):
        return self.classifier(self.features(x).flatten(1))


def _random(net):
    """BatchNorm statistics that matter."""
    torch.manual_seed(0)
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.running_var, 0.5, 2.0)
            torch.nn.init.normal_(module.running_mean, 0.0, 0.3)
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.normal_(module.bias, 0.0, 0.3)
    return net.eval()


def _logits(net):
    with torch.no_grad():
        return net(torch.tensor(IMAGES.transpose(0, 3, 1, 2))).numpy()


def _parity(net, params):
    theirs = _logits(net)
    ours = np.asarray(jax.jit(models.apply)(params, IMAGES))
    np.testing.assert_allclose(ours, theirs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", SUSPECTS)
def test_third_party_networks_there_and_back(name, shared_data, tmp_path):
    path = shared_data / "third_party_models" / f"{name}_ckpt.pth"
    params = torch_compat.load(path)
    original = torch.load(path, weights_only=True, map_location="cpu")  # written on a GPU
    net = Vgg(params.arch.num_classes).eval()
    net.load_state_dict(original["net"])
    _parity(net, params)
    torch_compat.save(tmp_path / "back.pth", params, template_path=path)
    back = torch.load(tmp_path / "back.pth", map_location="cpu", weights_only=True)
    assert back["acc"] == original["acc"] and list(back["net"]) == list(original["net"])
    for key, value in original["net"].items():
        assert torch.equal(back["net"][key], value), key


@pytest.mark.parametrize("net", [Vgg(7), ResNet(5, "shortcut", "linear"),
                                 ResNet(5, "downsample", "fc"), PreActResNet(6), Vgg19(3)])
def test_random_networks_there_and_back(net):
    net = _random(net)
    params = torch_compat.params_from_state_dict(net.state_dict())
    _parity(net, params)
    before = _logits(net)
    state = torch_compat.state_dict_from_params(params, net.state_dict())
    for parameter in net.parameters():
        torch.nn.init.zeros_(parameter)
    net.load_state_dict(state, strict=True)
    np.testing.assert_array_equal(_logits(net), before)


def test_plain_state_dicts_and_prefixes(tmp_path):
    net = Vgg(4)
    torch.save({f"module.{k}": v for k, v in net.state_dict().items()}, tmp_path / "a.pth")
    params = torch_compat.load(tmp_path / "a.pth")
    torch_compat.save(tmp_path / "b.pth", params)
    Vgg(4).load_state_dict(torch.load(tmp_path / "b.pth", weights_only=True), strict=True)


def test_the_template_is_never_overwritten(tmp_path, small_params):
    torch.save(Vgg(4).state_dict(), tmp_path / "a.pth")
    params = torch_compat.load(tmp_path / "a.pth")
    with pytest.raises(ValueError, match="another path"):
        torch_compat.save(tmp_path / "a.pth", params, tmp_path / "a.pth")
    (tmp_path / "link.pth").symlink_to(tmp_path / "a.pth")
    with pytest.raises(ValueError, match="another path"):
        torch_compat.save(tmp_path / "link.pth", params, tmp_path / "a.pth")


def test_a_failed_save_leaves_the_old_file_alone(tmp_path, monkeypatch):
    params = torch_compat.params_from_state_dict(Vgg(4).state_dict())
    torch_compat.save(tmp_path / "a.pth", params)
    before = (tmp_path / "a.pth").read_bytes()

    def stop(content, path):
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", stop)
    with pytest.raises(KeyboardInterrupt):
        torch_compat.save(tmp_path / "a.pth", params)
    assert (tmp_path / "a.pth").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["a.pth"]


def test_a_template_of_another_network_is_refused():
    params = torch_compat.params_from_state_dict(Vgg(4).state_dict())
    with pytest.raises(ValueError, match=r"classifier\.bias \(9,\) instead of \(4,\)"):
        torch_compat.state_dict_from_params(params, Vgg(9).state_dict())
    resnet = {"conv1.weight": torch.zeros(64, 3, 3, 3)}
    with pytest.raises(ValueError, match=r"missing: features\.0\.w.*unexpected: conv1\.weight"):
        torch_compat.state_dict_from_params(params, resnet)


def test_counters_and_dtypes_follow_the_template():
    state = {k: v.half() if v.ndim == 4 else v for k, v in Vgg(4).state_dict().items()}
    state["features.1.num_batches_tracked"] = torch.tensor(7)
    params = torch_compat.params_from_state_dict(state)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype("float32")}
    back = torch_compat.state_dict_from_params(params, state)
    assert all(torch.equal(back[k], v) and back[k].dtype == v.dtype for k, v in state.items())
    plain = torch_compat.state_dict_from_params(params)
    assert list(plain) and int(plain["features.1.num_batches_tracked"]) == 0


def test_params_do_not_share_memory_with_the_network():
    net = Vgg(4)
    params = torch_compat.params_from_state_dict(net.state_dict())
    before = jax.tree.map(np.array, params)
    with torch.no_grad():
        for tensor in net.state_dict().values():
            tensor.add_(1)
    jax.tree.map(np.testing.assert_array_equal, params, before)


def test_a_name_and_an_image_shape_are_enough():
    shape = (8, 16, 3)  # not square: height and width must not be mixed up
    net = Vgg(5)
    net.classifier = torch.nn.Linear(128 * 1 * 2, 5)
    net = _random(net)
    params = torch_compat.params_from_state_dict(net.state_dict(), "small_vgg", shape)
    assert params.arch == Arch(name="small_vgg", num_classes=5, image_shape=shape)
    images = np.random.default_rng(1).random((2, *shape), np.float32)
    with torch.no_grad():
        theirs = net(torch.tensor(images.transpose(0, 3, 1, 2))).numpy()
    ours = jax.jit(models.apply)(params, images)
    np.testing.assert_allclose(ours, theirs, atol=1e-4, rtol=1e-4)
    back = torch_compat.state_dict_from_params(params)
    assert all(torch.equal(back[k], v) for k, v in net.state_dict().items() if v.ndim)


class _Evil:
    def __reduce__(self):
        return (os.mkdir, ("/tmp/awm_jax_was_here",))


def test_code_is_never_run(tmp_path):
    (tmp_path / "evil.pth").write_bytes(pickle.dumps({"net": _Evil()}))
    torch.save({"net": _Evil()}, tmp_path / "evil2.pth")
    for name in ("evil.pth", "evil2.pth"):
        with pytest.raises(ValueError, match=rf"{name} was refused"):
            torch_compat.load(tmp_path / name)
    assert not os.path.exists("/tmp/awm_jax_was_here")


def test_damaged_and_foreign_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.pth"):
        torch_compat.load(tmp_path / "none.pth")
    torch.save(Vgg(4).state_dict(), tmp_path / "cut.pth")
    content = (tmp_path / "cut.pth").read_bytes()
    (tmp_path / "cut.pth").write_bytes(content[: len(content) // 2])
    with pytest.raises(OSError, match=r"cut\.pth is no whole PyTorch file"):
        torch_compat.load(tmp_path / "cut.pth")
    (tmp_path / "page.pth").write_text("<!DOCTYPE html>")
    with pytest.raises(OSError, match=r"page\.pth is no PyTorch file"):
        torch_compat.load(tmp_path / "page.pth")
    torch.save({"epoch": 3}, tmp_path / "none.pth")
    with pytest.raises(ValueError, match="keys epoch"):
        torch_compat.load(tmp_path / "none.pth")
    with pytest.raises(ValueError, match="small_vgg or a resnet18 or a"):
        torch_compat.params_from_state_dict({"a.weight": torch.zeros(1)})


@pytest.mark.parametrize("arch", [None, "small_vgg", Arch(name="small_vgg", num_classes=4)])
def test_all_differences_are_listed(arch):
    state = Vgg(4).state_dict()
    state["extra"] = torch.zeros(1)
    del state["features.3.bias"]
    state["features.0.weight"] = torch.zeros(32, 27)
    state["classifier.weight"] = torch.zeros(4, 2000)
    with pytest.raises(ValueError) as caught:
        torch_compat.params_from_state_dict(state, arch)
    message = str(caught.value)
    assert "missing: features.3.bias; unexpected: extra; shape: " in message
    assert "features.0.weight (32, 27) instead of (32, 3, 3, 3)" in message
    assert "classifier.weight (4, 2000) instead of (4, 2048)" in message


def test_what_checkpoints_hold_beside_tensors_is_read(tmp_path):
    """Scores of NumPy's, options of argparse's; neither can run anything."""
    state = Vgg(4).state_dict()
    beside = {"acc": np.float64(0.9), "epoch": np.int64(3), "history": np.arange(3.0),
              "args": argparse.Namespace(lr=0.1)}
    for name in ("state_dict", "weights"):  # a single one may have any name
        torch.save({name: state, **beside}, tmp_path / "net.pth")
        assert torch_compat.load(tmp_path / "net.pth").arch.num_classes == 4
    torch.save({"student": state, "teacher": state}, tmp_path / "two.pth")
    with pytest.raises(ValueError, match="keys student, teacher"):
        torch_compat.load(tmp_path / "two.pth")
    objects = np.empty(1, object)
    objects[0] = _Evil()
    torch.save({"net": state, "more": objects}, tmp_path / "evil.pth")
    with pytest.raises(ValueError, match="was refused"):
        torch_compat.load(tmp_path / "evil.pth")
    assert not os.path.exists("/tmp/awm_jax_was_here")


@pytest.mark.parametrize("options, match", [
    ({"mean": 0.5}, "mean=0.5 to be 3 numbers"), ({"image_shape": (32, 32)}, "image_shape"),
    ({"mean": (123.0, 116.0, 103.0), "std": (58.0, 57.0, 57.0)}, "Divide it and std by 255")])
def test_what_does_not_describe_images_is_refused(options, match):
    with pytest.raises(ValueError, match=match):
        torch_compat.params_from_state_dict(Vgg(4).state_dict(), **options)
