"""Make the papers' tables and figures: what is missing, cheapest first, for as long as time allows.

    python -m experiments.tables --tables awm8 --gtsrb_dir DIR --budget 60
    python -m experiments.tables --tables ftsam2 --arch small_vgg --cifar10_dir DIR
    python -m experiments.report

Every purification is one of `experiments.oneshot`, kept when it is done; a second start goes on.
`experiments.report` renders what there is.
"""

import argparse
import contextlib
import json
import pathlib
import re
import sys
import time
from typing import Any

import numpy as np

from awm_jax import attacks, checkpoint, data, models
from awm_jax.command.options import OneLine
from awm_jax.data import Dataset
from awm_jax.defences import DEFENCES, AWMConfig
from experiments import cli, defending, networks, oneshot, presets, results, scene, table_cells
from experiments.table_cells import PLANS, USUAL, Cell

RUNS = pathlib.Path("runs/tables")

# Seconds one-shot on GTSRB, small VGG, 2 cores (docs/results/defences.md): only what orders the
# work until a cell of the same kind was timed here.
_SECONDS, _USUAL = {"clp": 1.0, "fst": 2.0, "ibau_official": 3.0, "nft": 5.0, "ibau": 5.0,
                    "nad": 6.0, "weight_norm": 8.0, "fp": 12.0, "ngd": 13.0, "mcr": 15.0,
                    "awm_official": 15.0, "ft_sam": 16.0, "ft": 16.0, "rnp": 26.0, "awm": 60.0,
                    "nc": 250.0, "sau": 185.0}, 85.0
_ONE_SHOT = 43  # images that these were timed with
# Guesses too: so many steps, or the whole training set, however many clean images there are.
_ANY_NUMBER = {"anp": 320.0, "swm": 320.0, "ac": 400.0, "abl": 6000.0}
# Seconds an epoch, until a network of the kind was trained here.
_TRAINING = {"gtsrb": 50.0, "cifar10": 145.0, "mnist": 150.0, "tiny_imagenet": 2000.0}
# Multiplications for an image, the small VGG's being 1: rounded counts, not times.
_HEAVIER = {"resnet18": 14.0, "preact_resnet18": 14.0, "vgg19_bn": 10.0, "mobilenet_v2": 2.5,
            "mlp": 0.1, "cnn": 0.1}
_DATASETS = ("gtsrb", "cifar10", "mnist", "tiny_imagenet")


def folder(cell: Cell, runs: pathlib.Path) -> pathlib.Path:
    """The run directory of a cell: one for each data set, network, and options of either kind.

    Args:
      cell: what is run.
      runs: the directory of all.

    Example:
      >>> cell = next(table_cells.cells(('awm8',), 1))
      >>> folder(cell, pathlib.Path('runs')).as_posix()
      'runs/gtsrb-small_vgg'
    """
    name = f"{cell.dataset}-{cell.arch}"
    for options in (cell.network, cell.column.options):
        if options:
            name += "-" + re.sub(r"[^a-z0-9.]+", "_", " ".join(options).lower()).strip("_")
    return runs / name


def read(runs: pathlib.Path) -> dict[pathlib.Path, dict[str, Any]]:
    """What every run directory's results.json holds; ValueError for a damaged one."""
    found = {}
    for path in sorted(runs.glob("*/results.json")):
        try:
            run = json.loads(path.read_text())
            results.having(run, "dataset", "arch", "versions")
            run["done"] = {(c["attack"], str(c["samples"]), c["defence"], c["seed"]): (
                results.whole(c)) for c in run["cells"].values()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"Expected {path} to be written by experiments.oneshot, it is damaged "
                             f"({type(error).__name__}: {error}). Move it away.") from error
        found[path.parent] = run
    return found


def result(cell: Cell, found: dict[pathlib.Path, dict[str, Any]],
           runs: pathlib.Path) -> dict[str, Any] | None:
    """What came of a cell, None if it was not run.

    Args:
      cell: which.
      found: from `read`.
      runs: the directory of all.
    """
    run = found.get(folder(cell, runs), {})
    return run.get("done", {}).get((cell.attack, str(cell.samples), cell.column.defence, cell.seed))


