"""The papers' tables: their cells, the order and the budget of work, and what is rendered."""

import json
import re
import types

import pytest

from experiments import cli, defending, report, table_cells, tables
from experiments.table_cells import TABLES


def _scores(acc, asr):
    return {"acc": acc, "asr": asr / 2, "asr_all": asr, "recovered": 0.0}


@pytest.fixture
def asked(monkeypatch):
    """Purifications asked of `oneshot.run`, which here writes the same for all at once."""
    calls = []

    def run(args):
        path, cells = args.out / "results.json", {}
        if path.exists():
            cells = json.loads(path.read_text())["cells"]
        for seed in range(args.seeds):
            name = f"{args.attack[0]}/{args.defence[0]}/{args.samples}/{seed}"
            if name not in cells:
                calls.append(name)
                cells[name] = {"attack": args.attack[0], "defence": args.defence[0],
                               "samples": args.samples, "seed": seed, "seconds": 100.0 + seed,
                               "status": "OK", "before": _scores(99.0, 98.0),
                               "after": _scores(90.0 + seed, 3.0 + seed)}
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"dataset": args.dataset, "arch": args.arch, "cells": cells,
                                    "versions": {"jax": "0", "machine": "test"}}))
        return {"cells": cells}

    monkeypatch.setattr(tables.oneshot, "run", run)
    return calls


def _run(tmp_path, *more):
    return tables.main(["--runs", str(tmp_path / "runs"), *more])


def test_every_figure_of_the_papers_has_its_place():
    for name, table in TABLES.items():
        places = {(c.attack, c.samples, c.column.heading) for c in table_cells.cells((name,), 1)}
        assert set(table.paper) <= places and set(table.before) == set(table.attacks), name
        assert all(0 <= v <= 100 for pair in table.paper.values() for v in pair)
    assert TABLES["awm8"].paper["trojan_a2a", "one-shot", "AWM"] == (93.02, 7.18)
    assert TABLES["awm1"].paper["l0_inv", 200, "IBAU"] == (76.26, 95.50)
    assert TABLES["awm5"].paper["trojan_wm", "one-shot", "NC-NS"] == (73.62, 59.52)
    assert TABLES["awm9"].paper["trojan_a2a", 100, "VGG-6"] == (97.37, 60.19)
    assert TABLES["awm4"].paper["l2_inv", 100, "ANP+SWM"] == (75.63, 7.89)
    assert TABLES["awm2"].paper["l2_inv", "one-shot", "AWM"] == (76.60, 10.64)


def test_every_cell_is_a_command_that_its_parser_and_its_defence_take(tmp_path):
    args = types.SimpleNamespace(runs=tmp_path, gtsrb_dir=None, cifar10_dir=tmp_path)
    chosen = set()
    for cell in table_cells.cells(tuple(TABLES), 1):
        given = cli.parser().parse_args(tables._arguments(cell, args))
        dataset = types.SimpleNamespace(name=given.dataset, flip=given.dataset == "cifar10")
        config = defending.config(cell.column.defence, given, dataset)
        chosen.add(getattr(config, "layers", None))
    assert {("conv1",), ("conv6",), "conv"} <= chosen


def test_first_seeds_come_first_cheap_ones_before_dear_ones_and_nothing_twice(
        tmp_path, asked, capsys):
    some = ["--tables", "awm8,awm9", "--defence", "awm_paper,ibau", "--budget", "1e6"]
    assert _run(tmp_path, "--seeds", "2", *some) == 0
    others = [name for name in asked if not name.startswith("trojan_a2a/awm_paper/100/")]
    assert len(others) == len(set(others)) == 2 * 2 * 24 - 2
    seeds = [int(name[-1]) for name in asked if not name.startswith("trojan_a2a/awm_paper")]
    assert seeds == sorted(seeds) and set(seeds) == {0, 1}
    costs = [name for name in asked if name.endswith("/0") and name.startswith("badnets/")]
    assert costs.index("badnets/ibau/one-shot/0") < costs.index("badnets/awm_paper/one-shot/0")
    assert costs.index("badnets/awm_paper/100/0") < costs.index("badnets/awm_paper/5000/0")
    # Table 9's first column is Table 8's cell; its others go into directories of their own.
    assert asked.count("trojan_a2a/awm_paper/100/0") == 1 + 6
    assert len(list((tmp_path / "runs").iterdir())) == 1 + 6
    before = len(asked)
    capsys.readouterr()
    assert _run(tmp_path, "--seeds", "2", *some) == 0
    assert len(asked) == before and "0 purifications are missing" in capsys.readouterr().out


