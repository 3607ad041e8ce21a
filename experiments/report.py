"""Render the papers' tables from what has been run, the paper's figures beside ours.

    python -m experiments.report --runs runs/tables --out docs/results

Writes a Markdown file a table, one page of HTML with all of them, a README.md that says how many
cells there are and how many pass, and figures.json: the figures alone, small enough for git, from
which the same pages are rendered where the runs themselves are gone.
"""

import argparse
import html
import json
import pathlib
import subprocess
import sys
from typing import Any, NamedTuple

import numpy as np

from awm_jax import metrics
from awm_jax.data import num_classes
from experiments import cli, results, table_cells, tables
from experiments.table_cells import TABLES, Cell, Table

_KEPT = ("acc", "asr", "asr_all")
_MISSING = "missing"


class Entry(NamedTuple):
    """Ours in one place of a table.

    Args:
      acc: ACC of each seed, in percent.
      asr: ASR(all) of each seed.
      passed: how many pass the AWM paper's test.
    """

    acc: list[float]
    asr: list[float]
    passed: int


def figures(runs: pathlib.Path, earlier: dict[str, Any]) -> dict[str, Any]:
    """The figures of every cell that was run, by a name of its own.

    Args:
      runs: the directory of `experiments.tables`.
      earlier: what figures.json held; a new run of a cell replaces it.

    Returns:
      Cells as figures.json keeps them.
    """
    found, kept = tables.read(runs), dict(earlier)
    commit = _commit()
    seeds = 1 + max((key[3] for run in found.values() for key in run["done"]), default=0)
    for cell in table_cells.cells(tuple(TABLES), seeds):
        done = tables.result(cell, found, runs)
        if done is not None:
            run = found[tables.folder(cell, runs)]
            new = {"status": done["status"], "seconds": round(done["seconds"], 1),
                   "versions": run["versions"],
                   **{when: {k: round(done[when][k], 2) for k in _KEPT}
                      for when in ("before", "after")}}
            old = kept.get(_name(cell), {})
            # The commit that a figure was rendered at first, as near as a run's own as is known.
            same = all(old.get(k) == v for k, v in new.items())
            kept[_name(cell)] = {**new, "commit": old["commit"] if same else commit}
    return kept


def _name(cell: Cell) -> str:
    """A cell's key in figures.json: what it is, whichever table it stands in."""
    table = TABLES[cell.table]
    return "/".join(map(str, (table.dataset, table.arch, cell.attack, cell.samples,
                              cell.column.defence, *cell.column.options, cell.seed)))


