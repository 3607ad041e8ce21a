"""Ours beside the same algorithms in PyTorch: time, compile time, memory.

    python -m experiments.benchmark [--job purify,train,sweep] [--arch small_vgg,resnet18]
        [--batch 16,32] [--precision all] [--epochs 10] [--reps 5] [--torch_compile]
        [--device cpu|gpu]

Every run is a process of its own, the sides take turns, and the median counts. Needs PyTorch
(``pip install -e '.[torch]'``). Stopped and started again, it goes on.
"""

import argparse
import hashlib
import json
import os
import pathlib
import subprocess
import sys
import time
from importlib import metadata
from typing import Any

import numpy as np

from awm_jax import programs, validate
from awm_jax.command.options import OneLine, positive
from awm_jax.progress import Progress
from experiments import cli, results
from experiments.benchmark_cells import ARCHS, JOBS, LAYERS, Cell

_FLAGS = os.environ.get("XLA_FLAGS", "")  # before this process tunes them for itself
_BUSY = 0.5  # cores that others use
_APART = 0.02  # of means of masks; other random numbers alone gave .939 and .931
_OURS, _TORCH, _COMPILED = "awm_jax", "PyTorch", "torch.compile"


def _batches(text: str) -> tuple[int, ...]:
    """'16,32' as numbers."""
    return tuple(positive(part) for part in text.split(","))


