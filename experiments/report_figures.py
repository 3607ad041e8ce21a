"""The papers' figures: pages of our numbers, and pictures drawn from them."""

import pathlib
from typing import Any

import numpy as np

from awm_jax.report import figures
from experiments import kept, proportions, results, table_cells, tables, thresholds
from experiments.figure_cells import FIGURES, MEASURED, RECORDS, Figure, Measured, Record
from experiments.kept import Kept
from experiments.pages import Heading, Page, Picture, Rows

_UNPRINTED = "The paper draws this figure; its numbers are not printed in the paper."
_MISSING = "missing"
_ACC, _ASR, _ERRORS = "ACC, %", "ASR, %", "error rate, %"  # vertical axes
_EPOCHS = (0, 1, 2, 4, 5, 8, 10, 12, 16, 20, 50, 100)  # in a table; the picture has them all


def make(held: Kept, out: pathlib.Path) -> dict[str, Page]:
    """Draws what there is.

    Args:
      held: everything measured.
      out: where the pictures go.

    Returns:
      The page of every figure, by its name.
    """
    return {**{name: _setting_page(name, figure, held.cells, out)
               for name, figure in FIGURES.items()},
            **{name: _record_page(name, record, held.cells, out)
               for name, record in RECORDS.items()},
            **{name: _measured_page(name, one, held.measured, out)
               for name, one in MEASURED.items()}}


def states(held: Kept) -> Rows:
    """How much there is of every figure, for the front page.

    Args:
      held: everything measured.
    """
    rows = [["figure", "network", "there is"]]
    for name, figure in FIGURES.items():
        every = sum(map(len, figure.curves().values()))
        rows += [[f"[{figure.table.title}]({name}.md)", arch,
                  f"{len(kept.places(name, arch, held.cells))} of {every} points"]
                 for arch in kept.networks(name, held.cells)]
    for name, record in RECORDS.items():
        chosen = kept.cells_of(record)
        found = sum(record.kept in held.cells.get(table_cells.name(cell), {}) for cell in chosen)
        rows.append([f"[{record.title}]({name}.md)", chosen[0].arch, f"{found} of {len(chosen)}"])
    for name, one in MEASURED.items():
        found_in = [run["arch"] for run in _of(name, held.measured).values()]
        rows.append([f"[{one.title}]({name}.md)", ", ".join(found_in) or one.arch,
                     "drawn" if found_in else _MISSING])
    return rows


def _setting_page(name: str, figure: Figure, cells: dict[str, Any], out: pathlib.Path) -> Page:
    """Scores over the values of a setting."""
    table = figure.table
    page = Page(table.title, [f"{_UNPRINTED} {_measures(table.measures[1])}; mean±standard "
                              f"deviation over seeds. {table.note}"])
    for arch in kept.networks(name, cells):
        ours = kept.places(name, arch, cells)
        page.blocks.extend([Heading(arch), _setting_rows(figure, ours)])
        if ours:
            picture = Picture(f"{name}-{arch}.png", f"{table.title}, {arch}")
            figures.curves(out / picture.file, _setting_curves(figure, ours), figure.name,
                           picture.text, log=figure.log)
            page.blocks.append(picture)
    return page


def _points(figure: Figure, ours: dict[tuple, list[dict]]) -> dict[str, list[list[list[float]]]]:
    """Of every curve, for each value, each measure of every seed."""
    return {f"{attack}, {variant}" if variant else attack:
            [[[kept.measured(entry, measure) for entry in
               ours.get((attack, figure.table.samples[0], column.heading), [])]
              for measure in figure.table.measures] for column in columns]
            for (attack, variant), columns in figure.curves().items()}


def _setting_rows(figure: Figure, ours: dict[tuple, list[dict]]) -> Rows:
    """A row a value."""
    curves = _points(figure, ours)
    rows: Rows = [[figure.name, *curves, "seeds"]]
    for value, *points in zip(figure.values, *curves.values(), strict=True):
        counts = sorted({len(point[0]) for point in points})
        rows.append([f"{value:g}", *(" / ".join(results.mean_std(v, 1) for v in point)
                                     if point[0] else _MISSING for point in points),
                     "-".join(map(str, sorted({counts[0], counts[-1]})))])
    return rows


def _setting_curves(figure: Figure,
                    ours: dict[tuple, list[dict]]) -> dict[str, dict[str, np.ndarray]]:
    """Panels of ACC and ASR: value, mean, standard deviation of every curve."""
    panels: dict[str, dict[str, np.ndarray]] = {_ACC: {}, _ASR: {}}
    for curve, points in _points(figure, ours).items():
        for number, panel in enumerate(panels.values()):
            found = [(x, *_mean_std(point[number])) for x, point in
                     zip(figure.values, points, strict=True) if point[number]]
            if found:
                panel[curve] = np.asarray(found)
    return panels


def _mean_std(values: list[float] | np.ndarray) -> tuple[float, float]:
    """Mean and sample standard deviation, 0 of a single value."""
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else 0.0


def _measures(asr: str) -> str:
    """What stands in a cell."""
    return "ACC / ASR in percent, ASR " + (
        "over all test images" if asr == "asr_all" else "without the attacker's class")


