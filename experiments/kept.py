"""figures.json: what the pages are rendered from, small enough for git, runs or no runs."""

import json
import pathlib
from typing import Any, NamedTuple

from awm_jax import metrics
from experiments import figure_cells, results, table_cells, tables
from experiments.table_cells import PLANS, TABLES, Cell

_RECORDED = ("curve", "masks")


class Kept(NamedTuple):
    """Everything that figures.json holds.

    Args:
      cells: scores of every purification, by its name; of some also a curve or masks.
      measured: what other commands measured, by the name of their directory.
    """

    cells: dict[str, Any]
    measured: dict[str, Any]


def read(path: pathlib.Path) -> Kept:
    """What figures.json holds; ValueError for a damaged one.

    Args:
      path: where it is, or will be.
    """
    if not path.exists():
        return Kept({}, {})
    try:
        found = json.loads(path.read_text())
        # Earlier releases had what `experiments.proportions` measured alone, under "shares".
        shares = {name: {"command": "proportions", **run}
                  for name, run in found.get("shares", {}).items()}
        cells = {name: results.whole(cell, "versions", "commit")
                 for name, cell in found["cells"].items()}
        measured = {name: results.having(run, "command", "dataset", "arch", "versions", "rows")
                    for name, run in {**shares, **found.get("measured", {})}.items()}
        return Kept(cells, measured)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"Expected {path} to be written by experiments.report, it is damaged "
                         f"({type(error).__name__}: {error}). Move it away.") from error


def collect(runs: pathlib.Path, earlier: Kept) -> Kept:
    """Adds what was run since; a new run of a cell replaces the earlier one.

    Args:
      runs: the directory of `experiments.tables`.
      earlier: from `read`.

    Raises:
      ValueError: a damaged results.json, or another command's file.
    """
    found, cells, commit = tables.read(runs), dict(earlier.cells), results.commit()
    seeds = 1 + max((key[3] for run in found.values() for key in run["done"]), default=0)
    recorded = _recorded()
    for arch in sorted({run["arch"] for run in found.values()}):
        for cell in table_cells.cells(tuple(PLANS), seeds, arch):
            done = tables.result(cell, found, runs)
            if done is None:
                continue
            key = table_cells.name(cell)
            new = {"status": done["status"], "seconds": round(done["seconds"], 1),
                   "versions": {**found[tables.folder(cell, runs)]["versions"],
                                # The run's last start may have had another precision.
                                "convolutions": done.get("convolutions", "float32")},
                   **{when: {k: round(done[when][k], 2) for k in results.SCORES}
                      for when in ("before", "after")}}
            old = cells.get(key, {})
            # A run from before runs told their commit has that at which it was rendered first.
            same = all(old.get(k) == v for k, v in new.items())
            cells[key] = {**new,
                          "commit": done.get("commit", old["commit"] if same else commit),
                          **({"fingerprint": done["fingerprint"]} if "fingerprint" in done else {}),
                          **({k: v for k, v in old.items() if k in _RECORDED} if same else {}),
                          **(_records(done) if key in recorded else {})}
    return Kept(cells, {**earlier.measured, **_measured(runs)})


def _recorded() -> set[str]:
    """The cells of which figures need more than scores."""
    return {table_cells.name(cell) for record in figure_cells.RECORDS.values()
            for cell in cells_of(record)}


def cells_of(record: figure_cells.Record) -> list[Cell]:
    """The purifications that a figure is drawn from: the first seed's.

    Example:
      >>> len(cells_of(figure_cells.RECORDS['awm_fig6']))
      6
    """
    return [cell for cell in table_cells.cells((record.table,), 1)
            if cell.attack in record.attacks and cell.samples in record.samples
            and cell.column.heading in record.headings]


def _records(done: dict[str, Any]) -> dict[str, Any]:
    """What a purification kept beside its scores; one made before that was kept has none."""
    curve = done.get("curve") or {}
    rounded = {k: [round(v, 2) for v in values] for k, values in curve.items() if values}
    return {**({"curve": rounded} if rounded.get("epoch") else {}),
            **({"masks": done["masks"]} if done.get("masks") else {})}