def _cores() -> list[int]:
    """The cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def _parser() -> argparse.ArgumentParser:
    """The options."""
    p = OneLine(prog="python -m experiments.benchmark",
                description="Time our jobs beside the same in PyTorch.")
    p.add_argument("--job", type=cli.several(JOBS, "job"), default=("purify", "train"),
                   help=f"one or more of: {', '.join(JOBS)}; or all (default: purify,train)")
    p.add_argument("--arch", type=cli.several(ARCHS, "architecture"), default=("small_vgg",),
                   help=f"one or more of: {', '.join(ARCHS)}; or all (default: small_vgg)")
    p.add_argument("--batch", type=_batches, default=(16,),
                   help="images a step, one or more numbers (default: 16)")
    p.add_argument("--layers", type=cli.several(LAYERS, "choice of layers"), default=("conv",),
                   help="which convolutions are masked: conv (all of them), deep (those below the "
                   "first resolution), or all for both (default: conv)")
    p.add_argument("--precision", type=cli.several(programs.PRECISIONS, "precision"),
                   default=("float32",),
                   help="of convolutions: float32, bfloat16 (PyTorch under autocast), or all for "
                   "both (default: float32)")
    p.add_argument("--epochs", type=positive,
                   help="epochs timed (default: 10 of purifying, 1 of training)")
    p.add_argument("--images", type=positive,
                   help="clean images of a purification, or a training set's (default: as many as "
                   "--batch but at least 43; 2048)")
    p.add_argument("--seeds", type=positive, default=4,
                   help="purifications of a sweep (default: %(default)s)")
    p.add_argument("--reps", type=positive, default=5, help="runs a side (default: %(default)s)")
    p.add_argument("--threads", type=positive, default=len(_cores()),
                   help="processor cores, of those that there are (default: all)")
    p.add_argument("--torch_compile", action="store_true", help="time torch.compile too")
    p.add_argument("--device", choices=("cpu", "gpu"), default="cpu")
    p.add_argument("--out", type=pathlib.Path, default=pathlib.Path("runs/benchmark"),
                   help="where benchmark.json, .md and .png go (default: %(default)s)")
    p.add_argument("--side", help=argparse.SUPPRESS)
    p.add_argument("--cell", help=argparse.SUPPRESS)
    return p


def _cells(args: argparse.Namespace) -> list[Cell]:
    """What is to be measured."""
    if args.threads > len(_cores()):
        raise ValueError(f"Expected --threads={args.threads} to be at most {len(_cores())}, the "
                         "cores that this process may use.")
    if args.device == "gpu" and "bfloat16" in args.precision:
        raise ValueError("Expected --precision=float32 with --device gpu: convolutions in bfloat16 "
                         "are ours for CPUs, a GPU does its own. Leave --precision out.")
    found = []
    for job in args.job:
        for arch in args.arch:
            for batch in args.batch:
                images = args.images or (2048 if job == "train" else max(43, batch))
                if images < batch:
                    raise ValueError(f"Expected --images={images} to be a --batch ({batch}) at "
                                     "least.")
                found += [Cell(
                    job=job, arch=arch, batch=batch, images=images, device=args.device,
                    epochs=args.epochs or (1 if job == "train" else 10),
                    seeds=args.seeds if job == "sweep" else 1, layers=layers,
                    precision=precision)
                    for layers in (("conv",) if job == "train" else args.layers)
                    for precision in args.precision]
    return found


def one(side: str, cell: Cell, threads: int) -> dict[str, float]:
    """Runs a side's job in this process.

    Args:
      side: 'awm_jax', 'PyTorch' or 'torch.compile'.
      cell: what to measure.
      threads: cores to use; XLA takes as many threads as the process may have cores.

    Returns:
      `Times` as a dictionary.

    Raises:
      ValueError: JAX or PyTorch sees no such device.
    """
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, _cores()[:threads])
    if side == _OURS:
        import jax

        from experiments import benchmark_jax

        programs.tune(cell.precision)

        if jax.default_backend() != cell.device:
            raise ValueError(f"Expected JAX to run on a {cell.device}, it runs on a "
                             f"{jax.default_backend()}. See requirements-cuda.txt, or --device.")

        return benchmark_jax.JOBS[cell.job](cell)._asdict()
    import torch

    from experiments import benchmark_torch

    if cell.device == "gpu" and not torch.cuda.is_available():
        raise ValueError("Expected PyTorch to see a GPU, it does not. Install a build of it for "
                         "CUDA, or --device cpu.")
    torch.set_num_threads(threads)
    return benchmark_torch.JOBS[cell.job](cell, side == _COMPILED)._asdict()


def _measure(side: str, cell: Cell, threads: int) -> dict[str, float]:
    """`one` in a process of its own; ValueError with the end of what it said where it failed."""
    done = subprocess.run(
        [sys.executable, "-m", "experiments.benchmark", "--side", side, "--threads", str(threads),
         "--cell", json.dumps(vars(cell))], capture_output=True, text=True, check=False,
        env={**os.environ, "JAX_ENABLE_COMPILATION_CACHE": "0", "XLA_FLAGS": _FLAGS,
             **({"JAX_PLATFORMS": "cpu"} if cell.device == "cpu" else {})})
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1]
        raise ValueError(f"{side} failed at {cell}: {last}")
    return json.loads(done.stdout.splitlines()[-1])


def _name(cell: Cell, threads: int, versions: dict[str, str]) -> str:
    """A key for a cell's runs: those of other releases are not continued."""
    text = json.dumps([vars(cell), threads, versions], sort_keys=True)
    return f"{cell.job}-{cell.arch}-{cell.batch}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def median(runs: list[dict[str, float]]) -> dict[str, float]:
    """Medians of every figure.

    Example:
      >>> median([{'seconds': 1.0}, {'seconds': 9.0}, {'seconds': 2.0}])
      {'seconds': 2.0}
    """
    return {name: float(np.median([run[name] for run in runs])) for name in runs[0]}


