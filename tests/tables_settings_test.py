"""Cells of the papers' tables whose settings a release has changed."""

import json

import pytest

from awm_jax.defences.awm_config import VARIANTS
from experiments import defending, kept, table_cells, tables


@pytest.fixture
def small(tmp_path, tiny_dataset, monkeypatch):
    """A cell that is run in seconds, the only one there is, and the command's options."""
    cell = next(c for c in table_cells.cells(("awm2",), 1) if c.column.defence == "awm")._replace(
        dataset="digits", arch="tiny_cnn", network=("--epochs", "1"))
    monkeypatch.setattr(tables.table_cells, "cells", lambda *_: iter([cell]))
    options = tables._parser().parse_args(["--runs", str(tmp_path / "runs")])
    options.digits_dir, options.budget = None, 1e6
    monkeypatch.setitem(tables._TRAINING, "digits", 10.0)
    monkeypatch.setitem(VARIANTS, "distilled", {**VARIANTS["distilled"], "epochs": 1})
    return cell, options


def test_what_was_run_with_other_settings_is_run_again(small, monkeypatch):
    """With `oneshot.run` itself: a release that changes a default leaves no old cell in a table."""
    cell, options = small
    assert tables._missing(options) == [cell]
    assert tables.run(options) == 0 and tables._missing(options) == []
    monkeypatch.setitem(VARIANTS, "distilled", {**VARIANTS["distilled"], "outer_lr": 0.02})
    assert tables._missing(options) == [cell]
    assert tables.run(options) == 0 and tables._missing(options) == []
    found = tables.result(cell, tables.read(options.runs), options.runs)
    assert found["fingerprint"] == tables._fingerprint(cell, options)
    where = tables.folder(cell, options.runs) / "results.json"
    cells = json.loads(where.read_text())["cells"]
    assert len(cells) == 2  # the old one is still there for who wants it


def test_what_a_report_has_is_not_made_again(small, tmp_path, monkeypatch):
    """Where the runs themselves are gone; unless a default has changed since."""
    cell, options = small
    assert tables.run(options) == 0
    held = kept.collect(options.runs, kept.Kept({}, {}))
    options.runs, options.known = tmp_path / "none", tmp_path / "figures.json"
    assert tables._known(None) == {} and held.cells.keys() == {table_cells.name(cell)}
    options.known.write_text(json.dumps(held._asdict()))
    assert tables._missing(options) == []
    monkeypatch.setitem(VARIANTS, "distilled", {**VARIANTS["distilled"], "outer_lr": 0.02})
    assert tables._missing(options) == [cell]
    options.known.write_text("[]")
    with pytest.raises(ValueError, match=r"--known=.*figures.json of experiments.report"):
        tables._missing(options)


@pytest.mark.parametrize("defence, again", [("awm", True), ("awm_paper", False)])
def test_what_a_survey_goes_by_is_a_setting_of_what_has_one(defence, again, monkeypatch):
    cell = next(c for c in table_cells.cells(("defences",), 1) if c.column.defence == defence)
    options = tables._parser().parse_args([])
    before = tables._fingerprint(cell, options)
    monkeypatch.setattr(defending, "THRESHOLDS", defending.THRESHOLDS[:-1])
    assert (tables._fingerprint(cell, options) != before) is again


def test_what_repair_goes_by_is_a_setting_where_there_is_repair(monkeypatch):
    cell = next(c for c in table_cells.cells(("defences",), 1) if c.column.defence == "awm")
    with_it = cell._replace(column=cell.column._replace(options=("--set", "repair=10")))
    options = tables._parser().parse_args([])
    before = [tables._fingerprint(c, options) for c in (cell, with_it)]
    monkeypatch.setattr(defending.awm_repair, "CONSTANTS", ())
    after = [tables._fingerprint(c, options) for c in (cell, with_it)]
    assert [a == b for a, b in zip(after, before, strict=True)] == [True, False]
    assert before[0] != before[1]
