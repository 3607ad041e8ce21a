"""Results of a run: one JSON file, written whole or not at all, and its table."""

import contextlib
import functools
import itertools
import json
import os
import pathlib
import platform
import subprocess
from collections.abc import Iterator, Sequence
from importlib import metadata
from typing import Any

import jax
import numpy as np

from awm_jax import metrics, programs, whole_files
from awm_jax.data import Dataset
from awm_jax.defences import DEFENCES
from experiments import pages
from experiments.pages import Rows

SCORES = ("acc", "asr", "asr_all")  # what tables show of a network, in percent


def versions() -> dict[str, str]:
    """Versions of what computes the numbers, and the machine."""
    found = {name: metadata.version(name) for name in ("jax", "jaxlib", "flax", "optax", "numpy")}
    return {"python": platform.python_version(), "machine": platform.machine(),
            "cpus": str(os.cpu_count()), **found, "convolutions": convolutions()}


def convolutions() -> str:
    """How a run computed convolutions: its networks' and its defences', not its scores'."""
    return programs.convolutions() if jax.default_backend() == "cpu" else "native"


@functools.cache
def commit() -> str:
    """The commit of this checkout, ``-dirty`` where files differ from it, 'unknown' outside one."""
    try:
        done = subprocess.run(["git", "-C", str(pathlib.Path(__file__).parent), "describe",
                               "--always", "--dirty", "--exclude", "*"],
                              capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip()


def about(dataset: Dataset) -> dict[str, Any]:
    """What the files of results say of their data set."""
    return {"dataset": dataset.name, "num_classes": dataset.num_classes,
            "class_names": list(dataset.class_names)}


def write_text(path: pathlib.Path, text: str) -> None:
    """A reader never sees half a file."""
    with whole_files.writing(path) as temporary:
        temporary.write_text(text)


def set_aside(path: pathlib.Path) -> None:
    """Renames what an earlier run left where a new one is going to write, and says so.

    Whatever is asked of a command next, nothing is lost.
    """
    if path.exists():
        names = (path.with_suffix(f".earlier{i or ''}{path.suffix}") for i in itertools.count())
        aside = next(name for name in names if not name.exists())
        os.replace(path, aside)
        print(f"What {path} held is now {aside}.", flush=True)


def write_json(path: pathlib.Path, value: Any) -> None:
    """A value as JSON, NumPy's among it, as `write_text` writes."""
    write_text(path, json.dumps(value, indent=1, default=_plain))


def _plain(value: Any) -> Any:
    """NumPy values as Python ones."""
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, np.generic):
        return value.item()
    return str(value)