def table(cells: dict[str, dict[str, Any]]) -> str:
    """Markdown: a row a cell and side, ratios to eager PyTorch.

    Args:
      cells: of benchmark.json: each with ``cell`` and ``runs``, a list of times for each side.

    Returns:
      The table; a ratio under 1 means that ours is faster.
    """
    lines = ["| job | network | batch | masked | precision | run as | side | runs | s | s an epoch "
             "| ratio to PyTorch | to its float32 | compiling, s | with that, ratio | peak MiB "
             "| before the job | mean of masks, or loss |", "|" + "---|" * 17]
    for saved in cells.values():
        cell = saved["cell"]
        found = {side: median(runs) for side, runs in saved["runs"].items()}
        full = _seconds(cells, {**saved, "cell": {**cell, "precision": "float32"}})
        for side, m in found.items():
            base = found.get(_TORCH, m)
            whole = (m["seconds"] + m["compiling"]) / (base["seconds"] + base["compiling"])
            each = m["seconds"] / cell["epochs"] / cell["seeds"]
            lines.append(
                f"| {cell['job']} | {cell['arch']} | {cell['batch']} | {_masked(cell)} | "
                f"{_precision(cell)} | {_run_as(saved)} | {side} | {len(saved['runs'][side])} | "
                f"{m['seconds']:.1f} | {each:.3f} | {m['seconds'] / base['seconds']:.2f} | "
                f"{'-' if full is None else format(m['seconds'] / full, '.2f')} | "
                f"{m['compiling']:.1f} | {whole:.2f} | {m['peak']:.0f} | {m['before']:.0f} | "
                f"{m['figure']:.3f} |")
    return "\n".join(lines)


def _seconds(cells: dict[str, dict[str, Any]], wanted: dict[str, Any]) -> float | None:
    """Eager PyTorch's median at a cell and number of threads, None where it was not measured."""
    for saved in cells.values():
        same = {**saved["cell"], "precision": _precision(saved["cell"])} == wanted["cell"]
        if same and saved["threads"] == wanted["threads"] and _TORCH in saved["runs"]:
            return median(saved["runs"][_TORCH])["seconds"]
    return None


def _precision(cell: dict[str, Any]) -> str:
    """Of a cell; 'float32' in a benchmark.json older than that choice."""
    return cell.get("precision", "float32")


def _run_as(saved: dict[str, Any]) -> str:
    """What else decides the times."""
    cell = saved["cell"]
    sweep = f", {cell['seeds']} seeds" if cell["job"] == "sweep" else ""
    return (f"{cell['device']}, {saved['threads']} threads, {cell['images']} images, "
            f"{cell['epochs']} epochs{sweep}")


def _masked(cell: dict[str, Any]) -> str:
    """Which convolutions a job masks; 'conv' in a benchmark.json older than that choice."""
    return "-" if cell["job"] == "train" else cell.get("layers", "conv")


