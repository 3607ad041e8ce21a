"""One function over many rows: as many at a time as fit, on every device, as one program.

What runs is always a program of ``chunk`` rows on each device, called again until no row is left.
A row's arithmetic therefore depends on the chunk: not on how many rows there are, which ones keep
it company or in which order; nor on how many devices they are spread, from two on. For one device
XLA runs fewer passes than for several (no partitioner, which also merges what is computed twice),
so that between one and several the last bit may differ.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

Tree = Any
_USED = 0.9  # share of the free memory that a program may take: the rest is lost between buffers


@dataclasses.dataclass(frozen=True)
class Program:
    """A function compiled for so many rows at a time.

    Args:
      chunk: rows at a time on each device.
      devices: where they run.
      why: how the chunk was chosen, one line.
      compiled: ``(rows [chunk * devices], shared) -> tree [chunk * devices]``.
      mesh: the devices in a row.
    """

    chunk: int
    devices: tuple[jax.Device, ...]
    why: str
    compiled: Callable[..., Tree] = dataclasses.field(repr=False)
    mesh: jax.sharding.Mesh = dataclasses.field(repr=False)

    @property
    def size(self) -> int:
        """Rows a call."""
        return self.chunk * len(self.devices)

    def place(self, shared: Tree) -> Tree:
        """What all rows share, copied to every device once."""
        return jax.device_put(shared, NamedSharding(self.mesh, PartitionSpec()))

    def call(self, rows: Tree, shared: Tree) -> Tree:
        """The results of at most ``size`` rows, on the host.

        Args:
          rows: a tree of arrays ``[R, ...]``, 1 <= R <= ``size``; the places left over do the first
            row again.
          shared: from `place`.

        Returns:
          A tree of NumPy arrays ``[R, ...]``.
        """
        count = length(rows)
        order = np.arange(self.size)
        padded = take(rows, np.where(order < count, order, 0))
        placed = jax.device_put(padded, NamedSharding(self.mesh, PartitionSpec("rows")))
        return jax.tree.map(lambda leaf: leaf[:count], jax.device_get(self.compiled(placed,
                                                                                    shared)))

    def groups(self, count: int) -> Iterator[np.ndarray]:
        """Indices of ``count`` rows, call by call."""
        for start in range(0, count, self.size):
            yield np.arange(start, min(start + self.size, count))


def length(rows: Tree) -> int:
    """How many rows a tree of arrays ``[R, ...]`` has.

    Raises:
      ValueError: no array, no row, or arrays that differ in it.

    Example:
      >>> length({'a': np.zeros((3, 2)), 'b': np.zeros(3)})
      3
    """
    counts = {leaf.shape[0] if leaf.ndim else None for leaf in jax.tree.leaves(rows)}
    if len(counts) != 1 or not (count := counts.pop()):
        raise ValueError(f"Expected arrays with as many rows each, one at least; got "
                         f"{[leaf.shape for leaf in jax.tree.leaves(rows)]}.")
    return count


def take(rows: Tree, picks: Any) -> Tree:
    """Some of the rows, or with a number one of them.

    Example:
      >>> take({'a': np.arange(5)}, np.array([3, 1]))['a'].tolist()
      [3, 1]
    """
    return jax.tree.map(lambda leaf: leaf[picks], rows)


def free_memory(device: jax.Device) -> int | None:
    """Bytes still free on a device; None where that does not tell (a CPU does not).

    Example: `free_memory(jax.devices()[0])`.
    """
    stats = device.memory_stats() or {}
    if "bytes_limit" not in stats:
        return None
    return stats["bytes_limit"] - stats.get("bytes_in_use", 0)


def over_rows(fun: Callable[..., Tree], rows: Tree, shared: Sequence[Tree] = (), *,
              chunk: int | None = None, devices: Sequence[jax.Device] | None = None) -> Tree:
    """``[fun(row, *shared) for row in rows]``, many rows at a time, on every device.

    Args:
      fun: pure and traceable; the same object again is not compiled again.
      rows: a tree of arrays ``[R, ...]``, PRNG keys too, R >= 1.
      shared: what every row is given besides, copied to every device.
      chunk: rows at a time on each device, >= 1; by default as many as fit, on a CPU one. With the
        same chunk the same row gives the same bits, whatever else is run (but see above).
      devices: where; by default all of this process.

    Returns:
      A tree of NumPy arrays ``[R, ...]``.

    Raises:
      ValueError: rows of different numbers, or one that does not fit alone.

    Example:
      >>> over_rows(lambda row, a: a * row['x'], {'x': np.arange(3.)}, (2.,)).tolist()
      [0.0, 2.0, 4.0]
    """
    program = prepare(fun, rows, shared, chunk=chunk, devices=devices)
    placed = program.place(tuple(shared))
    found = [program.call(take(rows, picks), placed) for picks in program.groups(length(rows))]
    return jax.tree.map(lambda *leaves: np.concatenate(leaves), *found)


def prepare(fun: Callable[..., Tree], rows: Tree, shared: Sequence[Tree] = (), *,
            chunk: int | None = None, most: int | None = None,
            devices: Sequence[jax.Device] | None = None) -> Program:
    """The program that `over_rows` runs, for what calls it with rows of its own making.

    Args:
      fun, rows, shared, chunk, devices: as `over_rows`; of the arrays only the shapes matter, and
        `jax.ShapeDtypeStruct` will do.
      most: no larger chunk than this, where it is chosen here.

    Returns:
      `Program`.

    Raises:
      ValueError: as `over_rows`.

    Example: `prepare(fun, rows).why`.
    """
    devices = tuple(jax.local_devices() if devices is None else devices)
    count = length(rows)
    mine = -(-count // len(devices))  # rows a device
    shapes = _shapes((take_shape(rows), tuple(shared)))
    if chunk is not None:
        if chunk < 1:
            raise ValueError(f"Expected chunk={chunk} >= 1.")
        why = "as asked for"
        return _program(fun, shapes, chunk, devices, _told(count, devices, chunk, why))
    told = [free_memory(device) for device in devices]
    free = [room for room in told if room is not None]
    if len(free) < len(told):
        why = ("on a CPU several at a time are no faster" if devices[0].platform == "cpu" else
               f"{devices[0].device_kind} does not tell its memory: name a chunk")
        return _program(fun, shapes, 1, devices, _told(count, devices, 1, why))
    chunk, why = _fitting(fun, shapes, devices, min(mine, most or mine),
                          int(_USED * min(free)))
    return _program(fun, shapes, chunk, devices, _told(count, devices, chunk, why))


def take_shape(rows: Tree) -> Tree:
    """Shape and type of one row of a tree of arrays, or of their shapes."""
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), rows)


def _fitting(fun, shapes: "_Shapes", devices, chunk: int, room: int) -> tuple[int, str]:
    """The largest chunk that fits and splits its rows evenly, and why it is that."""
    mine, first = chunk, None
    while True:
        needed = _needed(fun, shapes, chunk, devices)
        if needed is not None and needed <= room:
            why = f"{_bytes(needed)} of {_bytes(room)} usable"
            return chunk, why if first is None else f"{why}; {first}"
        said = "more than there is" if needed is None else _bytes(needed)
        if chunk == 1:
            raise ValueError(
                f"Expected one row to fit into the {_bytes(room)} usable on "
                f"{devices[0].device_kind}, it needs {said}. Take a device with more memory, or "
                "smaller batches.")
        first = first or f"{mine} at a time would need {said}"
        guess = chunk // 2 if needed is None else min(chunk - 1, chunk * room // needed)
        chunk = max(1, guess)
        chunk = -(-mine // -(-mine // chunk))  # the same number of calls, evenly filled


def _needed(fun, shapes: "_Shapes", chunk: int, devices) -> int | None:
    """Bytes a program takes on a device; None if the compiler already says that it is too large."""
    try:
        compiled, _ = _compiled(fun, shapes, chunk, devices)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return None
    used = compiled.memory_analysis()
    return (used.temp_size_in_bytes + used.output_size_in_bytes + used.argument_size_in_bytes
            + used.generated_code_size_in_bytes - used.alias_size_in_bytes)


def _bytes(count: int) -> str:
    """'3.2 GiB'."""
    step = min(3, max(0, int(math.log2(max(count, 1)) // 10)))
    return f"{count / 1024**step:.3g} {('B', 'KiB', 'MiB', 'GiB')[step]}"


def _told(count: int, devices, chunk: int, why: str) -> str:
    """What a run says of its plan."""
    where = devices[0].device_kind if len(devices) == 1 else (
        f"each of {len(devices)} devices ({devices[0].device_kind})")
    return f"{count} rows, {chunk} at a time on {where}: {why}"


@dataclasses.dataclass(frozen=True)
class _Shapes:
    """Shapes of a row and of what is shared; hashable."""

    leaves: tuple[jax.ShapeDtypeStruct, ...]
    tree: Any


def _shapes(tree: Tree) -> _Shapes:
    """`_Shapes` of ``(row, shared)``."""
    leaves, structure = jax.tree.flatten(tree)
    return _Shapes(tuple(leaf if isinstance(leaf, jax.ShapeDtypeStruct) else
                         jax.ShapeDtypeStruct(jnp.shape(leaf), jax.dtypes.result_type(leaf))
                         for leaf in leaves), structure)


def _program(fun, shapes: _Shapes, chunk: int, devices, why: str) -> Program:
    """`Program`, compiled now unless it was before."""
    return Program(chunk, devices, why, *_compiled(fun, shapes, chunk, devices))


@functools.lru_cache(maxsize=32)
def _compiled(fun, shapes: _Shapes, chunk: int, devices) -> tuple[Any, jax.sharding.Mesh]:
    """The compiled program and its mesh."""
    mesh = jax.make_mesh((len(devices),), ("rows",), devices=devices)

    def on_a_device(rows, shared):
        if chunk > 1:
            return jax.vmap(lambda row: fun(row, *shared))(rows)
        return jax.tree.map(lambda leaf: leaf[None], fun(take(rows, 0), *shared))

    spread, same = PartitionSpec("rows"), PartitionSpec()
    # What a function starts its loops from is the same on all devices, what it carries is not.
    whole = jax.shard_map(on_a_device, mesh=mesh, in_specs=(spread, same), out_specs=spread,
                          check_vma=False)
    row, shared = jax.tree.unflatten(shapes.tree, shapes.leaves)
    size = chunk * len(devices)

    def like(leaf, spec, *more):
        return jax.ShapeDtypeStruct((*more, *leaf.shape), leaf.dtype,
                                    sharding=NamedSharding(mesh, spec))

    rows = jax.tree.map(lambda leaf: like(leaf, spread, size), row)
    shared = jax.tree.map(lambda leaf: like(leaf, same), shared)
    return jax.jit(whole).lower(rows, shared).compile(), mesh
