"""What a network predicts once its neurons are perturbed: AWM's Figure 1, ANP's Figures 8 and 9.

    python -m experiments.proportions --dataset=gtsrb --data_dir DIR --samples one-shot,500 --benign

With enough clean images the attacker's class draws most of the predictions that move; with one of
each class, or in a small network, it need not. `--benign` puts a network without a backdoor beside.
"""

import argparse
import pathlib
import sys

import jax
import numpy as np

from awm_jax.defences.anp import prediction_proportions
from awm_jax.report import figures
from experiments import cli, networks, pages, results, resuming, scene
from experiments.scene import Scene


def _bound(text: str) -> float:
    """A number > 0."""
    value = float(text)
    if not 0 < value < float("inf"):
        raise ValueError(text)
    return value


def _bounds(text: str) -> tuple[float, ...]:
    """A comma-separated list of numbers > 0."""
    try:
        return tuple(dict.fromkeys(_bound(part) for part in text.split(",")))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"expected numbers > 0, got {text!r}") from error


def _parser() -> argparse.ArgumentParser:
    """The options."""
    p = cli.scene_parser("python -m experiments.proportions",
                         "Perturb a network's neurons and report what it predicts.")
    how = p.add_argument_group("perturbation")
    how.add_argument("--samples", type=cli.several_samples,
                     default=("one-shot",), metavar="N[,N...]",
                     help="clean images it is found on (default: one-shot)")
    how.add_argument("--eps", type=_bounds, default=(0.1, 0.2, 0.4),
                     metavar="E[,E...]", help="bounds relative to the weights "
                     "(default: .1,.2,.4)")
    how.add_argument("--steps", type=cli.positive, default=1, help="sign steps (default: 1)")
    how.add_argument("--seeds", type=cli.positive, default=5,
                     help="draws of images and starts (default: %(default)s)")
    how.add_argument("--benign", action="store_true",
                     help="a network without a backdoor, trained alike, beside each")
    p.add_argument("--out", type=pathlib.Path, default=pathlib.Path("runs/proportions"),
                   help="directory of proportions.json and the pictures (default: %(default)s)")
    cli.fresh_option(p)
    return p


_proportions = jax.jit(prediction_proportions, static_argnames=("eps", "steps"))


def measure(on_stage: Scene, samples: str | int, eps: float, steps: int,
            seeds: int) -> list[dict]:
    """One network, one number of images, one bound: a row of every seed's shares and errors."""
    found = []
    for seed in range(seeds):
        batch, _ = on_stage.clean(seed, samples)
        found.append(_proportions(jax.random.key(seed), on_stage.params, batch.images,
                                  batch.labels, eps=eps, steps=steps))
    shares = np.stack([one.shares for one in found])
    return [{"network": on_stage.name, "samples": samples, "eps": eps, "steps": steps,
             "target": on_stage.attack.target, "shares": shares,
             "error_rate": [float(one.error_rate) for one in found]}]


def names(rows: list[dict]) -> list[str]:
    """The network of each row, with what else decides it where several rows would look alike.

    Args:
      rows: as proportions.json holds them.

    Example:
      >>> names([{'key': 'a/s0/4', 'network': 'a', 'steps': 1, 'shares': [[1.]]}])
      ['a']
    """
    return results.apart([row["network"] for row in rows], [
        # An earlier release's rows in figures.json have no key.
        f"{row.get('key', '').rpartition('/')[0]}, steps {row['steps']}, {len(row['shares'])} draws"
        for row in rows])


def table(rows: list[dict]) -> list[list[str]]:
    """What was measured, in percent: a head, and a row a network, number of images and bound.

    Args:
      rows: as proportions.json holds them.

    Returns:
      Rows of cells.

    Example:
      >>> row = {'key': 'a/0/4', 'network': 'a', 'samples': 4, 'eps': .5, 'steps': 1, 'target': 1,
      ...        'error_rate': [.5], 'shares': [[0., 1.]]}
      >>> table([row])[1]
      ['a', '4', '0.5', '50.00', '100.00', '100.00 (1)']
    """
    cells = [["network", "images", "eps", "error rate", "attacker's class", "largest class"]]
    for name, row in zip(names(rows), rows, strict=True):
        shares = 100 * np.asarray(row["shares"])
        target = "-" if row["target"] is None else results.mean_std(shares[:, row["target"]])
        largest = int(shares.mean(axis=0).argmax())
        cells.append([
            name, str(row["samples"]), f"{row['eps']:g}",
            results.mean_std(100 * np.asarray(row["error_rate"])), target,
            f"{results.mean_std(shares[:, largest])} ({largest})"])
    return cells


def _table(rows: list[dict]) -> str:
    """`table` in Markdown."""
    return pages.rows_of(table(rows))


def run(args: argparse.Namespace) -> list[dict]:
    """The whole job; returns the rows of proportions.json."""
    dataset = cli.load(args)
    scene.check(args, dataset, args.samples)
    cache = networks.directory()
    rows: list[dict] = []
    kept = resuming.Rows(args.out / "proportions.json", "experiments.proportions", args, dataset)
    for attack in args.attack:
        attacked = scene.make(attack, args, dataset, cache)
        for on_stage in (attacked, scene.benign(attacked, cache)) if args.benign else (attacked,):
            network = scene.network_name(attack, args, dataset) + (
                "" if on_stage is attacked else "/benign")
            mine = [row for samples in args.samples for eps in args.eps for row in kept.of(
                f"{network}/{samples}-{eps}-{args.steps}-{args.seeds}", measure, on_stage, samples,
                eps, args.steps, args.seeds)]
            stem = attacked.name.replace(":", "-") + ("-benign" if on_stage is not attacked else "")
            figures.proportions(
                args.out / f"{stem}.png",
                {f"{row['samples']} images, eps {row['eps']:g}": row["shares"] for row in mine},
                attacked.attack.target, f"{on_stage.name}: predictions of the perturbed network")
            rows += mine
            print(_table(mine), flush=True)
    results.write_text(args.out / "proportions.md", _table(rows) + "\n")
    print(f"Everything is in {args.out}/ (proportions.json, proportions.md, pictures).")
    return rows


def main(argv: list[str] | None = None) -> int:
    """Entry point; errors of the user's making end in one line and status 2."""
    args = _parser().parse_args(argv)
    return cli.run("experiments.proportions", lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
