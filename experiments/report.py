"""Render the papers' tables and figures from what has been run, the papers' numbers beside ours.

    python -m experiments.report --runs runs/tables --out runs/report

Writes a Markdown file a table and a figure, one page of HTML with all of them, a README.md that
says how many cells there are and how many pass, and figures.json: the numbers alone, small enough
for git, from which the same pages and pictures are rendered where the runs themselves are gone.
README.md begins with what findings.md says beside it, which is written by hand: what reproduces,
what does not, and why.
"""

import argparse
import json
import pathlib
import sys
from typing import Any

import numpy as np

from awm_jax import metrics
from awm_jax.command.options import OneLine
from experiments import cli, kept, pages, report_defences, report_figures, results, tables
from experiments.kept import Kept
from experiments.pages import Heading, Page, Rows
from experiments.table_cells import OWN, TABLES, Scores, Table

_MISSING, _LACKING = "missing", "not available here"
_ASR = {"asr_all": "ASR over all test images", "asr": "ASR without the images of the attacker's "
        "class"}


def _bound(table: Table) -> float:
    """The AWM paper's success test."""
    return metrics.success_bound(table.classes)


def _numbers(values: Scores) -> str:
    """The paper's, or a difference's parts."""
    return " / ".join(f"{value:.1f}" for value in values)


def _entry(ours: list[dict[str, Any]] | None, paper: Scores | None, table: Table) -> list[str]:
    """The paper's, ours, the difference."""
    bound = _bound(table)
    theirs = "-" if paper is None else _numbers(paper) + (" ✓" if paper[1] < bound else "")
    if ours is None:
        return [theirs, _MISSING, "-"]
    mine = [[kept.measured(entry, measure) for entry in ours] for measure in table.measures]
    passed = sum(value < bound for value in mine[1])
    mark = "✓" if passed == len(ours) else f"{passed}/{len(ours)}"
    shown = " / ".join(results.mean_std(values, 1) for values in mine) + f" {mark}"
    shown += results.several_networks(ours)
    if paper is None:
        return [theirs, shown, "-"]
    return [theirs, shown, " / ".join(f"{np.mean(values) - value:+.1f}"
                                      for values, value in zip(mine, paper, strict=True))]


def _rows(name: str, arch: str, cells: dict[str, Any]) -> Rows:
    """A table's head and body."""
    table, ours = TABLES[name], kept.places(name, arch, cells)
    rows = [["attack", "n", *(f"{c.heading}: {what}" for c in table.columns
                              for what in ("paper", "ours", "difference"))]]
    for attack in table.attacks:
        before = _before(attack, table, ours)
        rows.append([attack, "before", *before, *[""] * (3 * len(table.columns) - 3)])
        for samples in table.samples:
            row = [attack, str(samples)]
            for column in table.columns:
                place = (attack, samples, column.heading)
                entry = _entry(ours.get(place), table.paper.get(place), table)
                row += [entry[0], _LACKING, "-"] if column.lacking else entry
            rows.append(row)
    return rows


def _before(attack: str, table: Table, ours: dict[tuple, list[dict]]) -> list[str]:
    """The suspect network: the paper's, ours, the difference."""
    paper, measures = table.before[attack], table.measures[:2]
    found = next((entries[0]["before"] for place, entries in ours.items() if place[0] == attack),
                 None)
    if found is None:
        return [_numbers(paper), _MISSING, "-"]
    mine = tuple(found[measure] for measure in measures)
    return [_numbers(paper), _numbers(mine),
            " / ".join(f"{m - p:+.1f}" for m, p in zip(mine, paper, strict=True))]


def _legend(table: Table, arch: str, rows: Rows) -> str:
    """What a reader of these rows must know."""
    lacking = [f"{c.heading} is not available here: {c.lacking}." for c in table.columns
               if c.lacking]
    other = (f"The paper's figures are of {table.arch}, ours of {arch}: what they share is the "
             "success test, not the accuracy." if arch != table.arch else "")
    der = " / DER" if "der" in table.measures else ""
    text = (f"ACC / ASR{der} in percent, {_ASR[table.measures[1]]} as in the paper; ours: "
            f"mean±standard deviation over seeds. ✓ the AWM paper's success test, ASR < 1.5/c = "
            f"{_bound(table):.1f}; k/n: passed by k of n seeds.")
    mixed = ("† seeds of several trainings of the network, of which the first one's scores before "
             "are shown." if any("†" in cell for row in rows for cell in row) else "")
    return " ".join(part for part in (text, mixed, other, *lacking, table.note) if part)


def _page(name: str, cells: dict[str, Any]) -> Page:
    """A table, once for each network that was run."""
    table, found = TABLES[name], kept.networks(name, cells)
    page = Page(table.title, [])
    for arch in found:
        if len(found) > 1:
            page.blocks.append(Heading(arch))
        rows = _rows(name, arch, cells)
        page.blocks.extend([_legend(table, arch, rows), rows])
    return page


