"""Erase a backdoor from one clean image of each class, and measure it.

    python -m experiments.oneshot --dataset=gtsrb --data_dir DIR --attack all --seeds 5
    python -m experiments.oneshot --dataset=gtsrb --defence all --attack all

Every finished purification is kept in the run directory's results.json and not done again by a
second start; networks are cached and their training resumes. On a GPU, a TPU or several devices
attacks, seeds and settings share a program (--sweep, docs/sweeps.md).
"""

import argparse
import dataclasses
import functools
import itertools
import pathlib
import sys
import time
from collections.abc import Callable
from typing import Any

from awm_jax import metrics, validate
from awm_jax.data import Dataset
from awm_jax.defences import DEFENCES
from awm_jax.types import Arch
from experiments import cli, defending, half_done, hosts, networks, results, scene, sweeping
from experiments.sweeping import Cell


def _unfit(name: str, args, arch: Arch) -> str | None:
    """Why a defence cannot work here, or None."""
    if args.checkpoint is not None and DEFENCES[name].needs == "training":
        return ("Expected a network trained here: the poisoned training set of a --checkpoint is "
                "not known.")
    try:
        DEFENCES[name].fits(arch)
    except ValueError as error:
        return str(error)
    return None


def _defences(args, dataset: Dataset) -> tuple[str, ...]:
    """The defences of this run, their settings checked.

    Those that cannot work on this network are left out of several and refused alone.
    """
    arch = scene.arch_of(args, dataset)
    out = {name: reason for name in args.defence if (reason := _unfit(name, args, arch))}
    names = tuple(name for name in args.defence if name not in out)
    said = "\n".join(f"Left out {name}: {reason}" for name, reason in out.items())
    if not names:
        raise ValueError(f"No defence is left. {said}")
    if said:
        print(said, flush=True)
    defending.check_set(names, [*(args.set or ()), *(args.grid or ())])
    for name in names:
        for variant in _variants(name, args):
            defending.config(name, variant, dataset)
    return names


def _variants(name: str, args) -> list[argparse.Namespace]:
    """The options once for each point of the defence's ``--grid``."""
    fields = vars(DEFENCES[name].default)
    axes = [[(field, value) for value in values] for field, values in args.grid or ()
            if field in fields]
    return [argparse.Namespace(**{
        **vars(args), "set": [*(args.set or ()), *point],
        "variant": ",".join(f"{field}={value}" for field, value in point)})
        for point in itertools.product(*axes)]


def _check(args) -> None:
    """ValueError for options of which one would silently win."""
    both = {name for name, _ in args.set or ()} & {name for name, _ in args.grid or ()}
    if both:
        raise ValueError(f"Expected {', '.join(sorted(both))} in --set or in --grid, not in both.")
    if args.first_seed >= args.seeds:
        raise ValueError(f"Expected --first_seed={args.first_seed} below --seeds={args.seeds}.")
    if args.chunk is not None and args.sweep == "off":
        raise ValueError(f"Expected no --chunk={args.chunk} beside --sweep off: purifications are "
                         "done one by one.")


class _Cells:
    """Counts finished cells and says how long the rest may take."""

    def __init__(self, total: int, left: int):
        self._total, self._left, self._spent, self._done = total, left, 0.0, 0

    def finish(self, cell: dict, seconds: float) -> None:
        """One line a cell, with its figures."""
        self._left, self._done, self._spent = self._left - 1, self._done + 1, self._spent + seconds
        rest = self._left * self._spent / self._done / 60
        before, after = cell["before"], cell["after"]
        print(f"[{self._total - self._left}/{self._total}] {cell['attack']}, {cell['defence']}, "
              f"seed {cell['seed']}: ACC {before['acc']:.1f} -> {after['acc']:.1f}, "
              f"ASR {before['asr']:.1f} -> {after['asr']:.1f}, {cell['seconds']:.0f} s; "
              f"about {rest:.0f} min left", flush=True)


def run(args) -> dict:
    """The whole job; returns what results.json holds, of one of several hosts its own."""
    hosts.join(args)
    _check(args)
    dataset = cli.load(args)
    scene.check(args, dataset, (args.samples,))
    names = _defences(args, dataset)
    every = [Cell(attack, name, seed, variant, _cell_name(attack, name, seed, variant, dataset))
             for attack in args.attack for name in names for variant in _variants(name, args)
             for seed in range(args.first_seed, args.seeds)]
    folder = args.out or pathlib.Path("runs") / f"oneshot-{dataset.name}-{args.arch}"
    validate.writable(folder / "results.json")  # not after hours of training
    book = _Book(folder, args, dataset)
    mine = hosts.share(every)
    todo = [cell for cell in mine if cell.name not in book.known]
    sweeps = sweeping.wanted(args.sweep)
    stage = _stage(args, dataset, folder, book, keep=sweeps)
    _train(args.attack, [cell for cell in every if cell.name not in book.known], args, dataset)
    _work(todo, stage, folder, book, _Cells(len(mine), len(todo)), args.chunk if sweeps else 0)
    hosts.wait("done")
    book.read()
    done = {cell.name: book.known[cell.name] for cell in every if cell.name in book.known}
    if hosts.first():
        text = results.report(list(done.values()), dataset.num_classes)
        (folder / "table.md").write_text(text + "\n")
        print(f"\n{text}\n\nEverything is in {folder}/ ({book.path.name}, table.md, pictures, "
              "purified/).")
    return {**book.about, "cells": done}


