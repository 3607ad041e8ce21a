"""What kind of file a network lies in, told by its content and never by its name."""

import pathlib
import zipfile

from awm_jax import checkpoint

LARGEST = 4 * 2**30  # bytes; the largest network here has 80 MB
_AS_FLAX = "Write its network as a Flax module and give that and the weights to Params.from_flax."
_TENSORFLOW = f"a TensorFlow graph. {_AS_FLAX}"
# How a file begins that is none of ours, and what to say of it.
_OTHERS = {
    b"version https://git-lfs": "a Git LFS pointer, not the file itself. Fetch that: git lfs pull.",
    b"\x89HDF\r\n\x1a\n": f"an HDF5 file, as Keras writes. {_AS_FLAX}",
    b"\x1f\x8b": "packed (gzip). Unpack it first.",
    b"\xfd7zXZ": "packed (xz). Unpack it first.",
    b"7z\xbc\xaf": "packed (7z). Unpack it first.",
    b"Rar!": "packed (RAR). Unpack it first.",
    b"GGUF": "a GGUF file of a language model. Only image classifiers are read.",
    b"\x08\x01\x12": _TENSORFLOW,
}


def kind(path: pathlib.Path) -> str:
    """The format of a network on disk.

    Args:
      path: a file or a directory.

    Returns:
      ``'pytorch'``, ``'safetensors'`` or ``'orbax'``: what it begins as; it may be damaged.

    Raises:
      FileNotFoundError: nothing there.
      ValueError: over 4 GiB, or another program's: the message says which and what to do.
      OSError: empty, or a directory that `awm_jax.checkpoint` did not write.

    Example:
      >>> kind(pathlib.Path('/nowhere.pth'))
      Traceback (most recent call last):
      ...
      FileNotFoundError: Expected a network at /nowhere.pth, found no file there.
    """
    if path.is_dir():
        _check_directory(path)
        return "orbax"
    if not path.is_file():
        raise FileNotFoundError(f"Expected a network at {path}, found no file there.")
    size = path.stat().st_size
    if size == 0:
        raise OSError(f"{path} is empty. Download or copy it again.")
    if size > LARGEST:
        raise ValueError(f"{path} has {size:,} bytes, expected 4 GiB or less: no image classifier "
                         "of ours is that large.")
    with path.open("rb") as file:
        start = file.read(512)
    # First, as the length of a header may begin like anything else: 19280 is "PK".
    if start[8:9] == b"{" and start[4:8] == bytes(4):
        return "safetensors"
    if other := _other(start):
        raise ValueError(f"{path} is {other}")
    if start[:2] == b"PK":
        _check_archive(path)
    elif start[:1] != b"\x80":
        raise ValueError(
            f"{path} is no network file known here: it begins with {start[:8]!r}. Expected a "
            "PyTorch file, a safetensors file or a directory of awm_jax.checkpoint."
        )
    return "pytorch"


def _other(start: bytes) -> str | None:
    """What a file of another program's is and what to do with it; None for any other."""
    start = start.ljust(3, b"\0")
    text = start.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text.startswith((b"<!doctype", b"<html", b"<?xml")):
        return "a web page, not a network. Download the file itself (its raw or download link)."
    if start[:1] == b"\x08" and 2 <= start[1] < 32 and start[2] in b"\x12\x1a\x22\x3a":
        return "an ONNX file. Save the state_dict of the PyTorch network that it was made from."
    if 0x80 < start[0] < 0x90 and 0xA0 < start[1] < 0xC0:  # a dictionary with a name first
        return ("a msgpack file, as Flax writes. Read it by flax.serialization.msgpack_restore and "
                "give that and its module to Params.from_flax.")
    if start[4:8] == b"TFL3":
        return f"a TensorFlow Lite file. {_AS_FLAX}"
    if start[257:262] == b"ustar":
        return "packed (tar). Unpack it first."
    if start[:1] == b"\x0a" and start[2:3] == b"\x0a":  # a list of nodes, each with a name first
        return _TENSORFLOW
    return next((what for magic, what in _OTHERS.items() if start.startswith(magic)), None)


def _check_directory(path: pathlib.Path) -> None:
    """OSError or ValueError unless a directory is a checkpoint of ours, and not too large."""
    if (path / "saved_model.pb").is_file():
        raise ValueError(f"{path} is {_TENSORFLOW}")
    if not checkpoint.exists(path):
        within = next((p for p in sorted(path.iterdir()) if checkpoint.exists(p)), None)
        if within is not None:
            raise OSError(f"{path} is no directory of awm_jax.checkpoint, one within it is. Give "
                          f"{within}.")
        inside = ", ".join(sorted(p.name for p in path.iterdir())[:5]) or "nothing"
        raise OSError(f"{path} is no directory of awm_jax.checkpoint (no awm_jax.json in it, but "
                      f"{inside}). Give the network's file itself.")
    size = sum(p.stat().st_size for p in path.rglob("*") if p.is_file())
    if size > LARGEST:
        raise ValueError(f"{path} has {size:,} bytes, expected 4 GiB or less.")


def _check_archive(path: pathlib.Path) -> None:
    """ValueError for a zip archive that is not PyTorch's, or that unpacks to more than 4 GiB."""
    try:
        with zipfile.ZipFile(path) as archive:
            records = archive.infolist()
    except Exception:  # zipfile raises many kinds; what is damaged is told by torch_compat
        return
    names = [record.filename for record in records]
    if any(name.endswith("/constants.pkl") or "/code/" in name for name in names):
        raise ValueError(f"{path} is a TorchScript program. Save its tensors alone: "
                         "torch.save(torch.jit.load(PATH).state_dict(), OTHER).")
    if any(name.endswith("model.weights.h5") for name in names):
        raise ValueError(f"{path} is a Keras file. {_AS_FLAX}")
    if not any(name.endswith("data.pkl") for name in names):
        raise ValueError(f"{path} is a zip archive without data.pkl, so not PyTorch's. If it holds "
                         "a network's file, unpack it first.")
    if sum(record.file_size for record in records) > LARGEST:
        raise ValueError(f"{path} unpacks to more than 4 GiB.")
