"""Train backdoored networks and score them, before any defence.

    python -m experiments.backdoor --dataset=gtsrb --data_dir DIR --attack all --benign

Networks are cached and their training resumes; `experiments.oneshot` finds the same ones.
"""

import argparse
import pathlib
import sys

from experiments import cli, networks, results, resuming, scene


def _parser() -> argparse.ArgumentParser:
    """The options."""
    p = cli.scene_parser("python -m experiments.backdoor",
                         "Train (or load) backdoored networks and report ACC and ASR.")
    p.add_argument("--benign", action="store_true",
                   help="also a network without a backdoor, trained as long")
    p.add_argument("--out", type=pathlib.Path,
                   help="run directory (default: runs/backdoor-DATASET-ARCH)")
    cli.fresh_option(p)
    return p


def _rows(on_stage: scene.Scene) -> list[dict]:
    """What networks.json keeps of a network: a row."""
    spec = on_stage.spec
    return [{"attack": on_stage.name, "target": on_stage.attack.target,
            "rate": None if spec is None else spec.rate,
            "epochs": None if spec is None else spec.epochs, **on_stage.before._asdict(),
            "covered": on_stage.covered, "parts": [part.name for part in on_stage.attack.parts]}]


def table(rows: list[dict]) -> str:
    """Markdown table, a row a network, in percent.

    Args:
      rows: as in networks.json: ``attack``, ``target``, ``rate``, ``epochs``, the scores,
        ``covered``, the accuracy on images with the attack's cover, and ``parts``, the names of the
        several triggers whose ASR is in ``asr_parts``.

    Returns:
      The table; a dash where nothing is known; below an attack with several triggers, each one's.
    """
    def known(value, text):
        return "-" if value is None else format(value, text)

    lines = ["| attack | target | poison rate | epochs | ACC | ASR | ASR(all) | RA | cover ACC |",
             "|" + "---|" * 9]
    lines += [
        f"| {row['attack']} | {known(row['target'], 'd')} | {known(row['rate'], 'g')} | "
        f"{known(row['epochs'], 'd')} | {row['acc']:.2f} | {known(row['asr'], '.2f')} | "
        f"{known(row['asr_all'], '.2f')} | {known(row['recovered'], '.2f')} | "
        f"{known(row['covered'], '.2f')} |"
        + "".join(f"\n| {row['attack']}: {name} | {row['target']} | - | - | - | {asr:.2f} |"
                  + " - |" * 3
                  for name, asr in zip(row["parts"], row["asr_parts"], strict=True))
        for row in rows]
    return "\n".join(lines)


def _benign_rows(on_stage: scene.Scene, cache: pathlib.Path) -> list[dict]:
    """The row of the network trained alike without a backdoor: only its accuracy means anything."""
    return [{**row, "target": None, "rate": None, "asr": None, "asr_all": None,
             "recovered": None, "covered": None, "parts": [], "asr_parts": []}
            for row in _rows(scene.benign(on_stage, cache))]


def run(args: argparse.Namespace) -> list[dict]:
    """The whole job; returns the rows of networks.json."""
    dataset = cli.load(args)
    scene.check(args, dataset)
    cache = networks.directory()
    folder = args.out or pathlib.Path("runs") / f"backdoor-{dataset.name}-{args.arch}"
    rows: list[dict] = []
    kept = resuming.Rows(folder / "networks.json", "experiments.backdoor", args, dataset)
    for name in args.attack:
        network = scene.network_name(name, args, dataset)
        on_stage = scene.make(name, args, dataset, cache)
        rows += kept.of(network, _rows, on_stage)
        print(f"{on_stage.name}: ACC {rows[-1]['acc']:.2f}, ASR {rows[-1]['asr']:.2f}", flush=True)
        if args.benign and name == args.attack[-1]:
            rows += kept.of(f"{network}/benign", _benign_rows, on_stage, cache)
    results.write_text(folder / "networks.md", table(rows) + "\n")
    print(f"\n{table(rows)}\n\nEverything is in {folder}/ (networks.json, networks.md).")
    return rows


def main(argv: list[str] | None = None) -> int:
    """Entry point; errors of the user's making end in one line and status 2."""
    args = _parser().parse_args(argv)
    return cli.run("experiments.backdoor", lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