class _Book:
    """Finished cells: of this host, written by it, and of all."""

    def __init__(self, folder: pathlib.Path, args, dataset: Dataset):
        self._folder, self._kind = folder, (dataset.name, args.arch)
        self.path = hosts.results_file(folder)
        self.about = {**results.about(dataset), "arch": args.arch, "versions": results.versions(),
                      "command": " ".join(["python -m experiments.oneshot", *sys.argv[1:]])}
        if args.fresh and hosts.first():
            for path in hosts.results_files(folder):
                results.set_aside(path)
            half_done.clear(folder / "sweep")
        hosts.wait("fresh")
        self._mine: dict[str, dict] = results.read_cells(self.path, *self._kind)
        self.read()
        hosts.wait("read")

    def read(self) -> None:
        """Finds what is there by now, of every host."""
        self.known: dict[str, dict] = {}
        for path in hosts.results_files(self._folder):
            self.known = {**results.read_cells(path, *self._kind), **self.known}

    def before(self, network: str) -> metrics.Scores | None:
        """The scores of a suspect network, from any purification of it."""
        for name, cell in self.known.items():
            found = cell["before"]
            if name.rpartition("/")[0].rpartition("/")[0] == network and (
                    set(found) == set(metrics.Scores._fields)):
                return metrics.Scores(**{**found, "asr_parts": tuple(found["asr_parts"])})
        return None

    def add(self, cells: dict[str, dict]) -> None:
        """Writes finished cells, beside those that another run in the same folder wrote since."""
        self.known |= cells
        with results.locked(self.path):
            self._mine = {**results.read_cells(self.path, *self._kind), **self._mine, **cells}
            results.write_json(self.path, {**self.about, "cells": self._mine})


def _stage(args, dataset: Dataset, folder: pathlib.Path, book: _Book,
           keep: bool) -> Callable[[str], scene.Scene]:
    """Attacks to scenes, each made once; a sweep needs them together, a loop one at a time."""
    @functools.lru_cache(maxsize=None if keep else 1)
    def stage(attack: str) -> scene.Scene:
        on_stage = dataclasses.replace(
            scene.make(attack, args, dataset, networks.directory()),
            measured=book.before(scene.network_name(attack, args, dataset)))
        defending.show_attack(on_stage, folder)
        return on_stage

    return stage


def _train(attacks: tuple[str, ...], left: list[Cell], args, dataset: Dataset) -> None:
    """Of several hosts, each trains the networks of some attacks, and waits for the others."""
    if hosts.alone():
        return
    needed = {cell.attack for cell in left}
    for attack in hosts.turns(attacks):
        if attack in needed:
            scene.make(attack, args, dataset, networks.directory())
    hosts.wait("networks")


def _work(todo: list[Cell], stage: Callable[[str], scene.Scene], folder: pathlib.Path,
          book: _Book, counted: _Cells, chunk: int | None) -> None:
    """Purifies, one by one or (``chunk`` is not 0) together; what is finished is written."""
    groups: Any
    if chunk != 0:
        groups = sweeping.defend(todo, stage, chunk, folder)
    else:
        groups = (([cell], [defending.defend(stage(cell.attack), cell.defence, cell.seed,
                                             cell.args, folder)]) for cell in todo)
    started = time.perf_counter()
    for cells, found in groups:
        book.add({cell.name: one for cell, one in zip(cells, found, strict=True)})
        seconds = (time.perf_counter() - started) / len(cells)
        for one in found:
            counted.finish(one, seconds)
        started = time.perf_counter()


def _cell_name(attack: str, defence: str, seed: int, args, dataset: Dataset) -> str:
    """Names a purification by all that decides it, so that a resumed run mixes nothing up."""
    settings = f"{defending.fingerprint(defence, args, dataset)}-{args.samples}"
    title = defending.label(defence, args)
    return f"{scene.network_name(attack, args, dataset)}/{title}-{settings}/{seed}"


def main(argv: list[str] | None = None) -> int:
    """Entry point; errors of the user's making end in one line and status 2."""
    args = cli.parser().parse_args(argv)
    return cli.run("experiments.oneshot", lambda: run(args), stopped=(
        "Stopped. The same command without --fresh goes on from here." if args.fresh else
        cli.GOES_ON))


if __name__ == "__main__":
    sys.exit(main())
