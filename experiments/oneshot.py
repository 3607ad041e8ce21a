"""Erase a backdoor from one clean image of each class, and measure it.

    python -m experiments.oneshot --dataset=gtsrb --data_dir DIR --attack all --seeds 5
    python -m experiments.oneshot --dataset=gtsrb --defence all --attack all

Every finished purification is kept in the run directory's results.json and not done again by a
second start; networks are cached and their training resumes.
"""

import pathlib
import sys
import time

from awm_jax import data
from awm_jax.data import Dataset
from awm_jax.defences import DEFENCES
from awm_jax.types import Arch
from experiments import cli, defending, presets, results, scene


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
    known = {field for name in names for field in vars(DEFENCES[name].default)}
    for field, _ in args.set or ():
        if field not in known:
            raise ValueError(f"Expected --set {field} to be a setting of a chosen defence; they "
                             f"are: {', '.join(sorted(known))}.")
    for name in names:
        defending.config(name, args, dataset)
    return names


class _Cells:
    """Counts finished cells and says how long the rest may take."""

    def __init__(self, total: int):
        self._total, self._left, self._spent, self._done = total, total, 0.0, 0

    def skip(self) -> None:
        """A cell of an earlier start."""
        self._left -= 1

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
    """The whole job; returns what results.json holds."""
    dataset = cli.load(args)
    scene.check(args, dataset, (args.samples,))
    defences = _defences(args, dataset)
    folder = args.out or pathlib.Path("runs") / f"oneshot-{dataset.name}-{args.arch}"
    path = folder / "results.json"
    cells = {} if args.fresh else results.read_cells(path, dataset.name, args.arch)
    shared = {**results.about(dataset), "arch": args.arch, "versions": results.versions(),
              "command": " ".join(["python -m experiments.oneshot", *sys.argv[1:]])}
    counted = _Cells(len(args.attack) * len(defences) * args.seeds)
    mine = []
    for attack in args.attack:
        on_stage = None
        for defence in defences:
            for seed in range(args.seeds):
                name = _cell_name(attack, defence, seed, args, dataset)
                mine.append(name)
                if name in cells:
                    counted.skip()
                    continue
                if on_stage is None:
                    on_stage = scene.make(attack, args, dataset,
                                          data.cache_directory() / "networks")
                    defending.show_attack(on_stage, folder)
                started = time.perf_counter()
                cells[name] = defending.defend(on_stage, defence, seed, args, folder)
                results.write_json(path, {**shared, "cells": cells})
                counted.finish(cells[name], time.perf_counter() - started)
    text = results.report([cells[c] for c in mine], dataset.num_classes)
    (folder / "table.md").write_text(text + "\n")
    print(f"\n{text}\n\nEverything is in {folder}/ (results.json, table.md, pictures, purified/).")
    return {**shared, "cells": {c: cells[c] for c in mine}}


def _cell_name(attack: str, defence: str, seed: int, args, dataset: Dataset) -> str:
    """Names a purification by all that decides it, so that a resumed run mixes nothing up."""
    epochs = args.epochs or presets.of(dataset).epochs
    network = args.checkpoint or f"e{epochs}-p{scene.rate(attack, args)}-s{args.network_seed}"
    trigger = "" if args.trigger is None else f"/{args.trigger.stem}-{args.trigger_mode}"
    target = "" if args.target is None else f"/t{args.target}"
    settings = f"{defence}-{defending.fingerprint(defence, args, dataset)}-{args.samples}"
    return f"{attack}{trigger}{target}/{network}/{settings}/{seed}"


def main(argv: list[str] | None = None) -> int:
    """Entry point; errors of the user's making end in one line and status 2."""
    args = cli.parser().parse_args(argv)
    return cli.run("experiments.oneshot", lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
