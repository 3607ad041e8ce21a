"""PyTorch state_dicts to and from `Params` (extra `torch`)."""

import os
import pathlib
import pickle
import tempfile
from typing import Any

import numpy as np

from awm_jax.types import Arch, Params

_WRAPPERS = ("net", "state_dict", "model", "model_state_dict")
_VGG_CONVS = (0, 3, 8, 11, 16, 19)


def _torch():
    """PyTorch, or a word on how to get it."""
    try:
        import torch
    except ImportError as error:
        raise ImportError(
            "Reading and writing PyTorch files needs PyTorch: pip install 'awm-jax[torch]'."
        ) from error
    return torch


def _read(path: str | os.PathLike) -> Any:
    """The object in a PyTorch file; nothing in it is executed."""
    torch = _torch()
    path = pathlib.Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"Expected a PyTorch file at {path}, found nothing there.")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} was refused: it holds more than tensors, and loading it could run code of its "
            "author's. Save the state_dict alone (torch.save(net.state_dict(), PATH)) where you "
            "trust it."
        ) from error
    except (RuntimeError, EOFError, OSError, KeyError, ValueError) as error:
        raise OSError(f"{path} is no whole PyTorch file: {error}") from error


def _unwrap(content: Any) -> tuple[dict[str, Any], str | None]:
    """The state_dict in a checkpoint, and the name it goes by there."""
    torch = _torch()
    for name in (None, *_WRAPPERS):
        inner = content if name is None else content.get(name)
        if isinstance(inner, dict) and inner and all(
                isinstance(value, torch.Tensor) for value in inner.values()):
            return inner, name
        if not isinstance(content, dict):
            break
    raise ValueError(
        "Expected a state_dict or a dictionary with one under "
        f"{', '.join(map(repr, _WRAPPERS))}; got {_describe(content)}."
    )


def _describe(content: Any) -> str:
    """A few words on what a file held."""
    if isinstance(content, dict):
        return f"a dictionary with keys {', '.join(map(str, list(content)[:8]))}"
    return type(content).__name__


def load_state_dict(path: str | os.PathLike) -> dict[str, Any]:
    """Reads the state_dict in a PyTorch file without running any code in it.

    Args:
      path: a .pth or .pt file: a state_dict, or a dictionary that holds one as ``net``,
        ``state_dict``, ``model`` or ``model_state_dict``; ``module.`` prefixes are dropped.

    Returns:
      Names to tensors.

    Raises:
      FileNotFoundError: no such file.
      ValueError: a pickle that wants to run code, or no state_dict in it.
      OSError: damaged.

    Example: `load_state_dict('network.pth')['classifier.weight'].shape`.
    """
    state, _ = _unwrap(_read(path))
    return {name.removeprefix("module."): value for name, value in state.items()}


Entry = tuple[str, tuple[str, ...], str]  # PyTorch name, path in Params, kind


def _norm_entries(torch_name: str, path: tuple[str, ...]) -> list[Entry]:
    """The four tensors of a BatchNorm."""
    return [
        (f"{torch_name}.weight", ("weights", *path, "scale"), "vector"),
        (f"{torch_name}.bias", ("weights", *path, "bias"), "vector"),
        (f"{torch_name}.running_mean", ("batch_stats", *path, "mean"), "vector"),
        (f"{torch_name}.running_var", ("batch_stats", *path, "var"), "vector"),
    ]


def _vgg_entries() -> list[Entry]:
    """The small VGG as the I-BAU and AWM code lay it out."""
    entries: list[Entry] = []
    for i, n in enumerate(_VGG_CONVS, start=1):
        entries += [(f"features.{n}.weight", ("weights", f"conv{i}", "kernel"), "conv"),
                    (f"features.{n}.bias", ("weights", f"conv{i}", "bias"), "vector"),
                    *_norm_entries(f"features.{n + 1}", (f"bn{i}",))]
    return [*entries, ("classifier.weight", ("weights", "dense", "kernel"), "dense_128"),
            ("classifier.bias", ("weights", "dense", "bias"), "vector")]