class Estimates:
    """How long cells take: as those like them did, a guess before the first.

    Args:
      found: from `read`.
      args: the command's options.
    """

    def __init__(self, found: dict[pathlib.Path, dict[str, Any]], args: argparse.Namespace):
        self._args, self._runs = args, args.runs
        self._times: dict[tuple, list[float]] = {}
        self._trained: set[tuple] = set()
        self._training: dict[tuple, dict[str, float]] = {}
        for where, run in found.items():
            for (attack, samples, defence, _), cell in run["done"].items():
                # Of some data sets the name has a digest.
                key = (run["dataset"].partition("-")[0], run["arch"], samples, defence)
                self._times.setdefault(key, []).append(cell["seconds"])
                self._trained.add(_network(where, attack))

    def add(self, cell: Cell, seconds: float) -> None:
        """A cell that took so long, evaluation and loading included."""
        self._times.setdefault(_kind(cell), []).append(seconds)
        network = _network(folder(cell, self._runs), cell.attack)
        if network not in self._trained:
            self._trained.add(network)
            self._training.clear()  # epochs of a known length, and perhaps a surrogate more

    def of(self, cell: Cell) -> float:
        """Seconds that a purification will take, its network at hand."""
        if _kind(cell) in self._times:
            return float(np.median(self._times[_kind(cell)]))
        heavier = _HEAVIER.get(cell.arch, 1.0) * (4.0 if cell.dataset == "tiny_imagenet" else 1.0)
        if cell.column.defence in _ANY_NUMBER:
            return heavier * _ANY_NUMBER[cell.column.defence]
        images = cell.samples if isinstance(cell.samples, int) else _ONE_SHOT
        default = DEFENCES[cell.column.defence].default
        more = (_awm_steps(default, images) / _awm_steps(default, _ONE_SHOT)
                if isinstance(default, AWMConfig) else max(1.0, images / 50))
        return heavier * _SECONDS.get(cell.column.defence, _USUAL) * more

    def total(self, cells: list[Cell]) -> float:
        """Seconds that several will take, with the training of networks that no cell had yet."""
        training: dict[str, float] = {}
        for cell in cells:
            training.update(self.training(cell))
        return sum(map(self.of, cells)) + sum(training.values())

    def training(self, cell: Cell) -> dict[str, float]:
        """Seconds that a cell's network takes to train, and its trigger's surrogate.

        Args:
          cell: which.

        Returns:
          Seconds by the networks' digests, without what the cache has; empty if an earlier cell had
          the network.
        """
        network = _network(folder(cell, self._runs), cell.attack)
        if network in self._trained:
            return {}
        if network not in self._training:
            self._training[network] = self._of_training(cell)
        return self._training[network]

    def _of_training(self, cell: Cell) -> dict[str, float]:
        """As `training`, asking the cache."""
        args = cli.parser().parse_args(_arguments(cell, self._args))
        cache = networks.directory()
        specs = [scene.planned(cell.attack, args, cell.dataset)]
        if specs[0].kind in attacks.ON_SURROGATE and not checkpoint.exists(
                cache / specs[0].digest / "network"):
            specs.append(networks.benign(specs[0],
                                         presets.PRESETS[cell.dataset].surrogate_epochs))
        epoch = (networks.epoch_seconds(cell.dataset, cell.arch, cache)
                 or _HEAVIER.get(cell.arch, 1.0) * _TRAINING[cell.dataset])
        return {spec.digest: epoch * spec.epochs for spec in specs
                if not checkpoint.exists(cache / spec.digest / "network")}


def _awm_steps(config: AWMConfig, images: int) -> int:
    """Images that AWM's steps go through: their number hardly depends on how many there are."""
    settings = config.resolve(images, (32, 32, 3))
    return settings.epochs * settings.batch_size * (settings.inner_steps + settings.outer_steps)


def _kind(cell: Cell) -> tuple:
    """What cells have in common that take about as long."""
    return cell.dataset, cell.arch, str(cell.samples), cell.column.defence


def _network(where: pathlib.Path, attack: str) -> tuple:
    """Which network the cells of a run directory purify."""
    return where.name.partition("-set_")[0], attack


