"""A network file of somebody else's, in whichever format, and the same format back."""

import contextlib
import dataclasses
import json
import math
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from awm_jax import (
    checkpoint,
    file_kinds,
    models,
    torch_compat,
    torch_layouts,
    validate,
    whole_files,
)
from awm_jax.torch_layouts import LAYOUTS, Entry, entries
from awm_jax.types import Arch, Params

Path = str | os.PathLike
_SUFFIXES = {".pth": "pytorch", ".pt": "pytorch", ".safetensors": "safetensors", "": "orbax"}
_LONGEST = 600  # letters of a message: two networks can differ in hundreds of names
_LARGEST_SIDE = 512  # pixels, of an image whose size only the tensors tell
_DTYPES = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": jnp.bfloat16,
           "I64": np.int64, "I32": np.int32}


@dataclasses.dataclass(frozen=True)
class Source:
    """What was read, kept so that it can be written back alike.

    Args:
      path: the file or directory, absolute; `write` reads names, dtypes and what else is kept anew.
      kind: ``'pytorch'``, ``'safetensors'`` or ``'orbax'``.
      notes: what was told by what, or assumed, a line each.

    Example: `print(*source.notes, sep='\\n')`.
    """

    path: pathlib.Path
    kind: str
    notes: tuple[str, ...]


def read(path: Path, *, arch: str | None = None,
         image_size: tuple[int, int] | None = None) -> tuple[Params, Source]:
    """Reads a network; its format is told by its content, nothing in it is executed.

    Images are taken as not normalised where the file does not say (PyTorch, safetensors):
    put mean and scale into ``params.arch`` if the network expects them.

    Args:
      path: a PyTorch file, a safetensors file, or a directory of `awm_jax.checkpoint`; up to 4 GiB.
      arch: a key of `awm_jax.models.MODELS`, or None to tell by the tensors' names.
      image_size: ``(height, width)``, or None to tell by the tensors where they do (`fixed_size`)
        and to assume 32x32 elsewhere.

    Returns:
      ``(params, source)``.

    Raises:
      FileNotFoundError: nothing there.
      ValueError: another format, a network that is none of ours or not the one asked for, NaN or
        infinity, fewer than 2 classes, a pickle that wants to run code.
      OSError: damaged or empty.

    Example: `params, source = read('suspect.pth')`.
    """
    path = pathlib.Path(path)
    with _about(path):
        _check_wanted(arch, image_size)
        kind = file_kinds.kind(path)
        if kind == "orbax":
            params, notes = _from_checkpoint(path, arch, image_size)
        else:
            params, notes = _from_tensors(_tensors(path, kind), arch, image_size)
            if kind == "pytorch" and (copies := torch_compat.copies(path)):
                notes.append(f"the file has it again as {', '.join(copies)}, not looked at; a "
                             "purified .pth holds the purified network there too")
    return params, Source(path.absolute(), kind, (*notes,))


def write(path: Path, params: Params, source: Source, *, overwrite: bool = False) -> None:
    """Writes a network as its source was written, or in another format; whole or not at all.

    Names, order, dtypes and batch counters are the source's where it holds tensors; a PyTorch
    file's wrapper and its names' prefixes and a safetensors file's metadata go to the same format
    only. Copies of the network in a PyTorch file, such as its weights' average, are replaced too
    (`awm_jax.torch_compat.copies`). ``arch.mean`` and ``arch.std`` have a place in a directory
    alone.

    Args:
      path: what to write: ``.pth`` or ``.pt`` for PyTorch, ``.safetensors``, or no suffix for a
        directory of `awm_jax.checkpoint`.
      params: the network.
      source: from `read`; its file is read again and never overwritten.
      overwrite: replace a file (or checkpoint) that is there.

    Raises:
      ValueError: as `check_target`; another network than the source's, a foreign module, NaN, or
        a weight too large for the source's dtype.
      FileExistsError: as `check_target`, or a directory that is no checkpoint.
      OSError: the source is gone or the disk full.

    Example: `write('purified.pth', purified.params, source)`.
    """
    path = pathlib.Path(path)
    check_target(path, source.path, overwrite=overwrite)
    with _about(path):
        checkpoint.ours_only(params.arch)
    kind = _wanted(path)
    if kind == "orbax":
        with _about(path):
            kept = checkpoint.load(source.path)[1] if source.kind == "orbax" else {}
            checkpoint.save(path, params, kept, overwrite=overwrite)
        return
    template = None if source.kind == "orbax" else _tensors(source.path, source.kind)
    with _about(source.path):
        with np.errstate(over="ignore"):  # said below, with names
            arrays = torch_compat.arrays_from_params(params, template)
        _check_finite(arrays, "The network has them, or its numbers are too large for the file's "
                              "dtype: a directory keeps float32.")
    with _about(path):
        if kind == "safetensors":
            _write_safetensors(path, arrays, source)
        elif source.kind == "pytorch":
            torch_compat.save(path, params, source.path)
        else:
            torch_compat.save(path, params, template=template)


