"""Results of a run: one JSON file, written whole or not at all, and its table."""

import json
import os
import pathlib
import platform
from importlib import metadata
from typing import Any

import numpy as np

from awm_jax import metrics


def versions() -> dict[str, str]:
    """Versions of what computes the numbers, and the machine."""
    found = {name: metadata.version(name) for name in ("jax", "jaxlib", "flax", "optax", "numpy")}
    return {"python": platform.python_version(), "machine": platform.machine(),
            "cpus": str(os.cpu_count()), **found}


def write_json(path: pathlib.Path, value: Any) -> None:
    """Writes to a temporary name and renames: a reader never sees half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".tmp{os.getpid()}")
    temporary.write_text(json.dumps(value, indent=1, default=_plain))
    os.replace(temporary, path)


def _plain(value: Any) -> Any:
    """NumPy values as Python ones."""
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, np.generic):
        return value.item()
    return str(value)


def read_cells(path: pathlib.Path) -> dict[str, dict]:
    """Finished cells of an earlier start; a damaged file is set aside, not overwritten."""
    if not path.exists():
        return {}
    try:
        return json.loads(path.read_text())["cells"]
    except (json.JSONDecodeError, KeyError, TypeError):
        aside = path.with_suffix(".damaged.json")
        os.replace(path, aside)
        print(f"{path} could not be read; it is now {aside}, and the run starts over.")
        return {}


def _mean_std(values: list[float]) -> str:
    """'mean±std' with the sample standard deviation; one value stands alone."""
    if len(values) == 1:
        return f"{values[0]:.2f}"
    return f"{np.mean(values):.2f}±{np.std(values, ddof=1):.2f}"


def table(cells: list[dict], num_classes: int) -> str:
    """Markdown table, a row an attack and variant: means and standard deviations over seeds.

    Args:
      cells: finished cells, each with ``attack``, ``variant``, ``before``, ``after``, ``seconds``.
      num_classes: for the success test.

    Returns:
      The table, a line of explanation below it.
    """
    bound = metrics.success_bound(num_classes)
    lines = ["| attack | variant | ACC before | ASR before | ACC after | ASR after "
             "| ASR(all) after | passes | status | s |", "|" + "---|" * 10]
    groups: dict[tuple[str, str], list[dict]] = {}
    for cell in cells:
        groups.setdefault((cell["attack"], cell["variant"]), []).append(cell)
    for (attack, variant), group in groups.items():
        def column(when, what, group=group):
            return _mean_std([cell[when][what] for cell in group])

        passed = sum(cell["after"]["asr_all"] < bound for cell in group)
        status = ",".join(sorted({cell["status"] for cell in group}))
        seconds = np.median([cell["seconds"] for cell in group])
        lines.append(
            f"| {attack} | {variant} | {column('before', 'acc')} | {column('before', 'asr')} | "
            f"{column('after', 'acc')} | {column('after', 'asr')} | {column('after', 'asr_all')} | "
            f"{passed}/{len(group)} | {status} | {seconds:.0f} |"
        )
    lines.append("")
    lines.append(f"In percent. ASR leaves the attacker's class out; ASR(all) counts all test "
                 f"images; 'passes' is the AWM paper's test on the latter, ASR < 1.5/c = "
                 f"{bound:.1f}%. s: median seconds a purification.")
    return "\n".join(lines)
