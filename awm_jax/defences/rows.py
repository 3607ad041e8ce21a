"""Many purifications as rows of one program: a network, clean images, a key and settings each."""

import functools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from awm_jax import sweep
from awm_jax.defences.base import Defence
from awm_jax.types import Batch, Params


class Row(NamedTuple):
    """One purification.

    Args:
      key: its PRNG key.
      network: which of `Stacked.networks`.
      batch: which of `Stacked.batches`.
      config: the defence's settings.
      name: says all that decides it; needed only where an interrupted sweep is to go on.
    """

    key: jax.Array
    network: int
    batch: int
    config: Any
    name: str = ""


class Stacked(NamedTuple):
    """Networks and clean images, each once, for rows to choose from.

    Args:
      networks: `Params` whose leaves have a leading axis ``[K]``.
      batches: images ``[B, n, H, W, C]`` and labels ``[B, n]``.
    """

    networks: Params
    batches: Batch

    def network(self, number: int) -> Params:
        """One of the networks."""
        return sweep.take(self.networks, number)


class Group(NamedTuple):
    """Rows that were run together.

    Args:
      rows: their numbers.
      found: what each would have returned alone: `Result`, or AWM's `Purified`.
      seconds: what they took together, without compiling.
      chunk: how many ran at a time on a device.
      devices: how many devices there were.
    """

    rows: np.ndarray
    found: list[Any]
    seconds: float
    chunk: int
    devices: int


def stack(defence: Defence, networks: Sequence[Params], batches: Sequence[Batch | None]) -> Stacked:
    """Checks networks and images as a call of the defence does, and stacks them.

    Args:
      defence: whose rows they are for.
      networks: of one architecture.
      batches: as many images each; ``[None]`` for a data-free defence.

    Returns:
      `Stacked`, on the host.

    Raises:
      ValueError: networks of several architectures, batches of several sizes, or what the defence
        refuses when it is called.

    Example: `stack(defences.ft, [params], [batch])`.
    """
    archs = {params.arch for params in networks}
    if len(archs) != 1:
        raise ValueError("Expected networks of one architecture, which one program is for; got "
                         + "; ".join(sorted(map(str, archs))) + ".")
    defence.fits(networks[0].arch)
    for params in networks[1:]:
        defence.checked(params, batches[0])
    checked = [defence.checked(networks[0], batch) for batch in batches]
    sizes = sorted({len(labels) for _, labels in checked})
    if len(sizes) != 1:
        raise ValueError(f"Expected as many images in each batch, which one program is for; got "
                         f"{sizes}.")
    trees = jax.device_get(list(networks))
    return Stacked(jax.tree.map(lambda *leaves: np.stack(leaves), *trees),
                   Batch(*(np.stack(part) for part in  # type: ignore[arg-type]  # on the host
                           zip(*jax.device_get(checked), strict=True))))


def tree_of(rows: Sequence[Row], own: Any = ()) -> dict[str, Any]:
    """Rows as a tree of arrays ``[R, ...]``; ``own`` is such a tree already."""
    return {"key": jnp.stack([row.key for row in rows]), "own": own,
            "network": np.array([row.network for row in rows], np.int32),
            "batch": np.array([row.batch for row in rows], np.int32)}


def supplies(row: Any, stacked: Stacked) -> tuple[Params, jax.Array, jax.Array]:
    """Network, images and labels of one row, on the device."""
    return (stacked.network(row["network"]), stacked.batches.images[row["batch"]],
            stacked.batches.labels[row["batch"]])


@functools.lru_cache(maxsize=32)
def _whole(defence: Defence, config: Any) -> Callable[..., Any]:
    """A defence as a function of a row; the same object for the same settings."""

    def whole(row, stacked):
        return defence.run(row["key"], *supplies(row, stacked), config)

    return whole


def run(defence: Defence, rows: Sequence[Row], stacked: Stacked, *, chunk: int | None = None,
        devices: Sequence[jax.Device] | None = None,
        tell: Callable[[str], None] = lambda text: None) -> Iterator[Group]:
    """Any registered defence over rows, from start to end in one program.

    Args:
      defence: whose.
      rows: of one config, as many as there are.
      stacked: from `stack`.
      chunk: rows at a time on each device; by default as many as fit, see `awm_jax.sweep`.
      devices: where; by default all of this process.
      tell: is given how the chunk was chosen, one line.

    Yields:
      `Group` after `Group`, in the rows' order, with `Result`s.

    Raises:
      ValueError: rows of several configs, or one that does not fit into memory.

    Example: `[group.found for group in run(ft, [Row(key, 0, 0, ft.default)], stacked)]`.
    """
    configs = {row.config for row in rows}
    if len(configs) != 1:
        raise ValueError(f"Expected rows of {defence.name} with one config, got {len(configs)}; "
                         "run the others by themselves.")
    tree = tree_of(rows)
    program = sweep.prepare(_whole(defence, configs.pop()), tree, (stacked,), chunk=chunk,
                            devices=devices)
    tell(program.why)
    placed = program.place((stacked,))
    for picks in program.groups(len(rows)):
        started = time.perf_counter()
        outcomes = program.call(sweep.take(tree, picks), placed)
        seconds = time.perf_counter() - started
        found = []
        for place, number in enumerate(picks):
            row = rows[number]
            found.append(defence.conclude(
                stacked.network(row.network), stacked.batches.images[row.batch],
                sweep.take(outcomes, place)))
        yield Group(picks, found, seconds, program.chunk, len(program.devices))