def check_target(path: Path, source_path: Path, *, overwrite: bool = False) -> None:
    """Whether `write` may write there: to be asked before the work whose result it is.

    Args:
      path: what is to be written.
      source_path: what the network is read from.
      overwrite: as in `write`.

    Raises:
      ValueError: another suffix, or the source itself, by whatever name.
      FileExistsError: something is there and ``overwrite`` is False, or it is of another format.
      OSError: as `validate.writable`.

    Example:
      >>> check_target('purified.onnx', 'suspect.pth')
      Traceback (most recent call last):
      ...
      ValueError: Expected a name ending in .pth (or .pt) for PyTorch, .safetensors, or without ...
    """
    path, source_path = pathlib.Path(path), pathlib.Path(source_path)
    with _about(path):
        kind = _wanted(path)
        target, kept = path.resolve(), source_path.resolve()
        same = target.exists() and kept.exists() and os.path.samefile(target, kept)
        if same or kept.is_relative_to(target) or target.is_relative_to(kept):
            raise ValueError(f"Expected {path} to be another place than {source_path}, which the "
                             "network is read from and which is kept. Choose another name.")
        if os.path.lexists(path) and not overwrite:
            raise FileExistsError(f"Expected {path} to be free, there is something. Choose another "
                                  "name (from Python, overwrite=True replaces it).")
        if path.is_dir() and kind != "orbax":
            raise FileExistsError(f"Expected {path} to be a file, it is a directory. Choose "
                                  "another name.")
    validate.writable(path)


def fixed_size(arch_name: str) -> bool:
    """Whether the tensors alone tell the image size; networks that pool globally take any.

    Args:
      arch_name: a key of `awm_jax.models.MODELS`.

    Returns:
      True for ``small_vgg``, ``mlp`` and ``cnn``.

    Raises:
      ValueError: an unknown name.

    Example:
      >>> fixed_size('small_vgg'), fixed_size('resnet18')
      (True, False)
    """
    validate.choice(models.MODELS, arch=arch_name)
    return arch_name not in LAYOUTS or _flat(arch_name, (32, 32, 3)) is not None


@contextlib.contextmanager
def _about(path: pathlib.Path) -> Iterator[None]:
    """Errors name the file and take one line."""
    try:
        yield
    except (ValueError, OSError) as error:
        text = " ".join(str(error).split())
        named = (f" at {path},", f"Expected {path} ", f"'{path}'")
        if not text.startswith(str(path)) and not any(name in text for name in named):
            text = f"{path}: {text}"
        if len(text) > _LONGEST:
            text = f"{text[:_LONGEST]}..."
        kinds = (FileNotFoundError, FileExistsError, OSError, ValueError)
        raise next(kind for kind in kinds if isinstance(error, kind))(text) from error


def _wanted(path: pathlib.Path) -> str:
    """The format that a name asks for; ValueError for a suffix of none."""
    suffix = path.suffix.lower()
    if suffix not in _SUFFIXES:
        raise ValueError(f"Expected a name ending in .pth (or .pt) for PyTorch, .safetensors, or "
                         f"without a suffix for a directory, got {path.name!r}.")
    return _SUFFIXES[suffix]


def _check_wanted(arch: str | None, image_size: tuple[int, int] | None) -> None:
    """ValueError for a name that no network has or a size that is none."""
    if arch is not None:
        validate.choice(models.MODELS, arch=arch)
    if image_size is not None:
        if len(image_size) != 2:
            raise ValueError(f"Expected {image_size=} to be (height, width).")
        validate.at_least(1, height=image_size[0], width=image_size[1])