def _arguments(cell: Cell, args: argparse.Namespace) -> list[str]:
    """The command line of `experiments.oneshot` for a cell."""
    where = getattr(args, f"{cell.dataset}_dir")
    data = [] if where is None else ["--data_dir", str(where)]
    return ["--dataset", cell.dataset, *data, "--arch", cell.arch, "--attack", cell.attack,
            "--defence", cell.column.defence, "--samples", str(cell.samples),
            "--seeds", str(cell.seed + 1), "--first_seed", str(cell.seed),
            "--out", str(folder(cell, args.runs)), *cell.options]


def _purify(cell: Cell, args: argparse.Namespace) -> dict[str, Any]:
    """One run of `experiments.oneshot`, what it prints in a file beside its results."""
    log = folder(cell, args.runs) / "log.txt"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a") as file, contextlib.redirect_stdout(file):
        done = oneshot.run(cli.parser().parse_args(_arguments(cell, args)))
    return next(c for c in done["cells"].values() if c["seed"] == cell.seed)


def _fingerprint(cell: Cell, args: argparse.Namespace) -> str:
    """Of the settings that a cell would be run with now; its data are not loaded for that."""
    nothing = np.zeros(0)
    dataset = Dataset(cell.dataset, nothing, nothing, nothing, nothing, 0, data.flips(cell.dataset))
    asked = cli.parser().parse_args(_arguments(cell, args))
    return defending.fingerprint(cell.column.defence, asked, dataset)


def _current(cell: Cell, done: dict[str, Any], args: argparse.Namespace) -> bool:
    """Whether a purification had the settings of now; of one from before they were kept, yes."""
    return "fingerprint" not in done or done["fingerprint"] == _fingerprint(cell, args)