def _measured(runs: pathlib.Path) -> dict[str, Any]:
    """What other commands left in directories named after figures."""
    found = {}
    for figure, one in figure_cells.MEASURED.items():
        for path in sorted(runs.glob(f"{figure}*/{one.command}.json")):
            try:
                run = json.loads(path.read_text())
                found[path.parent.name] = {
                    "command": one.command,
                    **{key: run[key] for key in ("dataset", "arch", "versions")},
                    "rows": [_ROUNDED[one.command](row) for row in run["rows"]]}
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise ValueError(
                    f"Expected {path} to be written by experiments.{one.command}, it is damaged "
                    f"({type(error).__name__}: {error}). Move it away.") from error
    return found


def _proportions(row: dict[str, Any]) -> dict[str, Any]:
    """A row of proportions.json with four digits."""
    return {**{key: row[key] for key in ("key", "network", "samples", "eps", "steps", "target")},
            "shares": [[round(share, 4) for share in seed] for seed in row["shares"]],
            "error_rate": [round(rate, 4) for rate in row["error_rate"]]}


def _thresholds(row: dict[str, Any]) -> dict[str, Any]:
    """A row of thresholds.json with two digits."""
    def rounded(scores):
        return {key: round(scores[key], 2) for key in results.SCORES}

    return {**{key: row[key] for key in ("key", "network", "defence", "set", "samples", "seed",
                                         "neurons", "used", "commit")},
            "before": rounded(row["before"]),
            "points": [{"threshold": point["threshold"], "pruned": point["pruned"],
                        **rounded(point)} for point in row["points"]]}


_ROUNDED = {"proportions": _proportions, "thresholds": _thresholds}


def places(plan: str, arch: str, cells: dict[str, Any]) -> dict[tuple, list[dict[str, Any]]]:
    """What a table has of ours: one entry a seed, by ``(attack, samples, heading)``.

    Seeds whose settings are known to be others than the first one's are left out: a release that
    changes a default has the first seed of a place anew before the others.

    Args:
      plan: a key of `PLANS`.
      arch: the network.
      cells: of `Kept`.
    """
    found: dict[tuple, list[dict]] = {}
    seeds = 1 + max((int(key.rpartition("/")[2]) for key in cells), default=0)
    for cell in table_cells.cells((plan,), seeds, arch):
        if (key := table_cells.name(cell)) in cells:
            place = (cell.attack, cell.samples, cell.column.heading)
            mine = found.setdefault(place, [])
            known = {entry["fingerprint"] for entry in (*mine[:1], cells[key])
                     if "fingerprint" in entry}
            if len(known) < 2:
                mine.append(cells[key])
    return found


def measured(entry: dict[str, Any], measure: str) -> float:
    """One of ours, in percent.

    Args:
      entry: of `places`.
      measure: as `Table.measures` has it.

    Example:
      >>> scores = {'before': {'acc': 90., 'asr': 100., 'asr_all': 100.},
      ...           'after': {'acc': 80., 'asr': 0., 'asr_all': 10.}}
      >>> measured(scores, 'asr_all'), measured(scores, 'der')
      (10.0, 95.0)
    """
    if measure != "der":
        return entry["after"][measure]
    return metrics.defence_effectiveness(*(
        metrics.Scores(**{key: entry[when][key] for key in results.SCORES}, recovered=0.0)
        for when in ("before", "after")))


def networks(plan: str, cells: dict[str, Any]) -> list[str]:
    """Whose purifications a table shows: its usual network's, and those of others that were run.

    Left out are those for which the paper has another table of the same.

    Args:
      plan: a key of `PLANS`.
      cells: of `Kept`.
    """
    table = PLANS[plan]
    found = sorted({key.split("/")[1] for key in cells if key.startswith(f"{table.dataset}/")})
    others = [arch for arch in found if arch != table.network()
              and (arch == table.arch or not _elsewhere(plan, arch)) and places(plan, arch, cells)]
    return [table.network(), *others]


def _elsewhere(plan: str, arch: str) -> bool:
    """Whether another table is of the same, of that network."""
    table = PLANS[plan]
    return any(other.arch == arch and other.dataset == table.dataset
               and any(other.networks.get(place[0]) == table.networks.get(place[0])
                       for place in set(other.paper) & set(table.paper))
               for key, other in TABLES.items() if key != plan)
