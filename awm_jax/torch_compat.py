"""PyTorch state_dicts to and from `Params` (extra `torch`)."""

import dataclasses
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from awm_jax import checkpoint, torch_files, validate
from awm_jax.torch_files import COUNTER, copies, load_state_dict
from awm_jax.torch_layouts import LAYOUTS, Entry, entries
from awm_jax.types import Arch, Params

__all__ = ["arrays_from_params", "arrays_from_state_dict", "copies", "detect", "load",
           "load_state_dict", "params_from_state_dict", "save", "state_dict_from_params"]

def detect(state: Mapping[str, Any]) -> str:
    """The architecture whose names fit best; a few may be missing, which is reported later.

    Args:
      state: names to tensors or arrays; only the names count.

    Returns:
      A key of `awm_jax.models.MODELS`.

    Raises:
      ValueError: fewer than half of the names fit any.

    Example: `detect(net.state_dict())`.
    """
    found = {name for name in state if not name.endswith(COUNTER)}
    share = {}
    for arch in LAYOUTS:
        expected = {e.name for e in entries(Arch(name=arch, num_classes=2), state)}
        share[arch] = len(expected & found) / len(expected | found)
    best = max(share, key=lambda name: share[name])
    if share[best] < 0.5:
        raise ValueError(
            f"Expected the names of a {' or a '.join(LAYOUTS)}; got "
            f"{', '.join(list(state)[:6])}, ... Name the architecture to see what differs; "
            "another network is for Params.from_flax."
        )
    return best


def _complete(arch: Arch | str | None, state: Mapping[str, Any],
              image_shape: tuple[int, int, int]) -> Arch:
    """An `Arch` from as much of it as is given; the last layer says how many classes."""
    if isinstance(arch, Arch):
        return arch
    known = Arch(name=arch or detect(state), num_classes=2,
                 image_shape=validate.image_shape(image_shape))
    last = [state[e.name] for e in entries(known, state)
            if e.path[:2] == ("weights", "dense") and e.name in state]
    num_classes = max([2, *(int(value.shape[0]) for value in last[:1] if value.ndim)])
    return dataclasses.replace(known, num_classes=num_classes)


def _normalised(arch: Arch, mean: tuple[float, ...] | None, std: tuple[float, ...] | None) -> Arch:
    """An `Arch` with the moments that are given."""
    validate.normalisation(() if mean is None else mean, () if std is None else std,
                           arch.image_shape[2])
    return dataclasses.replace(arch, mean=arch.mean if mean is None else tuple(map(float, mean)),
                               std=arch.std if std is None else tuple(map(float, std)))


def _to_jax(value: np.ndarray, entry: Entry) -> np.ndarray:
    """PyTorch's layout to Flax's."""
    if entry.kind == "conv":
        return value.transpose(2, 3, 1, 0)
    if entry.kind == "dense":
        return value.T
    if entry.kind == "flat":  # flattened from C, H, W there, from H, W, C here
        return value.reshape(-1, *entry.grid).transpose(2, 3, 1, 0).reshape(value.shape[1], -1)
    return value


def _to_torch(value: np.ndarray, entry: Entry) -> np.ndarray:
    """The inverse of `_to_jax`."""
    if entry.kind == "conv":
        return value.transpose(3, 2, 0, 1)
    if entry.kind == "dense":
        return value.T
    if entry.kind == "flat":
        channels, height, width = entry.grid
        value = value.reshape(height, width, channels, -1)
        return value.transpose(3, 2, 0, 1).reshape(value.shape[3], -1)
    return value


def _floats(value: Any) -> np.ndarray:
    """A tensor of PyTorch's, or an array of NumPy's or JAX's, in float32 on the host."""
    if hasattr(value, "detach"):
        value = value.detach().cpu().float().numpy()
    with np.errstate(over="ignore"):  # a number too large for float32 becomes infinite
        return np.asarray(value, np.float32)


