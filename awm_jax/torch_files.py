"""PyTorch files: read without running anything in them, written by way of a temporary name."""

import argparse
import importlib
import os
import pathlib
import pickle
import re
import zipfile
from collections.abc import Callable
from typing import Any

import numpy as np

from awm_jax import torch_layouts, whole_files

_WRAPPERS = ("net", "state_dict", "model", "model_state_dict")
COUNTER = "num_batches_tracked"


def pytorch():
    """PyTorch, or a word on how to get it."""
    try:
        import torch
    except ImportError as error:
        raise ImportError(
            "Reading and writing PyTorch files needs PyTorch: pip install 'awm-jax[torch]'."
        ) from error
    return torch


def read(path: str | os.PathLike) -> Any:
    """The object in a PyTorch file; nothing in it is executed.

    Raises:
      FileNotFoundError: no such file.
      ValueError: a pickle that wants to run code.
      OSError: damaged, or of another format.

    Example: `read('network.pth')['state_dict']`.
    """
    torch = pytorch()
    path = pathlib.Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"Expected a PyTorch file at {path}, found no file there.")
    with path.open("rb") as file:
        start = file.read(2)
    if not start.startswith((b"PK", b"\x80")):  # a zip archive, or the older bare pickle
        raise OSError(f"{path} is no PyTorch file: neither a zip archive nor a pickle.")
    try:
        if start == b"PK":
            _sound(path)
        # By its name, PyTorch might take it for safetensors.
        with path.open("rb") as file, torch.serialization.safe_globals(_harmless()):
            return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL ([\w.]+)", str(error))
        raise ValueError(
            f"{path} was refused: it is damaged or holds more than tensors"
            f"{f' ({named[1]})' if named else ''}, and loading that could run code of its "
            "author's. Where you trust them: found = torch.load(PATH, weights_only=False), then "
            "torch.save(found, OTHER) of the state_dict alone: found, found['state_dict'] or "
            "found.state_dict()."
        ) from error
    except Exception as error:  # Python and PyTorch raise many kinds for a damaged file
        raise OSError(f"{path} is no whole PyTorch file: {in_one_line(error)}") from error


def _harmless() -> list[Any]:
    """What checkpoints hold beside tensors, scores and options, and what nothing is run by."""
    multiarray = np.zeros(0).__reduce__()[0].__module__  # it moved between NumPy's versions
    made_by = importlib.import_module(multiarray)
    kinds = {type(np.dtype(kind)) for kind in "?bhilqBHILQefdSU"}
    return [argparse.Namespace, np.dtype, np.ndarray, *kinds,
            *((getattr(made_by, name), f"numpy.{core}.multiarray.{name}")
              for core in ("core", "_core") for name in ("_reconstruct", "scalar"))]


def _sound(path: pathlib.Path) -> None:
    """OSError unless an archive's checksums hold: PyTorch reads on where they do not."""
    with zipfile.ZipFile(path) as archive:
        if damaged := archive.testzip():
            raise OSError(f"the checksum of {damaged} in it is wrong.")


def in_one_line(error: Exception) -> str:
    """What an error says, in one line that is not too long."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else f"{text[:300]}..."


def _unwrap(content: Any) -> tuple[dict[str, Any], str | None]:
    """The state_dict in a checkpoint, and the name it goes by there."""
    if _is_state(content):
        return content, None
    found = [name for name, inner in content.items() if isinstance(name, str) and _is_state(inner)
             ] if isinstance(content, dict) else []
    for name in (*_WRAPPERS, *(found if len(found) == 1 else ())):
        if name in found:
            return content[name], name
    raise ValueError(
        "Expected a state_dict or a dictionary with one under "
        f"{', '.join(map(repr, _WRAPPERS))}, or with one alone; got {_describe(content)}."
    )


def _is_state(value: Any) -> bool:
    """Whether a value is a dictionary of tensors, and of some."""
    return isinstance(value, dict) and bool(value) and all(
        isinstance(key, str) and isinstance(leaf, pytorch().Tensor) for key, leaf in value.items())


def _copies(content: Any, wrapper: str | None) -> tuple[str, ...]:
    """Other entries of a checkpoint that hold the same network, such as its weights' average."""
    def shapes(state):
        names = torch_layouts.without(torch_layouts.prefix(state), state)
        return {name: tuple(value.shape) for name, value in names.items()
                if not name.endswith(COUNTER)}

    if wrapper is None:
        return ()
    own = shapes(content[wrapper])
    return tuple(name for name, value in content.items()
                 if name != wrapper and _is_state(value) and shapes(value) == own)


def copies(path: str | os.PathLike) -> tuple[str, ...]:
    """Entries of a PyTorch file that hold the network again, beside the one that is read.

    An average of weights (EMA) for one. `save` puts the new network into each of them, since
    whoever loads the file may prefer them.

    Args:
      path: as `load_state_dict` takes it; errors as there.

    Returns:
      Their names in the file.

    Example: `copies('checkpoint.pth')`, such as ``('state_dict_ema',)``.
    """
    content = read(path)
    return _copies(content, _unwrap(content)[1])


def _describe(content: Any) -> str:
    """A few words on what a file held."""
    if isinstance(content, dict):
        return f"a dictionary with keys {', '.join(map(str, list(content)[:8]))}"
    return type(content).__name__


def load_state_dict(path: str | os.PathLike) -> dict[str, Any]:
    """Reads the state_dict in a PyTorch file without running any code in it.

    Args:
      path: a .pth or .pt file: a state_dict, or a dictionary that holds one as ``net``,
        ``state_dict``, ``model`` or ``model_state_dict``, or a single one by another name; what
        wrappers put before all names is dropped, see `awm_jax.torch_layouts.prefix`.

    Returns:
      Names to tensors.

    Raises:
      FileNotFoundError: no such file.
      ValueError: a pickle that wants to run code, or no state_dict in it.
      OSError: damaged.

    Example: `load_state_dict('network.pth')['classifier.weight'].shape`.
    """
    state, _ = _unwrap(read(path))
    return torch_layouts.without(torch_layouts.prefix(state), state)


def replaced(content: Any, make: Callable[[dict[str, Any]], dict[str, Any]]) -> Any:
    """A checkpoint whose network, and every copy of it, is another one; the rest as it was.

    Args:
      content: from `read`.
      make: ``state_dict -> state_dict``, what comes in the place of one, prefixes apart.

    Returns:
      The new content; ``content`` itself is left alone.

    Raises:
      ValueError: no state_dict in it.

    Example: `write(path, replaced(read('suspect.pth'), lambda state: purified))`.
    """
    state, wrapper = _unwrap(content)

    def new(state):
        prefix = torch_layouts.prefix(state)
        tensors = make(torch_layouts.without(prefix, state))
        return {prefix + name: value for name, value in tensors.items()}

    if wrapper is None:
        return new(state)
    return {**content, **{name: new(content[name])
                          for name in (wrapper, *_copies(content, wrapper))}}


def write(path: pathlib.Path, content: Any) -> None:
    """`torch.save`, whole or not at all."""
    with whole_files.writing(path) as temporary:
        pytorch().save(content, temporary)
