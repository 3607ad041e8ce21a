"""PyTorch files: read without running anything in them, written by way of a temporary name."""

import os
import pathlib
import pickle
import re
import zipfile
from collections.abc import Callable
from typing import Any

from awm_jax import torch_layouts

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
        with path.open("rb") as file:  # by its name, PyTorch might take it for safetensors
            return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL ([\w.]+)", str(error))
        raise ValueError(
            f"{path} was refused: it is damaged or holds more than tensors"
            f"{f' ({named[1]})' if named else ''}, and loading that could run code of its "
            "author's. Save the state_dict alone (torch.save(net.state_dict(), PATH)) where you "
            "trust it."
        ) from error
    except Exception as error:  # Python and PyTorch raise many kinds for a damaged file
        raise OSError(f"{path} is no whole PyTorch file: {in_one_line(error)}") from error


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
    torch = pytorch()
    for name in (None, *_WRAPPERS):
        inner = content if name is None else content.get(name)
        if isinstance(inner, dict) and inner and all(
                isinstance(key, str) and isinstance(value, torch.Tensor)
                for key, value in inner.items()):
            return inner, name
        if not isinstance(content, dict):
            break
    raise ValueError(
        "Expected a state_dict or a dictionary with one under "
        f"{', '.join(map(repr, _WRAPPERS))}; got {_describe(content)}."
    )


def _copies(content: Any, wrapper: str | None) -> tuple[str, ...]:
    """Other entries of a checkpoint that hold the same network, such as its weights' average."""
    def shapes(state):
        names = torch_layouts.without(torch_layouts.prefix(state), state)
        return {name: tuple(value.shape) for name, value in names.items()
                if not name.endswith(COUNTER)}

    if wrapper is None:
        return ()
    torch, own = pytorch(), shapes(content[wrapper])
    return tuple(
        name for name, value in content.items()
        if name != wrapper and isinstance(value, dict) and value
        and all(isinstance(k, str) and isinstance(v, torch.Tensor) for k, v in value.items())
        and shapes(value) == own)


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
        ``state_dict``, ``model`` or ``model_state_dict``; what wrappers put before all
        names is dropped, see `awm_jax.torch_layouts.prefix`.

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
    """`torch.save` under a temporary name that is then renamed; makes the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        pytorch().save(content, temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
