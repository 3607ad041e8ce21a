"""Networks and training state on disk, by Orbax; whole or not at all."""

import dataclasses
import json
import os
import pathlib
import shutil
import tempfile
from typing import Any

import jax
import numpy as np

from awm_jax.types import Arch, Params

_SIDECAR = "awm_jax.json"
Path = str | os.PathLike


def exists(directory: Path) -> bool:
    """Whether a finished checkpoint is there.

    Example:
      >>> exists('/nowhere')
      False
    """
    return (pathlib.Path(directory) / _SIDECAR).is_file()


def save(directory: Path, params: Params, metadata: dict[str, Any] | None = None, *,
         overwrite: bool = False) -> None:
    """Writes a network.

    Args:
      directory: becomes the checkpoint; its parent is made if need be.
      params: the network.
      metadata: anything JSON holds, kept beside it.
      overwrite: replace a checkpoint that is there.

    Raises:
      FileExistsError: the directory exists and ``overwrite`` is False.

    Example: `save('runs/purified', purified.params, {'status': 'OK'})`.
    """
    save_tree(directory, {"weights": params.weights, "batch_stats": params.batch_stats},
              {"arch": dataclasses.asdict(params.arch), "metadata": metadata or {}},
              overwrite=overwrite)


def load(directory: Path) -> tuple[Params, dict[str, Any]]:
    """Reads a network and its metadata.

    Args:
      directory: as `save` wrote it.

    Returns:
      ``(params, metadata)``.

    Raises:
      FileNotFoundError: nothing there.
      OSError: damaged, or no network.

    Example: `params, metadata = load('runs/purified')`.
    """
    tree, sidecar = _restore(directory, None)
    try:
        fields: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in sidecar["arch"].items()}
        return (Params(tree["weights"], tree["batch_stats"] or {}, Arch(**fields)),
                sidecar["metadata"])
    except (KeyError, TypeError, AttributeError) as error:
        raise OSError(f"{directory} holds no network: {error!r} is missing or wrong.") from error


def save_tree(directory: Path, tree: Any, metadata: dict[str, Any] | None = None, *,
              overwrite: bool = False) -> None:
    """Writes any tree of arrays, such as a training state; arguments as `save`."""
    import orbax.checkpoint as ocp

    target = pathlib.Path(directory).absolute()
    if target.exists() and not overwrite:
        raise FileExistsError(
            f"Expected {target} to be free, there is something. Choose another directory or pass "
            "overwrite=True."
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = pathlib.Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}-"))
    try:
        with ocp.PyTreeCheckpointer() as checkpointer:
            checkpointer.save(temporary / "tree", jax.tree.map(np.asarray, tree))
        (temporary / _SIDECAR).write_text(json.dumps(metadata or {}))
        _replace(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def load_tree(directory: Path, like: Any) -> Any:
    """Reads a tree that `save_tree` wrote into the structure of ``like``.

    Raises:
      FileNotFoundError: nothing there.
      OSError: damaged, or of another structure.
    """
    return _restore(directory, like)[0]


def _replace(temporary: pathlib.Path, target: pathlib.Path) -> None:
    """Puts a finished directory in place of an old one, which goes last."""
    old = target.with_name(f".{target.name}-old-{os.getpid()}")
    if target.exists():
        os.replace(target, old)
    os.replace(temporary, target)
    shutil.rmtree(old, ignore_errors=True)


def _restore(directory: Path, like: Any) -> tuple[Any, dict[str, Any]]:
    """The tree and what lies beside it."""
    import orbax.checkpoint as ocp

    target = pathlib.Path(directory).absolute()
    if not exists(target):
        raise FileNotFoundError(
            f"Expected a checkpoint at {target}, found none (no {_SIDECAR}). Give the directory "
            "that awm_jax.checkpoint.save wrote."
        )
    try:
        sidecar = json.loads((target / _SIDECAR).read_text())
        with ocp.PyTreeCheckpointer() as checkpointer:
            tree = checkpointer.restore(target / "tree", item=like)
    except Exception as error:  # Orbax raises many kinds for a damaged directory
        raise OSError(f"{target} is damaged or of another kind: {error}") from error
    return tree, sidecar
