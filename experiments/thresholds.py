"""An oracle: what accuracy and backdoor each threshold of a pruning defence would have left.

    python -m experiments.thresholds --dataset=gtsrb --data_dir DIR --attack awm --defence anp

ANP and RNP learn a mask for every neuron and prune those up to a threshold, which their papers fix
or choose by results. Masks are learnt once, then every threshold is scored (AWM's Figure 1(b),
right). Nobody defends with this: it looks at test and triggered images.
"""

import argparse
import functools
import pathlib
import sys
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from awm_jax.defences import DEFENCES, neurons
from awm_jax.defences.base import Status
from awm_jax.defences.neurons import PruneConfig
from awm_jax.progress import waiting
from awm_jax.report import figures
from experiments import cli, defending, networks, pages, results, resuming, scene
from experiments.scene import Scene

PRUNING = tuple(name for name, one in DEFENCES.items() if isinstance(one.default, PruneConfig))
_GRID = (0.0, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
_LOSS = 5.0  # points of accuracy that the best threshold of a table may cost
_SHOWN = ("acc", "asr", "asr_all")


def _grid(text: str) -> tuple[float, ...]:
    """A comma-separated list of numbers in [0, 1], each once, in order."""
    try:
        found = tuple(sorted({float(part) for part in text.split(",")}))
    except ValueError:
        found = ()
    if not found or not all(0 <= value <= 1 for value in found):
        raise argparse.ArgumentTypeError(f"expected numbers from 0 to 1, got {text!r}")
    return found


def _parser() -> argparse.ArgumentParser:
    """The options."""
    p = cli.scene_parser("python -m experiments.thresholds",
                         "Learn a pruning defence's masks once and score every threshold.")
    how = p.add_argument_group("defence")
    how.add_argument("--defence", choices=PRUNING, default="anp",
                     help="whose masks (default: %(default)s)")
    how.add_argument("--samples", type=cli.samples, default="one-shot",
                     help="clean images for the defence: 'one-shot' (one of each class) or a "
                     "number (default: %(default)s)")
    cli.set_option(how)
    how.add_argument("--thresholds", type=_grid, default=_GRID, metavar="T[,T...]",
                     help="what is scored, each from 0 to 1 (default: "
                     f"{','.join(f'{value:g}' for value in _GRID)})")
    how.add_argument("--seeds", type=cli.positive, default=3,
                     help="draws of clean images (default: %(default)s)")
    p.add_argument("--out", type=pathlib.Path, default=pathlib.Path("runs/thresholds"),
                   help="directory of thresholds.json and the picture (default: %(default)s)")
    cli.fresh_option(p)
    p.set_defaults(purify_epochs=None)
    return p


def measure(on_stage: Scene, seed: int, args: argparse.Namespace) -> list[dict[str, Any]]:
    """One draw of clean images: masks, and what every threshold makes of the network.

    Args:
      on_stage: the network.
      seed: decides the clean images and the defence's key, as in `experiments.oneshot`.
      args: as the command's.

    Returns:
      A row: ``network``, ``defence``, ``set`` (of the command), ``samples``, ``seed``, ``neurons``
      (their number), ``used`` (the threshold that the defence took), ``before`` (scores) and
      ``points``: of each threshold, ``threshold``, ``pruned`` (neurons) and scores, in percent.

    Raises:
      ValueError: the masks are not finite.

    Example: see `run`.
    """
    config = defending.config(args.defence, args, on_stage.dataset)
    batch, _ = on_stage.clean(seed, args.samples)
    with waiting(f"{on_stage.name}, masks of {args.defence}, seed {seed}"):
        found = DEFENCES[args.defence](on_stage.params, batch, key=jax.random.key(seed),
                                       config=config)
    if found.status == Status.NONFINITE:
        raise ValueError(f"Expected finite masks, those of {args.defence} on {on_stage.name}, seed "
                         f"{seed}, are not: {found.status.advice}.")
    masks = found.info["masks"]
    points: list[dict[str, Any]] = []
    before = on_stage.before._asdict()
    last = {"pruned": 0, **before}
    with waiting(f"{on_stage.name}, scores, seed {seed}"):
        for threshold in args.thresholds:
            keep = {layer: (values > threshold).astype(values.dtype)
                    for layer, values in masks.items()}
            pruned = sum(int((kept == 0).sum()) for kept in keep.values())
            if last["pruned"] != pruned:  # they only ever go: as many are the same ones
                after = on_stage.evaluate(neurons.prune(on_stage.params, keep))
                last = {"pruned": pruned, **after._asdict()}
            points.append({"threshold": threshold, "pruned": pruned,
                           **{key: last[key] for key in _SHOWN}})
    return [{"network": on_stage.name, "defence": args.defence,
             "set": [f"{name}={value}" for name, value in args.set or ()],
             "samples": args.samples, "seed": seed, "neurons": sum(map(len, masks.values())),
             "used": float(found.info["threshold"]), "before": before,
             "points": points}]


def best(row: dict[str, Any]) -> dict[str, Any]:
    """The threshold that leaves the least backdoor for 5 points of accuracy: an oracle's choice.

    Args:
      row: from `measure`.

    Returns:
      One of its points, or the network as it was, as threshold -1, if all cost more.

    Example:
      >>> points = [{'threshold': .1, 'pruned': 1, 'acc': 88., 'asr': 50., 'asr_all': 50.},
      ...           {'threshold': .2, 'pruned': 2, 'acc': 80., 'asr': 0., 'asr_all': 0.}]
      >>> before = {'acc': 90., 'asr': 99., 'asr_all': 99.}
      >>> best({'before': before, 'points': points})['threshold']
      0.1
    """
    before = {"threshold": -1.0, "pruned": 0, **{key: row["before"][key] for key in _SHOWN}}
    affordable = [point for point in row["points"] if point["acc"] >= before["acc"] - _LOSS]
    return min([before, *affordable], key=lambda point: point["asr"])


def _curves(rows: list[dict[str, Any]]) -> list[tuple[str, list[dict[str, Any]]]]:
    """The seeds of each curve, which are those of one network, settings and grid, and its name."""
    found: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        found.setdefault(row["key"].rpartition("/")[0], []).append(row)
    names = [", ".join([mine[0]["network"], mine[0]["defence"], *mine[0]["set"],
                        str(mine[0]["samples"])]) for mine in found.values()]
    return list(zip(results.apart(names, list(found)), found.values(), strict=True))


def table(rows: list[dict[str, Any]]) -> list[list[str]]:
    """What was measured, in percent: means and standard deviations over seeds.

    Args:
      rows: as thresholds.json holds them.

    Returns:
      A head; of each network the suspect one, every threshold, and `best`.

    Example:
      >>> point = {'threshold': .2, 'pruned': 3, 'acc': 90., 'asr': 1., 'asr_all': 2.}
      >>> row = {'key': 'a/b/0', 'network': 'a', 'defence': 'anp', 'set': [], 'samples': 4,
      ...        'before': point, 'points': [point]}
      >>> table([row])[2]
      ['a, anp, 4', '0.2', '3.00', '90.00', '1.00', '2.00', '1']
    """
    cells = [["network, defence, images", "threshold", "pruned", "ACC", "ASR", "ASR(all)", "seeds"]]
    for name, mine in _curves(rows):
        def line(label, points, name=name):
            return [name, label, *(results.mean_std([point[key] for point in points])
                                   for key in ("pruned", *_SHOWN)), str(len(points))]

        cells.append(line("before", [{**row["before"], "pruned": 0} for row in mine]))
        grid = [point["threshold"] for point in mine[0]["points"]]
        cells += [line(f"{value:g}", [row["points"][i] for row in mine])
                  for i, value in enumerate(grid)]
        cells.append(line(f"the best for {_LOSS:g} points of ACC, by triggered images",
                          [best(row) for row in mine]))
    return cells


def draw(path: pathlib.Path, rows: list[dict[str, Any]], title: str) -> None:
    """ACC and ASR over the threshold, a curve a network.

    Args:
      path: the PNG.
      rows: as thresholds.json holds them.
      title: shown on top.

    Example: see `run`.
    """
    panels: dict[str, dict[str, np.ndarray]] = {"ACC, %": {}, "ASR, %": {}}
    for name, mine in _curves(rows):
        grid = [point["threshold"] for point in mine[0]["points"]]
        for panel, key in (("ACC, %", "acc"), ("ASR, %", "asr")):
            values = np.asarray([[point[key] for point in row["points"]] for row in mine])
            spread = values.std(axis=0, ddof=1) if len(mine) > 1 else np.zeros(len(grid))
            panels[panel][name] = np.stack([grid, values.mean(axis=0), spread], axis=1)
    figures.curves(path, panels, "threshold", title)


def run(args: argparse.Namespace) -> list[dict[str, Any]]:
    """The whole job; returns the rows of thresholds.json."""
    dataset = cli.load(args)
    scene.check(args, dataset, (args.samples,))
    defending.check_set((args.defence,), args.set or ())
    settings = (f"{defending.fingerprint(args.defence, args, dataset)}-{args.samples}/"
                + ",".join(f"{value:g}" for value in args.thresholds))
    rows: list[dict[str, Any]] = []
    kept = resuming.Rows(args.out / "thresholds.json", "experiments.thresholds", args, dataset)
    stage: Callable[[str], Scene] = functools.lru_cache(maxsize=1)(
        lambda name: scene.make(name, args, dataset, networks.directory()))
    for name in args.attack:
        network = scene.network_name(name, args, dataset)
        for seed in range(args.seeds):
            rows += kept.of(f"{network}/{args.defence}-{settings}/{seed}",
                            lambda name, seed: measure(stage(name), seed, args), name, seed)
        print(pages.rows_of(table(rows[-args.seeds:])), flush=True)
    results.write_text(args.out / "thresholds.md", pages.rows_of(table(rows)) + "\n")
    draw(args.out / "thresholds.png", rows, f"{dataset.name}, {args.arch}")
    print(f"Everything is in {args.out}/ (thresholds.json, thresholds.md, thresholds.png).")
    return rows


def main(argv: list[str] | None = None) -> int:
    """Entry point; errors of the user's making end in one line and status 2."""
    args = _parser().parse_args(argv)
    return cli.run("experiments.thresholds", lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
