"""How well a scan tells backdoored networks from clean ones: trains both, scans all, gives the AUC.

    python -m experiments.detection --attack badnets,blended,wanet --networks 5
    python -m experiments.detection --dataset gtsrb --data_dir DIR --attack all --networks 1

Networks are cached; the clean ones differ by their seed alone. A scan sees the network and one
clean image of each class (or ``--samples``).
"""

import argparse
import functools
import hashlib
import pathlib
import sys
from typing import Any

import jax
import numpy as np

from awm_jax import detection
from awm_jax.data import Dataset
from awm_jax.defences import AWMConfig
from awm_jax.defences.survey import THRESHOLDS
from experiments import cli, networks, results, resuming, scene

_LEARNT = 50.0  # ASR in percent: below it a network has hardly a backdoor to be found


def _parser() -> argparse.ArgumentParser:
    """The options."""
    p = cli.scene_parser("python -m experiments.detection",
                         "Scan networks with and without a backdoor, and report how well the "
                         "scan tells them apart.")
    p.add_argument("--networks", type=cli.positive, default=5,
                   help="networks of each attack, and clean ones (default: %(default)s)")
    p.add_argument("--clean", type=cli.positive, help="clean networks (default: --networks)")
    p.add_argument("--samples", type=cli.samples, default="one-shot",
                   help="clean images for the scan (default: %(default)s)")
    p.add_argument("--out", type=pathlib.Path,
                   help="run directory (default: runs/detection-DATASET-ARCH)")
    cli.fresh_option(p)
    return p


def auc(negative: list[float], positive: list[float]) -> float | None:
    """Area under the ROC curve: the share of pairs in the right order, ties half.

    Args:
      negative: scores of clean networks.
      positive: of backdoored ones.

    Returns:
      In [0, 1]; None without a pair.

    Example:
      >>> auc([1.0, 2.0], [2.0, 3.0])
      0.875
    """
    if not negative or not positive:
        return None
    below, above = np.asarray(negative)[:, None], np.asarray(positive)[None]
    return float(((below < above) + 0.5 * (below == above)).mean())


def _rows(name: str, args: argparse.Namespace, dataset: Dataset) -> list[dict[str, Any]]:
    """One network's scan: a row."""
    make = functools.partial(scene.alone, args.attack[0]) if name == "none" else (
        functools.partial(scene.make, name))
    on_stage, seed = make(args, dataset, networks.directory()), args.network_seed
    asr = None if name == "none" else on_stage.before.asr
    batch, _ = on_stage.clean(seed, args.samples)
    found = detection.scan(on_stage.params, batch, key=jax.random.key(seed),
                           config=_config(dataset))
    top = int(found.survey.damage.argmax())
    return [{"attack": name, "seed": seed, "asr": asr, "score": found.score, "lead": found.lead,
            "anomaly": float(found.anomaly.max()), "all_to_all": found.all_to_all,
            "first": top, "stay": float(found.survey.stay), "kept": float(found.survey.kept),
            "bent": float(found.survey.bent.sum()), "strain": float(found.survey.strain),
            "again": float(found.survey.again),
            "flips": float(found.flips), "concentration": float(found.concentration),
            "arrivals": float(found.arrivals)}]


def _config(dataset: Dataset) -> AWMConfig:
    """A scan's settings."""
    return AWMConfig(flip=dataset.flip)


def _auc_of(rows: list[dict], what: str, attack: str | None = None) -> float | None:
    """AUC of one figure over the networks that learnt their backdoor, of one attack or all."""
    clean = [row[what] for row in rows if row["attack"] == "none"]
    found = [row[what] for row in rows if row["attack"] in ((attack,) if attack else _attacks(rows))
             and row["asr"] >= _LEARNT]
    return auc(clean, found)


def _attacks(rows: list[dict]) -> list[str]:
    """The attacks in order."""
    return list(dict.fromkeys(row["attack"] for row in rows if row["attack"] != "none"))


def table(rows: list[dict]) -> str:
    """Markdown: an attack a row, with the share called suspicious and the AUC against clean ones.

    Args:
      rows: as in networks.json.

    Returns:
      The table; networks with an ASR under 50% count for no AUC.
    """
    def number(value):
        return "-" if value is None else f"{value:.2f}"

    lines = ["| attack | networks | mean ASR | ASR >= 50 | scores, from to | suspicious | AUC |",
             "|" + "---|" * 7]
    for name in ["none", *_attacks(rows)]:
        own = [row for row in rows if row["attack"] == name]
        learnt = [row for row in own if row["asr"] is None or row["asr"] >= _LEARNT]
        scores = [row["score"] for row in learnt]
        asr = "-" if name == "none" else f"{np.mean([row['asr'] for row in own]):.1f}"
        span = f"{min(scores):.2f} to {max(scores):.2f}" if scores else "-"
        lines.append(
            f"| {name} | {len(own)} | {asr} | {'-' if name == 'none' else len(learnt)} | {span} | "
            f"{sum(score >= 1 for score in scores)} of {len(scores)} | "
            f"{'-' if name == 'none' else number(_auc_of(rows, 'score', name))} |")
    lines.append("")
    lines.append("AUC over all networks with an ASR of 50% or more: " + ", ".join(
        f"{what} {number(_auc_of(rows, what))}"
        for what in ("score", "lead", "anomaly", "concentration", "arrivals")) + ".")
    return "\n".join(lines)


def run(args: argparse.Namespace) -> list[dict]:
    """The whole job; returns the rows of networks.json."""
    if args.checkpoint is not None:
        raise ValueError("Expected no --checkpoint: `python -m awm_jax scan` scans one network.")
    dataset = cli.load(args)
    scene.check(args, dataset, (args.samples,))
    folder = args.out or pathlib.Path("runs") / f"detection-{dataset.name}-{args.arch}"
    rows: list[dict] = []
    kept = resuming.Rows(folder / "networks.json", "experiments.detection", args, dataset)
    # Resolved, so that constants of a later release are other settings.
    constants = _config(dataset).resolve(1, dataset.train_images.shape[1:])
    decides = (constants, THRESHOLDS, detection.LEADS_BY)
    settings = hashlib.sha256(repr(decides).encode()).hexdigest()[:8]
    wanted = {"none": args.clean or args.networks, **dict.fromkeys(args.attack, args.networks)}
    first = args.network_seed
    for seed, name in ((first + i, name) for i in range(max(wanted.values()))
                       for name, count in wanted.items() if i < count):
        args.network_seed = seed
        # A clean network is trained as one with the first attack would be.
        network = scene.network_name(args.attack[0] if name == "none" else name, args, dataset)
        rows += kept.of(f"{name}/{network}/scan-{settings}-{args.samples}", _rows, name, args,
                        dataset)
        _tell(rows[-1])
        results.write_text(folder / "networks.md", table(rows) + "\n")
    print(f"\n{table(rows)}\n\nEverything is in {folder}/ (networks.json, networks.md).")
    return rows


def _tell(row: dict) -> None:
    """A line about one network."""
    asr = "" if row["asr"] is None else f" (ASR {row['asr']:.1f})"
    print(f"{row['attack']}, seed {row['seed']}{asr}: score {row['score']:.2f}, lead "
          f"{row['lead']:.2f}, all-to-all {row['all_to_all']}", flush=True)


def main(argv: list[str] | None = None) -> int:
    """Entry point; errors of the user's making end in one line and status 2."""
    args = _parser().parse_args(argv)
    return cli.run("experiments.detection", lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