def _known(path: pathlib.Path | None) -> dict[str, Any]:
    """The cells of a report's figures.json, by `table_cells.name`; ValueError for another file."""
    if path is None:
        return {}
    try:
        return {name: results.whole(cell)
                for name, cell in json.loads(path.read_text())["cells"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"Expected --known={path} to be a figures.json of experiments.report, it "
                         f"cannot be read as one ({type(error).__name__}: {error}).") from error


def _missing(args: argparse.Namespace) -> list[Cell]:
    """Cells that neither a run nor ``--known`` has, or only with settings that changed since."""
    found, known = read(args.runs), _known(args.known)
    seen, cells = set(), []
    for cell in table_cells.cells(args.tables, args.seeds, args.arch):
        if args.defence and cell.column.defence not in args.defence:
            continue
        if args.samples and cell.samples not in args.samples:
            continue
        if args.attack and cell.attack not in args.attack:
            continue
        key = (folder(cell, args.runs), cell.attack, cell.samples, cell.column.defence, cell.seed)
        had = [one for one in (result(cell, found, args.runs), known.get(table_cells.name(cell)))
               if one is not None and _current(cell, one, args)]
        if key not in seen and not had:
            cells.append(cell)
        seen.add(key)
    if not seen:
        raise ValueError("Expected a purification with these --defence, --samples and --attack in "
                         f"{', '.join(args.tables)}, there is none. Leave some of them out.")
    return cells


def _next(left: list[Cell], estimates: Estimates, seconds: float) -> tuple[Cell | None, float]:
    """What to do in the time that is left, and how long it will take.

    First seeds first, and of each seed the cheapest, the training of its network included: what
    there are networks for is done before others are trained.
    """
    costs = [(cell.seed, estimates.total([cell]), i) for i, cell in enumerate(left)]
    fitting = [cost for cost in costs if cost[1] <= seconds]
    if not fitting:
        return None, 0.0
    _, expected, i = min(fitting)
    return left[i], expected


def run(args: argparse.Namespace) -> int:
    """The whole job; returns how many cells are still missing."""
    for name in _DATASETS:
        where = getattr(args, f"{name}_dir")
        if where is not None and not where.is_dir():
            raise FileNotFoundError(f"Expected a folder at --{name}_dir={where}, found none.")
    estimates, failed = Estimates(read(args.runs), args), []
    left, ends = _missing(args), time.monotonic() + 60 * args.budget
    print(f"{len(left)} purifications are missing, about "
          f"{estimates.total(left) / 3600:.1f} h; {args.budget:g} min are given.",
          flush=True)
    while True:
        cell, expected = _next(left, estimates, ends - time.monotonic())
        if cell is None:
            break
        started, name = time.monotonic(), " ".join(map(str, (*cell[:3], cell.column.heading)))
        print(f"{name}, seed {cell.seed}: begun, about {expected / 60:.0f} min", flush=True)
        trained = not estimates.training(cell)
        try:
            done = _purify(cell, args)
        except (ValueError, FileNotFoundError) as error:
            # Without a data set's files none of its networks can be had.
            gone = isinstance(error, FileNotFoundError)
            dropped = [c for c in left if c is cell or (gone and c.dataset == cell.dataset)]
            left = [c for c in left if c not in dropped]
            failed.append(f"{name}, seed {cell.seed}: {error}")
            print(f"{failed[-1]} Left out, with {len(dropped) - 1} more.", flush=True)
            continue
        estimates.add(cell, time.monotonic() - started if trained else done["seconds"])
        left.remove(cell)
        rest = estimates.total(left) / 3600
        print(f"{name}, seed {cell.seed}: ACC {done['after']['acc']:.1f}, ASR "
              f"{done['after']['asr_all']:.1f}, {time.monotonic() - started:.0f} s; {len(left)} "
              f"are missing, about {rest:.1f} h", flush=True)
    print(f"{len(left)} purifications are missing. python -m experiments.report --runs {args.runs} "
          "renders what there is.")
    if failed:
        raise ValueError(f"{len(failed)} of these could not be made, the first for this: "
                         f"{failed[0]}")
    return len(left)


def _minutes(text: str) -> float:
    """A number >= 0; of 0 comes the estimate alone."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected minutes >= 0, got {text!r}")
    return value


def _parser() -> argparse.ArgumentParser:
    """The options."""
    p = OneLine(prog="python -m experiments.tables",
                description="Make the papers' tables and figures, as far as time allows.")
    p.add_argument("--tables", type=cli.several(PLANS, "table"), default=USUAL,
                   help=f"one or more of: {', '.join(PLANS)}; or all (default: "
                   f"{','.join(USUAL)}, what the small VGG does)")
    p.add_argument("--arch", choices=("paper", *sorted(models.MODELS)),
                   help="network instead of the tables' own; paper: the paper's (default: of awm2, "
                   "awm5, awm10 and AWM's figures small_vgg, of the others the paper's)")
    p.add_argument("--defence", type=cli.several(DEFENCES, "defence"), default=(),
                   help="only these columns (default: all)")
    p.add_argument("--attack", type=cli.attacks_of, default=(), metavar="NAME[,NAME...]|awm",
                   help="only networks with these backdoors; 'awm' are the six of the AWM paper's "
                   "main tables (default: all)")
    p.add_argument("--samples", type=cli.several_samples, default=(), metavar="N[,N...]",
                   help="only these numbers of clean images: 'one-shot' or numbers (default: all)")
    p.add_argument("--seeds", type=cli.positive, default=3,
                   help="purifications a cell (default: %(default)s)")
    p.add_argument("--budget", type=_minutes, default=60.0, metavar="MINUTES",
                   help="nothing is begun that would end later (default: %(default)s)")
    for name in _DATASETS:
        p.add_argument(f"--{name}_dir", type=pathlib.Path, help=f"as --data_dir, for {name}")
    p.add_argument("--known", type=pathlib.Path, metavar="FILE",
                   help="a report's figures.json, such as docs/results/figures.json: what it has "
                   "is not made again, unless its settings changed since (older reports do not say "
                   "which it had)")
    p.add_argument("--runs", type=pathlib.Path, default=RUNS,
                   help="run directories (default: %(default)s)")
    return p


def main(argv: list[str] | None = None) -> int:
    """Entry point; errors of the user's making end in one line and status 2."""
    args = _parser().parse_args(argv)
    return cli.run("experiments.tables", lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