def arrays_from_state_dict(state: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """PyTorch tensors as NumPy arrays of the same dtypes, bfloat16 among them.

    Args:
      state: names to tensors, as `load_state_dict` gives them.

    Returns:
      Names to arrays; most share the tensors' memory.

    Raises:
      ValueError: a tensor that is sparse, quantised or of a dtype that NumPy lacks.

    Example: `arrays_from_state_dict(net.state_dict())['classifier.weight'].dtype`.
    """
    torch = torch_files.pytorch()
    arrays = {}
    for name, tensor in state.items():
        try:
            tensor = tensor.detach().cpu()
            arrays[name] = (tensor.float().numpy().astype(jnp.bfloat16)
                            if tensor.dtype == torch.bfloat16 else tensor.numpy())
        except (TypeError, RuntimeError) as error:  # NotImplementedError, of no data, is one too
            raise ValueError(f"Expected plain tensors, {name} is {tensor.dtype}, {tensor.layout}: "
                             f"{torch_files.in_one_line(error)}") from error
    return arrays


def _tensor(value: np.ndarray) -> Any:
    """An array as a tensor of the same dtype."""
    torch = torch_files.pytorch()
    if value.dtype == jnp.bfloat16:
        return torch.tensor(value.astype(np.float32)).bfloat16()
    return torch.tensor(value)


def _leaf(params: Params, path: tuple[str, ...]) -> Any:
    """What lies at a path of an `Entry`."""
    node: Any = {"weights": params.weights, "batch_stats": params.batch_stats}
    for part in path:
        node = node[part]
    return node


def _differences(found: Mapping[str, Any], expected: Mapping[str, tuple[int, ...]]) -> str:
    """Every name and shape in which tensors differ from what is expected; empty if none does."""
    counted = {name for name in {*found, *expected} if name.endswith(COUNTER)}
    lists = {
        "missing": [n for n in expected if n not in found and n not in counted],
        "unexpected": [n for n in found if n not in expected and n not in counted],
        "shape": [f"{n} {tuple(found[n].shape)} instead of {tuple(shape)}"
                  for n, shape in expected.items()
                  if n in found and n not in counted and tuple(found[n].shape) != tuple(shape)],
    }
    return "; ".join(f"{what}: {', '.join(names)}" for what, names in lists.items() if names)


def params_from_state_dict(state: Mapping[str, Any], arch: Arch | str | None = None,
                           image_shape: tuple[int, int, int] = (32, 32, 3), *,
                           mean: tuple[float, ...] | None = None,
                           std: tuple[float, ...] | None = None) -> Params:
    """A network from PyTorch tensors, or from arrays under their names: those need no PyTorch.

    Args:
      state: names to tensors, as `load_state_dict` gives them, or to arrays of NumPy's or JAX's.
      arch: what it should be: an `Arch`, its name, or None to tell by the tensors' names. Without
        an `Arch`, the last layer gives the number of classes.
      image_shape: ``(height, width, channels)`` of its images; an `Arch` brings its own.
      mean: what was subtracted from images in [0, 1] in training, a number a channel; a file does
        not say. None is the `Arch`'s, without one zeros.
      std: what they were divided by then, > 0; None is the `Arch`'s, without one ones.

    Returns:
      `Params`, float32, sharing no memory with the tensors.

    Raises:
      ValueError: all differences at once: missing and unexpected names, wrong shapes; a network
        that is none of ours; or another number of means or scales than channels.

    Example: `params_from_state_dict(net.state_dict()).arch.name`.
    """
    import jax

    from awm_jax import models

    arch = _normalised(_complete(arch, state, image_shape), mean, std)
    layout = entries(arch, state)
    ours = jax.eval_shape(lambda key: models.create(key, arch), jax.random.key(0))
    wanted = {e.name: _to_torch(np.broadcast_to(np.float32(0), _leaf(ours, e.path).shape), e).shape
              for e in layout}
    if differences := _differences(state, wanted):
        raise ValueError(
            f"The tensors are no {arch.name} with {arch.num_classes} classes for images of "
            f"{'x'.join(map(str, arch.image_shape))} (image_shape); another network is for "
            f"Params.from_flax. {differences}."
        )
    tree: dict[str, Any] = {}
    for entry in layout:
        node = tree
        for part in entry.path[:-1]:
            node = node.setdefault(part, {})
        node[entry.path[-1]] = jnp.array(_to_jax(_floats(state[entry.name]), entry))
    return Params(tree["weights"], tree.get("batch_stats", {}), arch)


def _arrays(params: Params, template: Mapping[str, Any] | None) -> dict[str, np.ndarray]:
    """Every tensor in float32 and PyTorch's layout, batch counters at zero; fits the template."""
    checkpoint.ours_only(params.arch)
    out: dict[str, np.ndarray] = {}
    for entry in entries(params.arch, template or ()):
        out[entry.name] = np.ascontiguousarray(
            _to_torch(np.asarray(_leaf(params, entry.path)), entry))
        if entry.name.endswith("running_var"):
            out[entry.name.replace("running_var", COUNTER)] = np.zeros((), np.int64)
    if template is not None and (differences := _differences(
            template, {name: value.shape for name, value in out.items()})):
        raise ValueError(
            f"The template is no {params.arch.name} with {params.arch.num_classes} classes. "
            f"{differences}."
        )
    return out


def arrays_from_params(params: Params,
                       template: Mapping[str, Any] | None = None) -> dict[str, np.ndarray]:
    """`state_dict_from_params` in NumPy arrays, which needs no PyTorch.

    Args:
      params: the network.
      template: names to arrays, whose spelling, order, dtypes and batch counters are kept.

    Returns:
      Names to contiguous arrays in PyTorch's layout.

    Raises:
      ValueError: an architecture without a PyTorch layout, or a template of another network.

    Example: `safetensors.numpy.save_file(arrays_from_params(params), 'net.safetensors')`.
    """
    out = _arrays(params, template)
    if template is None:
        return out
    return {n: np.asarray(v) if n.endswith(COUNTER) else out[n].astype(v.dtype)
            for n, v in template.items()}


def state_dict_from_params(params: Params,
                           template: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """PyTorch tensors of a network, under the names its own kind of repository uses.

    Args:
      params: the network.
      template: a state_dict whose spelling, order, dtypes and batch counters are kept.

    Returns:
      Names to tensors; ``load_state_dict(..., strict=True)`` takes them.

    Raises:
      ValueError: an architecture without a PyTorch layout, or a template of another network.

    Example: `net.load_state_dict(state_dict_from_params(params))`.
    """
    out = {name: _tensor(value) for name, value in _arrays(params, template).items()}
    if template is None:
        return out
    return {n: v if n.endswith(COUNTER) else out[n].to(v.dtype) for n, v in template.items()}


def load(path: str | os.PathLike, arch: Arch | str | None = None,
         image_shape: tuple[int, int, int] = (32, 32, 3), *, mean: tuple[float, ...] | None = None,
         std: tuple[float, ...] | None = None) -> Params:
    """`params_from_state_dict` of a file; arguments, errors as there and in `load_state_dict`."""
    return params_from_state_dict(load_state_dict(path), arch, image_shape, mean=mean, std=std)


def save(path: str | os.PathLike, params: Params,
         template_path: str | os.PathLike | None = None, *,
         template: Mapping[str, np.ndarray] | None = None) -> None:
    """Writes a network as a PyTorch file, under a temporary name that is then renamed.

    A file that is there is replaced. ``arch.mean`` and ``arch.std`` have no place in a state_dict:
    normalise in PyTorch as before.

    Args:
      path: the file to write.
      params: the network.
      template_path: the PyTorch file it came from: its wrapper and other entries are kept, but
        for `copies` of the network, which are replaced like the network.
      template: arrays from a file of another format, as in `arrays_from_params`.

    Raises:
      ValueError: ``path`` is the template itself, which is never overwritten.

    Example: `save('purified.pth', purified.params, 'suspect.pth')`.
    """
    path = pathlib.Path(path)
    if template_path is not None:
        if path.resolve() == pathlib.Path(template_path).resolve():
            raise ValueError(f"Expected another path than the template's, {path}: it is kept.")
        content = torch_files.replaced(torch_files.read(template_path),
                                       lambda state: state_dict_from_params(params, state))
    else:
        content = {n: _tensor(v) for n, v in arrays_from_params(params, template).items()}
    torch_files.write(path, content)
