"""Many cells of the tables at once: what differs in seed, attack and settings as one program."""

import dataclasses
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax

from awm_jax import sweep
from awm_jax.defences import DEFENCES, AWMConfig, awm_rows, rows
from awm_jax.defences.rows import Group, Row, Stacked
from awm_jax.progress import Progress, waiting
from experiments import defending, half_done
from experiments.scene import Scene


@dataclasses.dataclass(frozen=True)
class Cell:
    """One purification of the tables.

    Args:
      attack: a key of `awm_jax.attacks.ATTACKS`.
      defence: a key of `DEFENCES`.
      seed: decides the clean images and the defence's key.
      args: the command's options, with one value of each ``--grid`` among ``--set``.
      name: says all that decides it.
    """

    attack: str
    defence: str
    seed: int
    args: Any = dataclasses.field(repr=False)
    name: str


def wanted(choice: str) -> bool:
    """Whether to sweep: as told, or unless there is one CPU device alone."""
    if choice == "auto":
        return jax.default_backend() != "cpu" or jax.local_device_count() > 1
    return choice == "on"


def defend(cells: Sequence[Cell], stage: Callable[[str], Scene], chunk: int | None,
           folder: pathlib.Path) -> Iterator[tuple[list[Cell], list[dict]]]:
    """Purifies and measures all cells, those that share a program together.

    Args:
      cells: on one data set and architecture.
      stage: gives an attack's `Scene`.
      chunk: purifications at a time on each device; None for as many as fit.
      folder: the run directory, where an interrupted sweep also keeps its state, apart from other
        sweeps': `half_done.claimed`.

    Yields:
      Cells that were done together, and what results.json keeps of each.
    """
    bins: dict[Any, list[Cell]] = {}
    for cell in cells:
        bins.setdefault(_program(cell, stage(cell.attack)), []).append(cell)
    for mine in bins.values():
        yield from _one_program(mine, {cell.attack: stage(cell.attack) for cell in mine}, chunk,
                                folder)


def _program(cell: Cell, scene: Scene) -> tuple:
    """What cells of one program have in common."""
    defence, params = DEFENCES[cell.defence], scene.params
    config = defending.config(cell.defence, cell.args, scene.dataset)
    size: tuple = () if defence.needs == "nothing" else defending.data_of(
        scene, cell.defence, cell.seed, cell.args).images.shape
    if isinstance(config, AWMConfig):
        return "awm", params.arch, size, awm_rows.static(config.resolve(
            size[0], params.arch.image_shape))
    return cell.defence, params.arch, size, config


def _stacked(cells: Sequence[Cell], stages: dict[str, Scene]) -> tuple[list[Row], Stacked]:
    """The cells as rows: each network once, and each draw of clean images."""
    defence = DEFENCES[cells[0].defence]
    networks, batches, out = list(stages), {}, []
    for cell in cells:
        scene = stages[cell.attack]
        config = defending.config(cell.defence, cell.args, scene.dataset)
        # The training set goes with the attack, clean images with the seed.
        which: Any = {"nothing": None, "training": cell.attack}.get(defence.needs, cell.seed)
        if which not in batches:
            batches[which] = None if which is None else defending.data_of(
                scene, cell.defence, cell.seed, cell.args)
        out.append(Row(jax.random.key(cell.seed), networks.index(cell.attack),
                       list(batches).index(which), config, cell.name))
    params = [stages[attack].params for attack in networks]
    return out, rows.stack(defence, params, list(batches.values()))


def _one_program(cells: list[Cell], stages: dict[str, Scene], chunk: int | None,
                 folder: pathlib.Path) -> Iterator[tuple[list[Cell], list[dict]]]:
    """All cells of one program, group by group."""
    asked, stacked = _stacked(cells, stages)
    curves = {number: defending.no_curve() for number, cell in enumerate(cells) if cell.seed == 0}
    if isinstance(asked[0].config, AWMConfig):
        groups = _awm(cells, stages, asked, stacked, curves, chunk, folder)
    else:
        groups = _waited(cells[0].defence, rows.run(DEFENCES[cells[0].defence], asked, stacked,
                                                    chunk=chunk, tell=_tell))
    for group in groups:
        mine = [cells[number] for number in group.rows]
        yield mine, [
            {**defending.keep(stages[cell.attack], cell.defence, cell.seed, cell.args, folder,
                              found, group.seconds / len(mine), curves.get(number)),
             "together": {"rows": len(mine), "chunk": group.chunk, "devices": group.devices}}
            for cell, number, found in zip(mine, group.rows, group.found, strict=True)]


def _waited(name: str, groups: Iterator[Group]) -> Iterator[Group]:
    """The groups, saying how long each takes: a program tells nothing in between."""
    while True:
        with waiting(f"{name}, as many at once as fit"):
            group = next(groups, None)
        if group is None:
            return
        yield group


def _awm(cells: list[Cell], stages: dict[str, Scene], asked: list[Row], stacked: Stacked,
         curves: dict, chunk: int | None, folder: pathlib.Path) -> Iterator[Group]:
    """AWM, with its progress and the curves of seed 0 (from where an interrupted one goes on)."""
    progress: Progress | None = None

    def on_epochs(done, total, picks, state, latest):
        nonlocal progress
        if progress is None:
            progress = Progress(f"purifying {len(picks)} at once", total)
        for place, number in enumerate(picks):
            if number in curves:
                defending.watch(stages[cells[number].attack], sweep.take(state, place), done,
                                curves[number])
        progress.update(done, clean=latest["clean_loss"], triggered=latest["trigger_loss"],
                        mask=latest["mask_mean"])
        if done == total:
            progress = None

    with half_done.claimed(folder / "sweep", [cell.name for cell in cells]) as keep:
        yield from awm_rows.purify(asked, stacked, chunk=chunk, keep=keep, on_epochs=on_epochs,
                                   tell=_tell)


def _tell(text: str) -> None:
    """Says what was decided."""
    print(text, flush=True)
