"""One table out of several run directories of `experiments.oneshot`.

    python -m experiments.merge runs/some-attacks runs/other-attacks --out table.md

Runs that were split (by attack, by defence, over machines) are read from their results.json, and
from results-host<i>.json where several hosts wrote into one directory; of a purification that is in
several files, the first is taken. Runs on other data sets, architectures or numbers of clean
images, and of one attack and defence on several networks or with several settings, are refused:
their figures do not belong into one mean.
"""

import json
import pathlib
import sys

from awm_jax import data, validate
from awm_jax.command.options import OneLine
from experiments import cli, hosts, results


def merged(paths: list[pathlib.Path]) -> tuple[list[dict], int]:
    """Cells of several runs, and how many classes their data set has.

    Args:
      paths: run directories, each with a results.json.

    Returns:
      ``(cells, num_classes)``, defences and attacks in the order of their first appearance.

    Raises:
      FileNotFoundError: a directory without results.
      ValueError: runs that do not belong together, or a file that is no run's.
    """
    cells: dict[tuple, dict] = {}
    alike: dict[tuple, set[str]] = {}
    kinds, counts = set(), set()
    files = []
    for path in paths:
        if not (found := hosts.results_files(path)):
            raise FileNotFoundError(f"Expected {path / 'results.json'} or results-host<i>.json "
                                    f"there, found none. Is {path} a run directory?")
        files += found
    for file in files:
        try:
            run = json.loads(file.read_text())
            counts.add(run.get("num_classes"))
            for name, cell in run["cells"].items():
                alike.setdefault((cell["attack"], cell["defence"]), set()).add(
                    name.rpartition("/")[0])
                results.whole(cell, "der")
                kinds.add((run["dataset"], run["arch"], str(cell["samples"])))
                cells.setdefault((cell["attack"], cell["defence"], cell["seed"]), cell)
        except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"Expected {file} to be written by experiments.oneshot; it is damaged "
                             f"or of another kind ({type(error).__name__}: {error}).") from error
    if len(kinds) != 1:
        raise ValueError("Expected runs on one data set, network and number of clean images, got: "
                         + "; ".join(", ".join(kind) for kind in sorted(kinds)) + ".")
    for (attack, defence), names in alike.items():
        if len(names) > 1:
            raise ValueError(f"Expected one network and one choice of settings of {attack}, "
                             f"{defence}, got {' and '.join(sorted(names))}. Run them with an "
                             "--out each, and merge them apart.")
    # Runs of before folders and parts of data sets do not say it; a name did.
    known = next(filter(None, counts), None)
    return list(cells.values()), known or data.num_classes(kinds.pop()[0])


def main(argv: list[str] | None = None) -> int:
    """Entry point; errors of the user's making end in one line and status 2."""
    parser = OneLine(prog="python -m experiments.merge",
                     description="One table out of several run directories.")
    parser.add_argument("runs", nargs="+", type=pathlib.Path, help="run directories")
    parser.add_argument("--out", type=pathlib.Path, help="file for the table, beside printing it")
    args = parser.parse_args(argv)

    def job():
        if args.out is not None:
            validate.writable(args.out)
        text = results.report(*merged(args.runs))
        if args.out is not None:
            results.write_text(args.out, text + "\n")
        print(text)

    return cli.run("experiments.merge", job)


if __name__ == "__main__":
    sys.exit(main())