def _resnet_entries(shortcut: str, dense: str) -> list[Entry]:
    """ResNet-18 as the CIFAR repositories (``shortcut``, ``linear``) or torchvision name it."""
    entries: list[Entry] = [("conv1.weight", ("weights", "conv1", "kernel"), "conv"),
                            *_norm_entries("bn1", ("bn1",))]
    for stage in range(1, 5):
        for block in range(2):
            theirs, ours = f"layer{stage}.{block}", f"layer{stage}_{block}"
            pairs = [("conv1", "bn1", "conv1", "bn1"), ("conv2", "bn2", "conv2", "bn2")]
            if stage > 1 and block == 0:
                pairs.append((f"{shortcut}.0", f"{shortcut}.1", "shortcut_conv", "shortcut_bn"))
            for conv, norm, our_conv, our_norm in pairs:
                entries.append((f"{theirs}.{conv}.weight",
                                ("weights", ours, our_conv, "kernel"), "conv"))
                entries += _norm_entries(f"{theirs}.{norm}", (ours, our_norm))
    return [*entries, (f"{dense}.weight", ("weights", "dense", "kernel"), "dense"),
            (f"{dense}.bias", ("weights", "dense", "bias"), "vector")]


def _entries(arch: str, names: Any = ()) -> list[Entry]:
    """The layout of an architecture, in the spelling that ``names`` use."""
    if arch == "small_vgg":
        return _vgg_entries()
    if arch == "resnet18":
        shortcut = "downsample" if any(".downsample." in n for n in names) else "shortcut"
        return _resnet_entries(shortcut, "fc" if "fc.weight" in names else "linear")
    raise ValueError(f"Expected arch={arch!r} to be one of: small_vgg, resnet18.")


def _detect(names: Any) -> str:
    """The architecture whose names these are."""
    for arch in ("small_vgg", "resnet18"):
        if {entry[0] for entry in _entries(arch, names)} <= set(names):
            return arch
    raise ValueError(
        "Expected the names of a small_vgg or a resnet18; got "
        f"{', '.join(list(names)[:6])}, ... Name the architecture to see what differs."
    )


def _to_jax(value: np.ndarray, kind: str) -> np.ndarray:
    """PyTorch's layout to Flax's."""
    if kind == "conv":
        return value.transpose(2, 3, 1, 0)
    if kind == "dense":
        return value.T
    if kind.startswith("dense_"):  # flattened from C, H, W there, from H, W, C here
        channels = int(kind.removeprefix("dense_"))
        side = round((value.shape[1] / channels) ** 0.5)
        return value.reshape(-1, channels, side, side).transpose(2, 3, 1, 0).reshape(
            value.shape[1], -1)
    return value


def _to_torch(value: np.ndarray, kind: str) -> np.ndarray:
    """The inverse of `_to_jax`."""
    if kind == "conv":
        return value.transpose(3, 2, 0, 1)
    if kind == "dense":
        return value.T
    if kind.startswith("dense_"):
        channels = int(kind.removeprefix("dense_"))
        side = round((value.shape[0] / channels) ** 0.5)
        return value.reshape(side, side, channels, -1).transpose(3, 2, 0, 1).reshape(
            -1, value.shape[0])
    return value


