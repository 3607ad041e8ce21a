"""Networks and training state on disk, by Orbax; whole or not at all."""

import dataclasses
import json
import os
import pathlib
import shutil
import uuid
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from awm_jax.types import Arch, ForeignArch, Params

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
      FileExistsError: something is there and ``overwrite`` is False, or it is no checkpoint.
      ValueError: a foreign module's weights, whose code no checkpoint holds.

    Example: `save('runs/purified', purified.params, {'status': 'OK'})`.
    """
    ours_only(params.arch)
    save_tree(directory, {"weights": params.weights, "batch_stats": params.batch_stats},
              {"arch": dataclasses.asdict(params.arch), "metadata": metadata or {}},
              overwrite=overwrite)


def ours_only(arch: Arch) -> None:
    """ValueError for a foreign module: its numbers mean nothing without its owner's code.

    Example: `ours_only(Arch(name='small_vgg', num_classes=10))`.
    """
    if isinstance(arch, ForeignArch):
        raise ValueError(
            f"Expected one of this library's networks, got {arch.name}, whose code no file of ours "
            "can hold. Save the variables that params.to_flax() returns as you saved the "
            "module's own, and read them with Params.from_flax(module, variables, ...); of an NNX "
            "model with params.to_nnx(model) and Params.from_nnx(model, ...)."
        )


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
        weights, stats = jax.tree.map(jnp.asarray, (tree["weights"], tree["batch_stats"] or {}))
        return Params(weights, stats, Arch(**fields)), sidecar["metadata"]
    except (KeyError, TypeError, AttributeError) as error:
        raise OSError(f"{directory} holds no network: {error!r} is missing or wrong.") from error


def save_tree(directory: Path, tree: Any, metadata: dict[str, Any] | None = None, *,
              overwrite: bool = False) -> None:
    """Writes any tree of arrays, such as a training state; arguments as `save`."""
    target = pathlib.Path(directory).absolute()
    if target.exists() and not overwrite:
        raise FileExistsError(
            f"Expected {target} to be free, there is something. Choose another directory or pass "
            "overwrite=True."
        )
    if target.exists() and not exists(target):  # somebody's other files
        raise FileExistsError(
            f"Expected {target} to be free or a checkpoint (no {_SIDECAR} in it); anything else is "
            "never overwritten. Choose another directory."
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}-{uuid.uuid4().hex}")
    temporary.mkdir()
    try:
        with _checkpointer() as checkpointer:
            checkpointer.save(temporary / "tree", jax.tree.map(_writable, tree))
        (temporary / _SIDECAR).write_text(json.dumps(metadata or {}))
        _replace(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def load_tree(directory: Path, like: Any) -> Any:
    """Reads a tree that `save_tree` wrote into the structure of ``like``.

    Args:
      directory: as `save_tree` wrote it.
      like: a tree of the same structure, whose arrays have the same shapes.

    Returns:
      The tree, of arrays.

    Raises:
      FileNotFoundError: nothing there.
      OSError: damaged, or of another structure or other shapes.

    Example: `state = load_tree('runs/state', training.init(key, arch, config, num_images))`.
    """
    # Numbers in place of arrays: Orbax compares leaves with == when it describes a mismatch.
    tree, _ = _restore(directory, jax.tree.map(lambda leaf: 0, like))
    wrong = [
        f"{jax.tree_util.keystr(path)} {np.shape(found)} instead of {np.shape(wanted)}"
        for (path, found), wanted in zip(jax.tree_util.tree_leaves_with_path(tree),
                                         jax.tree.leaves(like), strict=True)
        if np.shape(found) != np.shape(wanted)
    ]
    if wrong:
        raise OSError(f"{directory} holds arrays of other shapes: {', '.join(wrong)}.")
    return tree


def metadata(directory: Path) -> dict[str, Any]:
    """What `save_tree` was given beside the tree, without reading that.

    Of a network, from `save`: ``{'arch': ..., 'metadata': ...}``.

    Args:
      directory: as `save_tree` or `save` wrote it.

    Returns:
      The metadata.

    Raises:
      FileNotFoundError: nothing there.

    Example: `metadata('runs/state')['done']`.
    """
    return json.loads((pathlib.Path(directory) / _SIDECAR).read_text())


def remove(directory: Path) -> None:
    """Deletes a checkpoint; anything else that may be there is left alone.

    Example: `remove('runs/state')`.
    """
    if exists(directory):
        shutil.rmtree(directory)


def _writable(leaf: Any) -> Any:
    """A leaf as Orbax writes it: of several processes' NumPy arrays it takes the first one's only.

    To Orbax the array is one that all processes hold; it looks at none but this one's copy.
    """
    if jax.process_count() == 1:
        return np.asarray(leaf)
    first = tuple({d.process_index: d for d in reversed(jax.devices())}.values())
    everywhere = jax.NamedSharding(jax.make_mesh((len(first),), ("all",), devices=first), jax.P())
    return jax.make_array_from_callback(np.shape(leaf), everywhere, lambda _: np.asarray(leaf))


def _checkpointer() -> Any:
    """Orbax's, for this process alone: several that belong together write different files."""
    import orbax.checkpoint as ocp

    if jax.process_count() == 1:
        return ocp.PyTreeCheckpointer()
    mine = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(primary_host=mine, active_processes={mine},
                                               barrier_sync_key_prefix=f"process{mine}")
    handlers = ocp.type_handlers.create_type_handler_registry(
        (jax.Array, ocp.type_handlers.ArrayHandler(
            primary_host=mine, replica_id=None, use_replica_parallel=False)),
        (np.ndarray, ocp.type_handlers.NumpyHandler()), (int, ocp.type_handlers.ScalarHandler()))
    return ocp.Checkpointer(
        ocp.PyTreeCheckpointHandler(multiprocessing_options=alone, type_handler_registry=handlers),
        multiprocessing_options=alone)


def _replace(temporary: pathlib.Path, target: pathlib.Path) -> None:
    """Puts a finished directory in place of an old one, which goes last."""
    old = temporary.with_name(f"{temporary.name}-old")
    if target.exists():
        os.replace(target, old)
    try:
        os.replace(temporary, target)
    except BaseException:
        if old.exists():
            os.replace(old, target)
        raise
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
        with _checkpointer() as checkpointer:
            shape = like
            if like is None:
                shape = checkpointer.metadata(target / "tree").item_metadata.tree
            # Told the kind, Orbax does not ask which devices of which process wrote the file.
            kinds = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), shape)
            tree = checkpointer.restore(target / "tree", item=like, restore_args=kinds)
    except Exception as error:  # Orbax raises many kinds for a damaged directory
        raise OSError(f"{target} is damaged or holds another structure: {error}") from error
    return tree, sidecar
