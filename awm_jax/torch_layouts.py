"""Where each tensor of a PyTorch network goes: names, paths, layouts. Needs no PyTorch."""

import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from awm_jax import models, validate
from awm_jax.types import Arch

LAYOUTS = ("small_vgg", "resnet18", "preact_resnet18", "vgg19_bn", "shufflenet_v2",
           "mobilenet_v2", "mlp", "cnn")
_SMALL_VGG = (0, 3, 8, 11, 16, 19)  # convolutions in its list of layers
_VGG19 = (0, 3, 7, 10, 14, 17, 20, 23, 27, 30, 33, 36, 40, 43, 46, 49)


class Entry(NamedTuple):
    """One tensor: its PyTorch name, its path in `Params`, and how its axes are laid out.

    ``grid`` is the ``(C, H, W)`` that a ``'flat'`` kernel's inputs were flattened from.
    """

    name: str
    path: tuple[str, ...]
    kind: str = "vector"
    grid: tuple[int, int, int] = (0, 0, 0)


def _norm_entries(name: str, path: tuple[str, ...]) -> list[Entry]:
    """The four tensors of a BatchNorm."""
    return [
        Entry(f"{name}.weight", ("weights", *path, "scale")),
        Entry(f"{name}.bias", ("weights", *path, "bias")),
        Entry(f"{name}.running_mean", ("batch_stats", *path, "mean")),
        Entry(f"{name}.running_var", ("batch_stats", *path, "var")),
    ]


def _features_entries(convolutions: Iterable[int]) -> list[Entry]:
    """A list of layers called ``features``: convolutions, each with a bias and a BatchNorm."""
    entries: list[Entry] = []
    for i, n in enumerate(convolutions, start=1):
        entries += [Entry(f"features.{n}.weight", ("weights", f"conv{i}", "kernel"), "conv"),
                    Entry(f"features.{n}.bias", ("weights", f"conv{i}", "bias")),
                    *_norm_entries(f"features.{n + 1}", (f"bn{i}",))]
    return entries


def _dense_entries(name: str, grid: tuple[int, int, int] | None = None,
                   ours: str = "dense") -> list[Entry]:
    """A dense layer, by default the last, on features flattened from ``grid`` if it is given."""
    kernel = ("weights", ours, "kernel")
    return [Entry(f"{name}.weight", kernel, "dense") if grid is None else
            Entry(f"{name}.weight", kernel, "flat", grid),
            Entry(f"{name}.bias", ("weights", ours, "bias"))]


def _resnet_entries(shortcut: str, dense: str) -> list[Entry]:
    """ResNet-18 as the CIFAR repositories (``shortcut``, ``linear``) or torchvision name it."""
    entries = [Entry("conv1.weight", ("weights", "conv1", "kernel"), "conv"),
               *_norm_entries("bn1", ("bn1",))]
    for stage in range(1, 5):
        for block in range(2):
            theirs, ours = f"layer{stage}.{block}", f"layer{stage}_{block}"
            pairs = [("conv1", "bn1", "conv1", "bn1"), ("conv2", "bn2", "conv2", "bn2")]
            if stage > 1 and block == 0:
                pairs.append((f"{shortcut}.0", f"{shortcut}.1", "shortcut_conv", "shortcut_bn"))
            for conv, norm, our_conv, our_norm in pairs:
                entries.append(Entry(f"{theirs}.{conv}.weight",
                                     ("weights", ours, our_conv, "kernel"), "conv"))
                entries += _norm_entries(f"{theirs}.{norm}", (ours, our_norm))
    return [*entries, *_dense_entries(dense)]


def _preact_entries() -> list[Entry]:
    """Pre-activation ResNet-18 as the CIFAR repositories name it."""
    entries = [Entry("conv1.weight", ("weights", "conv1", "kernel"), "conv")]
    for stage in range(1, 5):
        for block in range(2):
            theirs, ours = f"layer{stage}.{block}", f"layer{stage}_{block}"
            for i in (1, 2):
                entries += [*_norm_entries(f"{theirs}.bn{i}", (ours, f"bn{i}")),
                            Entry(f"{theirs}.conv{i}.weight",
                                  ("weights", ours, f"conv{i}", "kernel"), "conv")]
            if stage > 1 and block == 0:
                entries.append(Entry(f"{theirs}.shortcut.0.weight",
                                     ("weights", ours, "shortcut_conv", "kernel"), "conv"))
    return [*entries, *_dense_entries("linear")]