def _record_page(name: str, record: Record, cells: dict[str, Any], out: pathlib.Path) -> Page:
    """Curves or masks of single purifications."""
    page = Page(record.title, [f"{_UNPRINTED} {record.note}".strip()])
    groups: dict[str, dict] = {}
    for cell in kept.cells_of(record):
        group = "" if record.joined else f"{cell.column.heading}, {cell.samples}"
        groups.setdefault(group, {})[cell] = cells.get(table_cells.name(cell), {})
    for number, (title, mine) in enumerate(groups.items()):
        if title:
            page.blocks.append(Heading(title))
        there = {cell: found for cell, found in mine.items() if record.kept in found}
        missing = [f"{cell.attack}, {cell.column.heading}" for cell in mine if cell not in there]
        if there:
            picture = Picture(f"{name}-{number}.png", f"{record.title}. {title}".strip())
            draw = _draw_curves if record.kept == "curve" else _draw_masks
            page.blocks.extend([draw(there, record, out / picture.file, picture.text), picture])
        if missing:
            page.blocks.append(
                f"Missing: {'; '.join(missing)}. Make them with `python -m experiments.tables "
                f"--tables {record.table} --seeds 1`; a purification made before this was kept "
                "has none, its run directory must be moved away first.")
    return page


def _draw_curves(there: dict, record: Record, path: pathlib.Path, title: str) -> Rows:
    """ACC and ASR epoch by epoch, a curve an attack; the table has some of the epochs."""
    del record
    panels: dict[str, dict[str, np.ndarray]] = {_ACC: {}, _ASR: {}}
    for cell, found in there.items():
        curve, before = found["curve"], found["before"]
        # Curves made before all images were counted have the other ASR alone.
        asr = "asr_all" if "asr_all" in curve else "asr"
        label = cell.attack + (" (attacker's class left out)" if asr == "asr" else "")
        for panel, key, first in ((_ACC, "clean_accuracy", before["acc"]),
                                  (_ASR, asr, before[asr])):
            panels[panel][label] = np.asarray(
                [(0, first), *zip(curve["epoch"], curve[key], strict=True)])
    figures.curves(path, panels, "epoch", title)
    at = {label: {int(x): f"{acc:.1f} / {asr:.1f}" for (x, acc), asr in
                  zip(points, panels[_ASR][label][:, 1], strict=True)}
          for label, points in panels[_ACC].items()}
    epochs = [epoch for epoch in _EPOCHS if any(epoch in scores for scores in at.values())]
    return [["attack", *(f"epoch {epoch}" for epoch in epochs)],
            *([label, *(scores.get(epoch, "-") for epoch in epochs)]
              for label, scores in at.items())]


def _draw_masks(there: dict, record: Record, path: pathlib.Path, title: str) -> Rows:
    """Ten percentages a layer."""
    del title
    layers = {(f"{cell.column.heading}: " if record.joined else "") + layer: values
              for cell, found in there.items() for layer, values in found["masks"].items()}
    figures.percentages(path, layers)
    return [["layer", *(f"{low / 10:.1f}-{low / 10 + 0.1:.1f}" for low in range(10))],
            *([layer, *(f"{value:.1f}" for value in values)] for layer, values in layers.items())]


def _of(name: str, measured: dict[str, Any]) -> dict[str, Any]:
    """What there is of a figure, by directory: one of its command whose name begins with its."""
    return {key: run for key, run in measured.items()
            if key.startswith(name) and run["command"] == MEASURED[name].command}


def _measured_page(name: str, one: Measured, measured: dict[str, Any], out: pathlib.Path) -> Page:
    """What a command of its own measured."""
    page = Page(one.title, [f"{_UNPRINTED if one.printed else ''} {one.note}".strip()])
    mine = _of(name, measured)
    for key, run in mine.items():
        blocks: list[str | Rows | Heading | Picture]
        if one.command == "proportions":
            blocks = [proportions.table(run["rows"]), *_draw_shares(key, run["rows"], out)]
        else:
            blocks = [thresholds.table(run["rows"]), *_draw_thresholds(key, run, out)]
        page.blocks.extend([Heading(f"{run['dataset']}, {run['arch']}"), *blocks])
    if not mine:
        page.blocks.append(f"Missing. Make it with `python -m experiments.{one.command} --arch "
                           f"{one.arch} {' '.join(one.options)} --data_dir DIR --out "
                           f"{tables.RUNS}/{name}`.")
    return page


def _draw_thresholds(key: str, run: dict[str, Any], out: pathlib.Path) -> list[Picture]:
    """ACC and ASR over the threshold."""
    picture = Picture(f"{key}.png", f"Every threshold, {run['dataset']}, {run['arch']}")
    thresholds.draw(out / picture.file, run["rows"], picture.text)
    return [picture]


def _draw_shares(key: str, rows: list[dict], out: pathlib.Path) -> list[Picture]:
    """Classes of each network's predictions, and error rates over the bound."""
    pictures: list[Picture] = []
    rates: dict[str, list] = {}
    named = [(name, row["target"]) for name, row in zip(proportions.names(rows), rows, strict=True)]
    for number, network in enumerate(dict.fromkeys(named)):
        chosen = [row for own, row in zip(named, rows, strict=True) if own == network]
        picture = Picture(f"{key}-{number}.png", f"{network[0]}: predictions when perturbed")
        figures.proportions(
            out / picture.file, {f"{row['samples']} images, eps {row['eps']:g}":
                                 np.asarray(row["shares"]) for row in chosen},
            network[1], picture.text)
        pictures.append(picture)
        for row in chosen:
            rates.setdefault(f"{network[0]}, {row['samples']}", []).append(
                (row["eps"], *_mean_std(100 * np.asarray(row["error_rate"]))))
    if any(len(points) > 1 for points in rates.values()):
        picture = Picture(f"{key}-errors.png", "error rate over the bound")
        figures.curves(out / picture.file, {_ERRORS: {
            curve: np.asarray(points) for curve, points in rates.items()}}, "eps", picture.text)
        pictures.append(picture)
    return pictures