def _tensors(path: pathlib.Path, kind: str) -> dict[str, np.ndarray]:
    """A file's tensors, prefixes of wrappers dropped; bfloat16 and float16 as they are."""
    with _about(path):
        if kind == "pytorch":
            found = torch_compat.arrays_from_state_dict(torch_compat.load_state_dict(path))
        else:
            found = _read_safetensors(path)[0]
            found = torch_layouts.without(torch_layouts.prefix(found), found)
        for name, value in found.items():
            floats = jnp.issubdtype(value.dtype, jnp.floating) and value.dtype.itemsize > 1
            if not floats and not name.endswith("num_batches_tracked"):
                raise ValueError(f"Expected tensors of 16, 32 or 64-bit floats, {name} is "
                                 f"{value.dtype}. Save the network before it is quantised.")
        return found


def _read_safetensors(path: pathlib.Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Tensors and metadata, without PyTorch."""
    import safetensors

    data = path.read_bytes()
    try:
        found = safetensors.deserialize(data)
        end = 8 + int.from_bytes(data[:8], "little")
        metadata = json.loads(data[8:end]).get("__metadata__") or {}
    except Exception as error:  # the package's own kind, which is no OSError
        raise OSError(f"{path} is no whole safetensors file: {error}") from error
    if unknown := sorted({str(view["dtype"]) for _, view in found} - set(_DTYPES)):
        raise ValueError(f"Expected tensors of {', '.join(_DTYPES)}, got {', '.join(unknown)}.")
    return {name: np.frombuffer(view["data"], _DTYPES[view["dtype"]]).reshape(view["shape"])
            for name, view in found}, metadata


def _write_safetensors(path: pathlib.Path, arrays: dict[str, np.ndarray], source: Source) -> None:
    """Writes tensors, with the metadata and prefixes of a source of the same format."""
    import safetensors.numpy

    metadata = {"format": "pt"}  # what PyTorch's readers look for
    if source.kind == "safetensors":
        theirs, metadata = _read_safetensors(source.path)
        prefix = torch_layouts.prefix(theirs)
        arrays = {prefix + name: value for name, value in arrays.items()}
    with whole_files.writing(path) as temporary:
        temporary.write_bytes(safetensors.numpy.save(arrays, metadata or None))


def _check_finite(arrays: Mapping[str, np.ndarray], advice: str) -> None:
    """ValueError for NaN or infinity, also where float32 is too small for a number."""
    with np.errstate(over="ignore"):
        wrong = [name for name, value in arrays.items()
                 if not np.isfinite(np.asarray(value, np.float32)).all()]
    if wrong:
        more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise ValueError(f"Expected finite numbers, found NaN or infinity in "
                         f"{', '.join(wrong[:5])}{more}. {advice}")


def _from_checkpoint(path: pathlib.Path, arch: str | None,
                     image_size: tuple[int, int] | None) -> tuple[Params, list[str]]:
    """A network from a directory, which says all about itself."""
    params, _ = checkpoint.load(path)
    found = params.arch
    models.check(found)
    if arch not in (None, found.name):
        raise ValueError(f"It holds a {found.name}, not the {arch} asked for.")
    theirs = _by_path(params)
    ours = _by_path(jax.eval_shape(lambda key: models.create(key, found), jax.random.key(0)))
    wrong = [name for name in {**ours, **theirs} if name not in ours or name not in theirs
             or ours[name].shape != theirs[name].shape]
    if wrong:
        raise ValueError(f"It holds no whole {found.name}: {', '.join(wrong[:5])} missing, "
                         "unexpected or of another shape.")
    _check_finite(theirs, "Take an earlier checkpoint.")
    kept, note = _resized(found, image_size)
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), params)
    return dataclasses.replace(params, arch=kept), [
        f"architecture {found.name}, told by the checkpoint", note,
        f"{found.num_classes} classes, told by the checkpoint"]


def _resized(arch: Arch, image_size: tuple[int, int] | None) -> tuple[Arch, str]:
    """A checkpoint's architecture for images of the size asked for, and how that is known."""
    own = "x".join(map(str, arch.image_shape[:2]))
    if image_size is None or tuple(image_size) == arch.image_shape[:2]:
        return arch, f"image size {own}, told by the checkpoint"
    height, width = image_size
    if fixed_size(arch.name):
        raise ValueError(f"Its images are {own}, not {height}x{width} as asked for. Leave "
                         "image_size out.")
    arch = dataclasses.replace(arch, image_shape=(height, width, arch.image_shape[2]))
    models.check(arch)
    return arch, f"image size {height}x{width}, as asked for (the checkpoint says {own})"


def _by_path(params: Params) -> dict[str, Any]:
    """A network's arrays by slash-joined path."""
    tree = {"weights": params.weights, "batch_stats": params.batch_stats}
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf
            for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _from_tensors(state: Mapping[str, np.ndarray], arch: str | None,
                  image_size: tuple[int, int] | None) -> tuple[Params, list[str]]:
    """A network from tensors, and how each thing about it is known."""
    name = arch or torch_compat.detect(state)
    how = "as asked for" if arch else "told by its tensors' names"
    notes = [f"architecture {name}, {how}"]
    shape, how = _image_shape(name, state, image_size)
    notes.append(f"image size {shape[0]}x{shape[1]}, {how}")
    last = next(e for e in entries(Arch(name=name, num_classes=2, image_shape=shape), state)
                if e.path == ("weights", "dense", "kernel"))
    classes = state[last.name].shape[:1] if last.name in state else ()
    if classes and classes[0] < 2:
        raise ValueError(f"Expected 2 classes or more, {last.name} has {classes[0]}. A network "
                         "with one output needs a second one (logits 0 and z).")
    params = torch_compat.params_from_state_dict(state, name, shape)
    notes.append(f"{params.arch.num_classes} classes, told by {last.name}")
    halves = sorted({str(v.dtype) for v in state.values() if v.dtype.itemsize == 2})
    notes += [f"{kind} tensors, read as float32" for kind in halves]
    _check_finite(state, "Take an earlier checkpoint.")
    return params, notes


def _flat(name: str, shape: tuple[int, int, int]) -> Entry | None:
    """The tensor whose shape the image size decides, if there is one."""
    arch = Arch(name=name, num_classes=2, image_shape=shape)
    return next((entry for entry in entries(arch) if entry.kind == "flat"), None)


def _image_shape(name: str, state: Mapping[str, Any], image_size: tuple[int, int] | None
                 ) -> tuple[tuple[int, int, int], str]:
    """Height, width and channels of the images, and how they are known."""
    kernels = [state[e.name].shape[1] for e in entries(Arch(name=name, num_classes=2), state)
               if e.kind == "conv" and e.name in state and state[e.name].ndim == 4]
    channels = kernels[:1] or [3, 1]  # of a network without convolutions only the product is known
    height, width = image_size or (32, 32)
    flat = _flat(name, (32, 32, 3))
    if flat is None or flat.name not in state or state[flat.name].ndim != 2:
        return (height, width, channels[0]), "as asked for" if image_size else (
            "assumed: its tensors do not tell")
    inputs = state[flat.name].shape[1]

    def fits(shape):
        entry = _flat(name, shape)
        return entry is not None and min(entry.grid) > 0 and math.prod(entry.grid) == inputs

    squares = [(n, n, c) for c in channels for n in range(8, _LARGEST_SIDE + 1) if fits((n, n, c))]
    # Of several, the one that people use: 32, not 33, which is pooled to the same size.
    square = min(squares, key=lambda shape: (shape[0] % 8 != 0, shape), default=None)
    if image_size is None and square is not None:
        return square, "told by the classifier's inputs"
    told = "no square image gives" if square is None else (
        f"images of {square[0]}x{square[1]} give")
    if image_size is None:
        raise ValueError(f"{flat.name} takes {inputs} inputs, which {told}. Say the image size: "
                         "image_size=(height, width).")
    for channel in channels:
        if fits((height, width, channel)):
            return (height, width, channel), "as asked for, and as the classifier's inputs tell"
    raise ValueError(f"{flat.name} takes {inputs} inputs, which {told}, not the {height}x{width} "
                     "asked for. Leave image_size out, or give the network's own.")