def _draw(path: pathlib.Path, cells: dict[str, dict[str, Any]]) -> None:
    """Bars of seconds an epoch, a group a cell."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1.6 + 1.8 * len(cells), 3.2), layout="constrained")
    axis = figure.subplots()
    sides = list(dict.fromkeys(side for saved in cells.values() for side in saved["runs"]))
    for i, side in enumerate(sides):
        at = [(n, median(saved["runs"][side])["seconds"] / saved["cell"]["epochs"]
               / saved["cell"]["seeds"])
              for n, saved in enumerate(cells.values()) if side in saved["runs"]]
        axis.bar([n + 0.8 * (i + 0.5) / len(sides) - 0.4 for n, _ in at], [v for _, v in at],
                 0.8 / len(sides), label=side)
    axis.set_xticks(range(len(cells)), [
        f"{s['cell']['job']}, masked: {_masked(s['cell'])}\n"
        f"{s['cell']['arch']}, {s['cell']['batch']}\n{_precision(s['cell'])}"
        for s in cells.values()], fontsize=8)
    axis.set_ylabel("s an epoch")
    axis.grid(axis="y", alpha=0.3)
    axis.legend()
    figure.savefig(path, dpi=120)


def run(args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """The whole benchmark; returns the cells of benchmark.json."""
    cells, path = _cells(args), args.out / "benchmark.json"
    validate.writable(path)
    kept = _earlier(path)
    versions = {**results.versions(), "torch": _torch_version(), "commit": results.commit()}
    sides = [_TORCH, _OURS, *([_COMPILED] if args.torch_compile else [])]
    bar = Progress("measuring", len(cells) * args.reps * len(sides))
    done, busy = 0, _load() > _BUSY
    for cell in cells:
        name = _name(cell, args.threads, versions)
        saved = kept.setdefault(name, {
            "cell": vars(cell), "threads": args.threads, "versions": versions, "runs": {}})
        saved["busy"] = saved.get("busy", False) or busy
        for rep in range(args.reps):
            for side in sides:
                runs = saved["runs"].get(side, [])
                done += 1
                if rep >= len(runs):
                    saved["runs"][side] = runs = [*runs, _measure(side, cell, args.threads)]
                    with results.locked(path):  # another run may have added cells
                        kept = {**_earlier(path), name: saved}
                        results.write_json(path, {"cells": kept})
                    bar.update(done, seconds=runs[-1]["seconds"])
    (args.out / "benchmark.md").write_text(table(kept) + "\n")
    _draw(args.out / "benchmark.png", kept)
    print(f"\n{table(kept)}\n")
    for warning in _warnings(kept):
        print(warning)
    print(f"Everything is in {args.out}/ (benchmark.json, benchmark.md, benchmark.png).")
    return kept


def _warnings(cells: dict[str, dict[str, Any]]) -> list[str]:
    """What makes figures doubtful: other work beside them, or sides that did not do the same."""
    said = []
    busy = [name for name, saved in cells.items() if saved["busy"]]
    if busy:
        said.append(f"The machine was busy at the start of {', '.join(busy)}: such ratios say "
                    "little, as PyTorch's threads suffer more. Run again when it is idle, with "
                    "another --out.")
    for name, saved in cells.items():
        means = [median(runs)["figure"] for runs in saved["runs"].values()]
        if saved["cell"]["job"] != "train" and max(means) - min(means) > _APART:
            said.append(f"The masks of {name} ended at {min(means):.3f} and {max(means):.3f} on "
                        "average: the sides did not do the same, and their times say nothing.")
    return said


def _load() -> float:
    """How many cores others use now: over a second where /proc/stat is, otherwise over a minute.

    The average of a minute remembers this command's last start, which is no other job.
    """
    stat = pathlib.Path("/proc/stat")
    if not stat.exists():
        return os.getloadavg()[0]
    before = _jiffies(stat.read_text())
    time.sleep(1.0)
    idle, total = (b - a for a, b in zip(before, _jiffies(stat.read_text()), strict=True))
    return (os.cpu_count() or 1) * (1 - idle / max(total, 1))


def _jiffies(stat: str) -> tuple[int, int]:
    """Idle (waiting for a disk too) and all time since the start, of /proc/stat's first line."""
    fields = [int(field) for field in stat.splitlines()[0].split()[1:9]]
    return fields[3] + fields[4], sum(fields)


def _earlier(path: pathlib.Path) -> dict[str, dict[str, Any]]:
    """The cells of an earlier start; ValueError for a file that holds none."""
    if not path.exists():
        return {}
    try:
        cells = json.loads(path.read_text())["cells"]
        table(cells), _warnings(cells)  # all that is read of it later
        return cells
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"Expected {path} to hold a benchmark of this release, it does not "
                         f"({type(error).__name__}: {error}). Move it away, or choose another "
                         "--out.") from error


def _torch_version() -> str:
    """PyTorch's version; ImportError where there is none to compare with."""
    try:
        return metadata.version("torch")
    except metadata.PackageNotFoundError as error:
        raise ImportError("Expected PyTorch, which ours is compared with: "
                          "pip install -e '.[torch]'") from error


def main(argv: list[str] | None = None) -> int:
    """Entry point; errors of the user's making end in one line and status 2."""
    args = _parser().parse_args(argv)
    if args.side:
        print(json.dumps(one(args.side, Cell(**json.loads(args.cell)), args.threads)))
        return 0
    return cli.run("experiments.benchmark", lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