def test_what_would_end_after_the_budget_is_not_begun(tmp_path, asked, capsys):
    some = ["--tables", "awm8", "--defence", "ibau", "--seeds", "1"]
    assert _run(tmp_path, *some, "--budget", "1") == 0  # each would train a network first
    assert asked == [] and "24 purifications are missing" in capsys.readouterr().out
    assert _run(tmp_path, *some, "--budget", "21") == 0
    assert len(asked) == 18 and not any("/5000/" in name for name in asked)  # half an hour
    assert "6 purifications are missing" in capsys.readouterr().out


def test_estimates_are_what_cells_like_them_took(tmp_path, asked):
    _run(tmp_path, "--tables", "awm8", "--defence", "ibau", "--seeds", "1", "--budget", "1e6")
    estimates = tables.Estimates(tables.read(tmp_path / "runs"), tmp_path / "runs")
    cell = next(c for c in table_cells.cells(("awm8",), 1) if c.column.defence == "ibau")
    assert estimates.of(cell) == 100.0
    estimates.add(cell, 400.0)
    assert estimates.of(cell) == 100.0  # the median of seven
    other = next(c for c in table_cells.cells(("awm2",), 1) if c.column.defence == "ibau")
    assert estimates.of(other) == 22.0
    assert estimates.total([other, other]) == 2 * 22.0 + 7200.0  # one network


def test_report_by_hand(tmp_path, asked, capsys):
    _run(tmp_path, "--tables", "awm8", "--defence", "awm_paper", "--seeds", "2", "--budget", "1e6")
    out = tmp_path / "out"
    argv = ["--runs", str(tmp_path / "runs"), "--out", str(out)]
    assert report.main(argv) == 0
    rows = (out / "awm8.md").read_text().splitlines()
    before = next(row for row in rows if row.startswith("| badnets | before"))
    assert before.startswith("| badnets | before | 98.1 / 98.4 | 99.0 / 98.0 | +0.9 / -0.4 |")
    one = next(row for row in rows if row.startswith("| badnets | one-shot"))
    # 1.5/43 is 3.5: the seed with 3 passes, that with 4 does not; the mean does not either.
    assert "| 95.5 / 4.5 | 90.5±0.7 / 3.5±0.7 1/2 | -5.0 / -1.0 |" in one
    assert one.count("missing") == 3 and "| 95.8 / 16.5 | missing | - |" in one
    front = (out / "README.md").read_text()
    assert re.search(r"Table 8 .*\| 24 of 96 \| 2 \| 24 \| 0 \| \d+ \|", front)
    assert "machine test" in front
    page = (out / "tables.html").read_text()
    assert page.count("<table>") == len(TABLES) and "<script" not in page

    texts = {p.name: p.read_text() for p in out.iterdir()}
    assert report.main(["--runs", str(tmp_path / "none"), "--out", str(out)]) == 0
    assert {p.name: p.read_text() for p in out.iterdir()} == texts  # from figures.json alone


def test_damaged_files_are_named_and_kept(tmp_path, asked, capsys):
    _run(tmp_path, "--tables", "awm2", "--defence", "ibau", "--seeds", "1", "--budget", "1e6")
    path = next((tmp_path / "runs").glob("*/results.json"))
    path.write_text("[]")
    assert _run(tmp_path, "--tables", "awm2") == 2
    assert f"Expected {path}" in capsys.readouterr().err and path.read_text() == "[]"
    out = tmp_path / "out"
    out.mkdir()
    (out / "figures.json").write_text("{")
    assert report.main(["--runs", str(tmp_path / "none"), "--out", str(out)]) == 2
    assert "figures.json" in capsys.readouterr().err