def _count(name: str, arch: str, cells: dict[str, Any]) -> list[str]:
    """A table's row of the front page."""
    table, ours = TABLES[name], kept.places(name, arch, cells)
    every = [(a, n, c.heading) for a in table.attacks for n in table.samples
             for c in table.columns if not c.lacking]
    both = [place for place in every if place in ours and place in table.paper]
    seeds = sorted({len(ours[place]) for place in every if place in ours})

    def mean(place, measure):
        return float(np.mean([kept.measured(entry, measure) for entry in ours[place]]))

    passed = sum(mean(place, table.measures[1]) < _bound(table) for place in both)
    theirs = sum(table.paper[place][1] < _bound(table) for place in both)
    acc = [mean(place, "acc") - table.paper[place][0] for place in both]
    return [f"[{table.title}]({name}.md)", arch, f"{len(set(every) & set(ours))} of {len(every)}",
            "-".join(map(str, sorted({seeds[0], seeds[-1]}))) if seeds else "-", str(len(both)),
            str(passed), str(theirs), f"{np.mean(acc):+.1f}" if acc else "-"]


def _front(held: Kept, drawn: Rows, findings: pathlib.Path) -> Page:
    """README.md: what we make of it, what there is, and how it compares."""
    rows = [["table", "network", "places filled", "seeds", "compared", "pass: ours",
             "pass: paper", "ACC, ours less paper"]]
    begun = [(name, arch) for name in TABLES for arch in kept.networks(name, held.cells)
             if kept.places(name, arch, held.cells)]
    rows += [_count(name, arch, held.cells) for name, arch in begun]
    others = [f"[{table.title}]({name}.md)" for name, table in TABLES.items()
              if name not in dict(begun)]
    everything = [*held.cells.values(), *held.measured.values()]
    made = sorted({json.dumps(c["versions"], sort_keys=True) for c in everything})
    commits = sorted({c["commit"] for c in held.cells.values()} | {
        row["commit"] for run in held.measured.values() for row in run["rows"] if "commit" in row})
    versions = "; ".join(", ".join(f"{k} {v}" for k, v in json.loads(m).items()) for m in made)
    said = [findings.read_text().strip()] if findings.exists() else []
    return Page("The papers' tables and figures", [
        *said,
        "Written by `python -m experiments.report`; the purifications by `python -m "
        "experiments.tables`, one seed of every cell before the second of any, cheap cells first. "
        "What was not run is shown as missing.",
        rows,
        "A place passes if the mean ASR over seeds, counted as the table's paper does, is below "
        "1.5/c.",
        f"Not begun: {'; '.join(others) or 'none'}.",
        *(f"This project's own: [{table.title}]({name}.md), "
          f"{report_defences.count(name, table.network(), held.cells)} places filled."
          for name, table in OWN.items()),
        drawn,
        f"Hardware and versions: {versions or 'none yet'}.",
        f"Commits: {', '.join(commits) or 'none yet'}."])


def run(args: argparse.Namespace) -> None:
    """Writes everything; a reader never sees half a file."""
    path = args.out / "figures.json"
    runs = args.runs or tables.RUNS
    if not runs.is_dir() and not path.exists():
        raise FileNotFoundError(f"Expected runs of experiments.tables in {runs} (--runs), or "
                                f"{path} of an earlier report (--out), found neither.")
    if args.runs is not None and not runs.is_dir():
        raise FileNotFoundError(f"Expected runs of experiments.tables in --runs={runs}, found no "
                                "such folder. Leave it out to render what --out has.")
    held = kept.collect(runs, kept.read(path))
    if not held.cells and not held.measured:
        raise ValueError(f"Expected runs of experiments.tables in {runs}, found none. Those of "
                         "experiments.oneshot have their own table.md; experiments.merge joins "
                         "several.")
    results.write_json(path, held._asdict())
    every = {name: _page(name, held.cells) for name in TABLES}
    every |= report_defences.make(held)
    every |= report_figures.make(held, args.out)
    texts = {f"{name}.md": pages.markdown(page) for name, page in every.items()}
    texts["README.md"] = pages.markdown(_front(
        held, report_figures.states(held), args.out / "findings.md"))
    texts["tables.html"] = pages.page_html("The papers' tables and figures", every.values())
    for name, text in texts.items():
        results.write_text(args.out / name, text)
    print(f"{len(held.cells)} purifications are in {args.out}/ (README.md, tables.html, "
          "figures.json).")


def main(argv: list[str] | None = None) -> int:
    """Entry point; errors of the user's making end in one line and status 2."""
    p = OneLine(prog="python -m experiments.report",
                description="Render the papers' tables and figures from what has been run.")
    p.add_argument("--runs", type=pathlib.Path,
                   help=f"run directories of experiments.tables (default: {tables.RUNS}, where "
                   "it is, and what --out has)")
    p.add_argument("--out", type=pathlib.Path, default=pathlib.Path("runs/report"),
                   help="where the pages go; what figures.json there has of earlier runs stays "
                   "among them (default: %(default)s; this repository's are in docs/results)")
    args = p.parse_args(argv)
    return cli.run("experiments.report", lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