@contextlib.contextmanager
def locked(path: pathlib.Path) -> Iterator[None]:
    """While within, others who ask for the same wait; where the system has no such locks, nothing.

    Args:
      path: a file that several runs may rewrite; the lock is a file beside it, left empty.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_name(f".{path.name}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def read_cells(path: pathlib.Path, dataset: str, arch: str) -> dict[str, dict]:
    """Finished cells of an earlier start; a damaged file is set aside, not overwritten.

    Raises:
      ValueError: the file is of another data set or architecture.
    """
    if not path.exists():
        return {}
    try:
        found = json.loads(path.read_text())
        cells, kind = found["cells"], (found["dataset"], found["arch"])
    except (json.JSONDecodeError, KeyError, TypeError):
        names = (path.with_suffix(f".damaged{i or ''}.json") for i in itertools.count())
        aside = next(name for name in names if not name.exists())
        os.replace(path, aside)
        print(f"{path} could not be read; it is now {aside}, and the run starts over.")
        return {}
    if kind != (dataset, arch):
        raise ValueError(f"Expected {path} to hold runs of {dataset}, {arch}; it has runs of "
                         f"{', '.join(kind)}. Choose another --out, or put them aside with "
                         "--fresh.")
    return cells


def having(found: dict[str, Any], *names: str) -> dict[str, Any]:
    """What a file has, as it is; KeyError where a part of it is missing.

    Example:
      >>> having({'a': 1}, 'a')
      {'a': 1}
    """
    missing = [name for name in names if name not in found]
    if missing:
        raise KeyError(", ".join(missing))
    return found


def whole(cell: dict[str, Any], *names: str) -> dict[str, Any]:
    """A purification as a file has it, as it is; KeyError where what tables need is missing.

    Args:
      cell: the purification.
      names: what it must have besides status, seconds and scores.

    Example: `whole(cell, 'commit')`.
    """
    having(cell, "status", "seconds", "before", "after", *names)
    for when in ("before", "after"):
        having(cell[when], *SCORES)
    return cell


def mean_std(values: Sequence[float] | np.ndarray, digits: int = 2) -> str:
    """'mean±std' with the sample standard deviation; one value stands alone."""
    if len(values) == 1:
        return f"{values[0]:.{digits}f}"
    return f"{np.mean(values):.{digits}f}±{np.std(values, ddof=1):.{digits}f}"


def apart(names: Sequence[str], details: Sequence[str]) -> list[str]:
    """Names, followed by their details where one name is of things that differ in them.

    Example:
      >>> apart(['a', 'b', 'a'], ['1', '1', '2'])
      ['a (1)', 'b', 'a (2)']
    """
    meant: dict[str, set[str]] = {}
    for name, detail in zip(names, details, strict=True):
        meant.setdefault(name, set()).add(detail)
    return [f"{name} ({detail})" if len(meant[name]) > 1 else name
            for name, detail in zip(names, details, strict=True)]


def several_networks(cells: Sequence[dict[str, Any]]) -> str:
    """A mark where purifications are of more than one training of a network, else nothing.

    Example:
      >>> one, other = ({'before': {'acc': acc}} for acc in (98., 97.))
      >>> several_networks([one, one]), several_networks([one, other])
      ('', ' †')
    """
    return " †" if any(cell["before"] != cells[0]["before"] for cell in cells) else ""


def _groups(cells: list[dict]) -> dict[tuple[str, str], list[dict]]:
    """Cells by attack and defence, in order."""
    groups: dict[tuple[str, str], list[dict]] = {}
    for cell in cells:
        groups.setdefault((cell["attack"], cell["defence"]), []).append(cell)
    return groups


def table(cells: list[dict], num_classes: int) -> str:
    """Markdown table, a row an attack and defence: means and standard deviations over seeds.

    Args:
      cells: finished cells, each with ``attack``, ``defence``, ``before``, ``after``, ``der``,
        ``status`` and ``seconds``.
      num_classes: for the success test.

    Returns:
      The table, a line of explanation below it.
    """
    bound = metrics.success_bound(num_classes)
    lines = ["| attack | defence | ACC before | ASR before | ACC after | ASR after "
             "| ASR(all) after | RA after | DER | passes | status | s |", "|" + "---|" * 12]
    for (attack, defence), group in _groups(cells).items():
        def column(when, what, group=group):
            return mean_std([cell[when][what] for cell in group])

        passed = sum(cell["after"]["asr_all"] < bound for cell in group)
        status = ",".join(sorted({cell["status"] for cell in group}))
        seconds = np.median([cell["seconds"] for cell in group])
        lines.append(
            f"| {attack} | {defence} | {column('before', 'acc')} | {column('before', 'asr')} | "
            f"{column('after', 'acc')} | {column('after', 'asr')} | {column('after', 'asr_all')} | "
            f"{column('after', 'recovered')} | {mean_std([cell['der'] for cell in group])} | "
            f"{passed}/{len(group)} | {status} | {seconds:.0f} |"
        )
    lines.append("")
    lines.append(f"In percent. ASR leaves the attacker's class out; ASR(all) counts all test "
                 f"images; RA: triggered images given their true class; DER: defence "
                 f"effectiveness rating, 50 where nothing changed; 'passes' is the AWM paper's "
                 f"test on ASR(all), < 1.5/c = {bound:.1f}%. s: median seconds a purification.")
    return "\n".join(lines)


def matrix(cells: list[dict]) -> Rows:
    """A row a defence and a column an attack, each 'ACC / ASR / DER'.

    Args:
      cells: as `table` takes them.

    Returns:
      The table, its head first; means and standard deviations over seeds, `several_networks`
      behind them; a dash where nothing was run.
    """
    groups = _groups(cells)
    attacks = list(dict.fromkeys(attack for attack, _ in groups))

    def before(attack):
        first = next(group[0] for (other, _), group in groups.items() if other == attack)
        return f"{first['before']['acc']:.1f} / {first['before']['asr']:.1f}"

    rows = [["ACC / ASR / DER", *attacks], ["before", *map(before, attacks)]]
    for defence in dict.fromkeys(defence for _, defence in groups):
        def entry(attack, defence=defence):
            group = groups.get((attack, defence))
            if not group:
                return "-"
            return " / ".join(mean_std(values, 1) for values in (
                [cell["after"]["acc"] for cell in group], [cell["after"]["asr"] for cell in group],
                [cell["der"] for cell in group])) + several_networks(group)

        rows.append([defence, *map(entry, attacks)])
    return rows


_NEEDS = {"clean": "clean images", "nothing": "none", "training": "poisoned training set"}


def summary(cells: list[dict]) -> Rows:
    """A row a defence: what it is, what it needs, what it does on average.

    Args:
      cells: as `table` takes them.

    Returns:
      The table, its head first; each figure is a mean over attacks of means over seeds.
    """
    groups = _groups(cells)
    rows = [["defence", "paper", "data", "s", "ACC", "ASR", "DER", "attacks", "seeds"]]
    for name in dict.fromkeys(defence for _, defence in groups):
        mine = [group for (_, defence), group in groups.items() if defence == name]

        def mean(value, mine=mine):
            return np.mean([np.mean([value(cell) for cell in group]) for group in mine])

        defence = DEFENCES.get(name)
        paper = "" if defence is None else defence.paper
        needs = "" if defence is None else _NEEDS[defence.needs]
        seconds = np.median([cell["seconds"] for group in mine for cell in group])
        seeds = sorted({len(group) for group in mine})
        rows.append([
            f"`{name}`", paper, needs, f"{seconds:.0f}",
            f"{mean(lambda cell: cell['after']['acc']):.1f}",
            f"{mean(lambda cell: cell['after']['asr']):.1f}",
            f"{mean(lambda cell: cell['der']):.1f}", str(len(mine)),
            "-".join(map(str, sorted({seeds[0], seeds[-1]})))])
    return rows


def report(cells: list[dict], num_classes: int) -> str:
    """`table`, and above it `summary` and `matrix` where there is more than one defence."""
    text = table(cells, num_classes)
    several = len({cell["defence"] for cell in cells}) > 1
    above = [pages.rows_of(rows) for rows in (summary(cells), matrix(cells))] if several else []
    return "\n\n".join([*above, text])