def _paired_entries(arch: Arch) -> list[Entry]:
    """Bias-free convolutions, each with a BatchNorm, in blocks as the CIFAR repositories name them.

    Ours are called alike: ``layers_3/shortcut_conv`` for ``layers.3.shortcut.0``.
    """
    def theirs(path):
        name = re.sub(r"_(\d+)/", r".\1.", path)
        return name.replace("shortcut_conv", "shortcut.0").replace("shortcut_bn", "shortcut.1")

    entries: list[Entry] = []
    for norm, conv in models.norm_inputs(arch).items():
        entries += [Entry(f"{theirs(conv)}.weight", ("weights", *conv.split("/"), "kernel"),
                          "conv"), *_norm_entries(theirs(norm), tuple(norm.split("/")))]
    return [*entries, *_dense_entries("linear")]


def _mlp_entries(image_shape: tuple[int, int, int]) -> list[Entry]:
    """Dense layers ``fc1`` to ``fc5``, the first on a flattened image."""
    height, width, channels = image_shape
    entries = _dense_entries("fc1", (channels, height, width), "fc1")
    for i in (2, 3, 4):
        entries += _dense_entries(f"fc{i}", None, f"fc{i}")
    return [*entries, *_dense_entries("fc5")]


def _cnn_entries(image_shape: tuple[int, int, int]) -> list[Entry]:
    """Convolutions ``conv1`` and ``conv2``, dense layers ``fc1`` and ``fc2``."""
    entries: list[Entry] = []
    height, width, _ = image_shape
    for name in ("conv1", "conv2"):
        entries += [Entry(f"{name}.weight", ("weights", name, "kernel"), "conv"),
                    Entry(f"{name}.bias", ("weights", name, "bias"))]
        height, width = (height - 4) // 2, (width - 4) // 2
    return [*entries, *_dense_entries("fc1", (32, height, width), "fc1"), *_dense_entries("fc2")]


def entries(arch: Arch, names: Iterable[str] = ()) -> list[Entry]:
    """The layout of an architecture, in the spelling that ``names`` use.

    Args:
      arch: an architecture of `LAYOUTS`.
      names: the tensors' names in a state_dict.

    Returns:
      An `Entry` for each tensor, batch counters apart.

    Raises:
      ValueError: an architecture without a layout.

    Example:
      >>> entries(Arch(name='resnet18', num_classes=10))[0].name
      'conv1.weight'
    """
    validate.choice(LAYOUTS, arch=arch.name)
    if arch.name == "small_vgg":
        grid = (128, arch.image_shape[0] // 8, arch.image_shape[1] // 8)  # after three poolings
        return [*_features_entries(_SMALL_VGG), *_dense_entries("classifier", grid)]
    if arch.name == "vgg19_bn":
        return [*_features_entries(_VGG19), *_dense_entries("classifier")]
    if arch.name == "preact_resnet18":
        return _preact_entries()
    if arch.name in ("shufflenet_v2", "mobilenet_v2"):
        return _paired_entries(arch)
    if arch.name == "mlp":
        return _mlp_entries(arch.image_shape)
    if arch.name == "cnn":
        return _cnn_entries(arch.image_shape)
    shortcut = "downsample" if any(".downsample." in n for n in names) else "shortcut"
    return _resnet_entries(shortcut, "fc" if any(n.startswith("fc.") for n in names) else "linear")


def prefix(names: Iterable[str]) -> str:
    """What wrappers have put before every tensor's name, any number of them; mostly nothing.

    DataParallel's ``module.``, torch.compile's ``_orig_mod.``, ``model.``, ``net.`` or
    ``backbone.`` of a Lightning module: whatever all names share, up to a layer's own name.

    Args:
      names: of a state_dict.

    Returns:
      The prefix, '' without any.

    Example:
      >>> prefix(['model._orig_mod.conv1.weight', 'model._orig_mod.conv1.bias'])
      'model._orig_mod.'
    """
    names, found = list(names), ""
    while names:
        longer = found + names[0][len(found):].partition(".")[0] + "."
        if not all(n.startswith(longer) and "." in n[len(longer):] for n in names):
            break
        found = longer
    return found


def without(prefix: str, state: Mapping[str, Any]) -> dict[str, Any]:
    """A state_dict whose names have lost a prefix that all of them have.

    Example:
      >>> without('module.', {'module.a': 1})
      {'a': 1}
    """
    return {name[len(prefix):]: value for name, value in state.items()}