def _commit() -> str:
    """Of this checkout, 'unknown' outside one."""
    try:
        done = subprocess.run(["git", "-C", str(pathlib.Path(__file__).parent), "rev-parse",
                               "--short", "HEAD"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip()


def _places(name: str, kept: dict[str, Any]) -> dict[tuple, Entry]:
    """Ours by (attack, samples, heading)."""
    bound = metrics.success_bound(num_classes(TABLES[name].dataset))
    found: dict[tuple, list[dict]] = {}
    seeds = 1 + max((int(key.rpartition("/")[2]) for key in kept), default=0)
    for cell in table_cells.cells((name,), seeds):
        if _name(cell) in kept:
            place = (cell.attack, cell.samples, cell.column.heading)
            found.setdefault(place, []).append(kept[_name(cell)])
    return {place: Entry([c["after"]["acc"] for c in cells],
                         [c["after"]["asr_all"] for c in cells],
                         sum(c["after"]["asr_all"] < bound for c in cells))
            for place, cells in found.items()}


def _entry(ours: Entry | None, paper: tuple[float, float] | None, bound: float) -> list[str]:
    """The paper's, ours, the difference."""
    theirs = "-" if paper is None else (f"{paper[0]:.1f} / {paper[1]:.1f}"
                                        f"{' ✓' if paper[1] < bound else ''}")
    if ours is None:
        return [theirs, _MISSING, "-"]
    mark = "✓" if ours.passed == len(ours.acc) else f"{ours.passed}/{len(ours.acc)}"
    mine = f"{results.mean_std(ours.acc, 1)} / {results.mean_std(ours.asr, 1)} {mark}"
    if paper is None:
        return [theirs, mine, "-"]
    return [theirs, mine, " / ".join(f"{np.mean(values) - value:+.1f}" for values, value in
                                     zip(ours[:2], paper, strict=True))]


def _rows(name: str, kept: dict[str, Any]) -> list[list[str]]:
    """A table's head and body, in cells."""
    table, ours = TABLES[name], _places(name, kept)
    bound = metrics.success_bound(num_classes(table.dataset))
    rows = [["attack", "n", *(f"{c.heading}: {what}" for c in table.columns
                              for what in ("paper", "ours", "difference"))]]
    for attack in table.attacks:
        rows.append([attack, "before", *(_before(attack, table, kept)
                                         + [""] * (3 * len(table.columns) - 3))])
        for samples in table.samples:
            row = [attack, str(samples)]
            for column in table.columns:
                place = (attack, samples, column.heading)
                row += _entry(ours.get(place), table.paper.get(place), bound)
            rows.append(row)
    return rows


def _before(attack: str, table: Table, kept: dict[str, Any]) -> list[str]:
    """The suspect network: the paper's, ours, the difference."""
    paper = table.before[attack]
    start = f"{table.dataset}/{table.arch}/{attack}/"
    found = next((c["before"] for key, c in kept.items() if key.startswith(start)), None)
    theirs = f"{paper[0]:.1f} / {paper[1]:.1f}"
    if found is None:
        return [theirs, _MISSING, "-"]
    return [theirs, f"{found['acc']:.1f} / {found['asr_all']:.1f}",
            f"{found['acc'] - paper[0]:+.1f} / {found['asr_all'] - paper[1]:+.1f}"]


def _markdown(rows: list[list[str]]) -> str:
    """Rows as a Markdown table."""
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


def _legend(table: Table) -> str:
    """What a reader must know."""
    bound = metrics.success_bound(num_classes(table.dataset))
    return (f"ACC / ASR in percent, ASR over all test images as in the paper; ours: mean±standard "
            f"deviation over seeds. ✓ the paper's success test, ASR < 1.5/c = {bound:.1f}; k/n: "
            f"passed by k of n seeds. {table.note}").strip()


def _count(name: str, kept: dict[str, Any]) -> dict[str, Any]:
    """A table's figures for the front page."""
    table, ours = TABLES[name], _places(name, kept)
    bound = metrics.success_bound(num_classes(table.dataset))
    places = [(a, n, c.heading) for a in table.attacks for n in table.samples
              for c in table.columns]
    both = [p for p in places if p in ours and p in table.paper]
    return {"title": table.title, "places": len(places), "found": sum(p in ours for p in places),
            "seeds": sorted({len(ours[p].acc) for p in places if p in ours}), "both": len(both),
            "ours": sum(np.mean(ours[p].asr) < bound for p in both),
            "paper": sum(table.paper[p][1] < bound for p in both),
            "acc": [float(np.mean(ours[p].acc) - table.paper[p][0]) for p in both]}


def _front(kept: dict[str, Any]) -> str:
    """README.md: what there is, and how it compares."""
    lines = ["# The papers' tables", "",
             "Written by `python -m experiments.report`; the purifications by `python -m "
             "experiments.tables`, one seed of every cell before the second of any, cheap cells "
             "first. What was not run is shown as missing.", "",
             "| table | places filled | seeds | compared | pass: ours | pass: paper | "
             "ACC, ours less paper |", "|" + "---|" * 7]
    for name in TABLES:
        n = _count(name, kept)
        seeds = "-".join(map(str, sorted({n["seeds"][0], n["seeds"][-1]}))) if n["seeds"] else "-"
        acc = f"{np.mean(n['acc']):+.1f}" if n["acc"] else "-"
        lines.append(f"| [{n['title']}]({name}.md) | {n['found']} of {n['places']} | {seeds} | "
                     f"{n['both']} | {n['ours']} | {n['paper']} | {acc} |")
    made = sorted({json.dumps(c["versions"], sort_keys=True) for c in kept.values()})
    lines += ["", "A place passes if the mean ASR over seeds and all test images is below 1.5/c. "
              "Hardware and versions: "
              + ("; ".join(", ".join(f"{k} {v}" for k, v in json.loads(m).items()) for m in made)
                 or "none yet") + "."]
    commits = sorted({c["commit"] for c in kept.values()})
    lines.append(f"Commits: {', '.join(commits) or 'none yet'}.")
    return "\n".join(lines) + "\n"


def _page(kept: dict[str, Any]) -> str:
    """All tables as one page without scripts."""
    parts = []
    for name, table in TABLES.items():
        head, *body = _rows(name, kept)
        cells = "".join(f"<th>{html.escape(c)}</th>" for c in head)
        parts.append(f"<h2>{html.escape(table.title)}</h2><p>{html.escape(_legend(table))}</p>"
                     f"<div class=t><table><tr>{cells}</tr>"
                     + "".join("<tr>" + "".join(f"<td>{html.escape(c)}</td>" for c in row) + "</tr>"
                               for row in body) + "</table></div>")
    return ("<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport "
            "content='width=device-width'><title>The papers' tables</title><style>body{font:16px "
            "sans-serif;margin:1em;color-scheme:light dark}.t{overflow-x:auto}table{border-collapse"
            ":collapse}td,th{padding:.2em .6em;border-bottom:1px solid #8888;white-space:nowrap}"
            "</style><h1>The papers' tables</h1>" + "".join(parts) + "</html>\n")


def run(args: argparse.Namespace) -> None:
    """Writes everything; a reader never sees half a file."""
    path = args.out / "figures.json"
    try:
        earlier = json.loads(path.read_text())["cells"] if path.exists() else {}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"Expected {path} to be written by experiments.report, it is damaged "
                         f"({error}). Move it away.") from error
    kept = figures(args.runs, earlier)
    results.write_json(path, {"cells": kept})
    texts = {"README.md": _front(kept), "tables.html": _page(kept)}
    for name, table in TABLES.items():
        texts[f"{name}.md"] = (f"# {table.title}\n\n{_legend(table)}\n\n"
                               f"{_markdown(_rows(name, kept))}\n")
    for name, text in texts.items():
        results.write_text(args.out / name, text)
    print(f"{len(kept)} purifications are in {args.out}/ (README.md, tables.html, figures.json).")


def main(argv: list[str] | None = None) -> int:
    """Entry point; errors of the user's making end in one line and status 2."""
    p = argparse.ArgumentParser(prog="python -m experiments.report",
                                description="Render the papers' tables from what has been run.")
    p.add_argument("--runs", type=pathlib.Path, default=tables.RUNS,
                   help="run directories of experiments.tables (default: %(default)s)")
    p.add_argument("--out", type=pathlib.Path, default=pathlib.Path("docs/results"),
                   help="where the pages go (default: %(default)s)")
    args = p.parse_args(argv)
    return cli.run("experiments.report", lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