def params_from_state_dict(state: dict[str, Any], arch: Arch | None = None) -> Params:
    """A network from PyTorch tensors.

    Args:
      state: names to tensors, as `load_state_dict` gives them.
      arch: what it should be; None finds the architecture from the names and takes 32x32 images
        without normalisation.

    Returns:
      `Params`, float32.

    Raises:
      ValueError: all differences at once: missing and unexpected names, wrong shapes; or a network
        that is none of ours.

    Example: `params_from_state_dict(net.state_dict()).arch.name`.
    """
    import jax
    import jax.numpy as jnp

    from awm_jax import models

    if arch is None:
        name = _detect(state)
        dense = next(n for n in ("classifier.bias", "linear.bias", "fc.bias") if n in state)
        arch = Arch(name=name, num_classes=int(state[dense].shape[0]))
    entries = _entries(arch.name, state)
    counters = {n for n in state if n.endswith("num_batches_tracked")}
    missing = [e[0] for e in entries if e[0] not in state]
    unexpected = sorted(set(state) - {e[0] for e in entries} - counters)
    expected = jax.eval_shape(lambda k: models.create(k, arch), jax.random.key(0))
    shapes = {"weights": expected.weights, "batch_stats": expected.batch_stats}
    tree: dict[str, Any] = {}
    wrong = []
    for torch_name, path, kind in entries:
        if torch_name not in state:
            continue
        value = _to_jax(np.asarray(state[torch_name].detach().cpu().float().numpy()), kind)
        node, want = tree, shapes
        for part in path[:-1]:
            node, want = node.setdefault(part, {}), want[part]
        node[path[-1]] = jnp.asarray(value)
        if value.shape != want[path[-1]].shape:
            theirs = tuple(state[torch_name].shape)
            ours = _to_torch(np.zeros(want[path[-1]].shape, np.float32), kind).shape
            wrong.append(f"{torch_name} {theirs} instead of {ours}")
    if missing or unexpected or wrong:
        lists = [("missing", missing), ("unexpected", unexpected), ("shape", wrong)]
        raise ValueError(
            f"The file is no {arch.name} with {arch.num_classes} classes. "
            + "; ".join(f"{what}: {', '.join(found)}" for what, found in lists if found)
        )
    return Params(tree["weights"], tree["batch_stats"], arch)


def state_dict_from_params(params: Params,
                           template: dict[str, Any] | None = None) -> dict[str, Any]:
    """PyTorch tensors of a network, under the names its own kind of repository uses.

    Args:
      params: the network.
      template: a state_dict whose spelling, order, dtypes and batch counters are kept.

    Returns:
      Names to tensors; ``load_state_dict(..., strict=True)`` takes them.

    Example: `net.load_state_dict(state_dict_from_params(params))`.
    """
    torch = _torch()
    out: dict[str, Any] = {}
    for torch_name, path, kind in _entries(params.arch.name, template or ()):
        node: Any = {"weights": params.weights, "batch_stats": params.batch_stats}
        for part in path:
            node = node[part]
        value = np.ascontiguousarray(_to_torch(np.asarray(node), kind))
        out[torch_name] = torch.tensor(value)
        if torch_name.endswith("running_var"):
            counter = torch_name.replace("running_var", "num_batches_tracked")
            out[counter] = torch.tensor(0)
    if template is not None:
        counters = {n: v for n, v in template.items() if n.endswith("num_batches_tracked")}
        merged = {**out, **counters}
        out = {n: merged[n].to(template[n].dtype) for n in template}
    return out


def load(path: str | os.PathLike, arch: Arch | None = None) -> Params:
    """`params_from_state_dict` of a file; errors as there and in `load_state_dict`."""
    return params_from_state_dict(load_state_dict(path), arch)


def save(path: str | os.PathLike, params: Params,
         template_path: str | os.PathLike | None = None) -> None:
    """Writes a network as a PyTorch file, under a temporary name that is then renamed.

    Args:
      path: the file to write.
      params: the network.
      template_path: the file it came from: its wrapper and other entries are kept.

    Raises:
      ValueError: ``path`` is the template itself, which is never overwritten.

    Example: `save('purified.pth', purified.params, 'suspect.pth')`.
    """
    torch = _torch()
    path = pathlib.Path(path)
    content: Any = None
    if template_path is not None:
        if path.resolve() == pathlib.Path(template_path).resolve():
            raise ValueError(f"Expected another path than the template's, {path}: it is kept.")
        content = _read(template_path)
        state, wrapper = _unwrap(content)
        prefixed = all(name.startswith("module.") for name in state)
        plain = {name.removeprefix("module."): value for name, value in state.items()}
        new = state_dict_from_params(params, plain)
        if prefixed:
            new = {f"module.{name}": value for name, value in new.items()}
        content = new if wrapper is None else {**content, wrapper: new}
    else:
        content = state_dict_from_params(params)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
        torch.save(content, file)
    os.replace(file.name, path)
