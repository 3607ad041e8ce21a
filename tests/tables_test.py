"""The papers' tables: the order and the budget of work, and what is rendered."""

import json
import re

import pytest

from awm_jax import attacks
from awm_jax.defences import DEFENCES
from experiments import report, table_cells, tables
from experiments.table_cells import OWN, PLANS, TABLES


def _scores(acc, asr):
    return {"acc": acc, "asr": asr / 2, "asr_all": asr, "recovered": 0.0}


@pytest.fixture
def asked(monkeypatch, tmp_path):
    """Purifications asked of `oneshot.run`, which here writes the same for all at once."""
    monkeypatch.setenv("AWM_CACHE_DIR", str(tmp_path / "cache"))
    calls = []

    def run(args):
        path, cells = args.out / "results.json", {}
        if path.exists():
            cells = json.loads(path.read_text())["cells"]
        for seed in range(args.first_seed, args.seeds):
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


def test_what_is_not_available_is_left_out_of_the_work_and_said(tmp_path, asked):
    columns = {c.heading: c for c in TABLES["anp6"].columns}
    assert columns["ANP on FC"].lacking and not columns["ANP on all"].lacking
    assert _run(tmp_path, "--tables", "anp6", "--seeds", "1", "--budget", "1e6") == 0
    assert asked == ["badnets/anp/500/0"]
    assert report.main(["--runs", str(tmp_path / "runs"), "--out", str(tmp_path / "out")]) == 0
    page = (tmp_path / "out" / "anp6.md").read_text()
    assert "| 99.0 / 0.4 ✓ | not available here | - |" in page and columns[
        "ANP on FC"].lacking in page
    # ASR without the attacker's class stands beside the paper's: half of the stand-in's.
    assert "| 99.2 / 0.3 ✓ | 90.0 / 1.5 ✓ | -9.2 / +1.2 |" in page
    assert "| 1 of 1 |" in (tmp_path / "out" / "README.md").read_text()


def test_another_network_is_run_and_shown_as_such(tmp_path, asked):
    argv = ["--tables", "ftsam2,ftsam8", "--defence", "ft_sam,ft", "--arch", "small_vgg",
            "--seeds", "1", "--budget", "1e6"]
    assert _run(tmp_path, *argv) == 0
    # ft_sam as it is is in both, on networks trained alike.
    assert len(asked) == 10 + 10 + 10 and _run(tmp_path, *argv) == 0 and len(asked) == 30
    names = {path.name for path in (tmp_path / "runs").iterdir()}
    assert "cifar10-small_vgg-poison_rate_0.1_target_0" in names
    assert "cifar10-small_vgg-poison_rate_0.1-set_adaptive_false" in names
    assert report.main(["--runs", str(tmp_path / "runs"), "--out", str(tmp_path / "out")]) == 0
    page = (tmp_path / "out" / "ftsam2.md").read_text()
    assert "## vgg19_bn" in page and "## small_vgg" in page
    assert "The paper's figures are of vgg19_bn, ours of small_vgg" in page
    # DER of 99 / 49 before and 90 / 1.5 after: (47.5 - 9 + 100) / 2.
    assert "| 89.0 / 1.5 / 95.8 ✓ | 90.0 / 1.5 / 69.2 ✓ | +1.0 / -0.0 / -26.5 |" in page
    front = (tmp_path / "out" / "README.md").read_text()
    assert "| vgg19_bn | 0 of 90" not in front and "(ftsam1.md)" in front.split("Not begun: ")[1]
    assert "(ftsam2.md)" not in front.split("Not begun: ")[1]
    assert "| small_vgg | 20 of 90 | 1 | 20 | 20 |" in front
    # The halves of one table do not show each other's networks.
    assert "small_vgg" not in (tmp_path / "out" / "ftsam6.md").read_text()


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


def test_what_would_end_after_the_budget_is_not_begun(tmp_path, asked, monkeypatch, capsys):
    monkeypatch.setitem(tables._SECONDS, "ibau", 22.0)
    monkeypatch.setitem(tables._TRAINING, "gtsrb", 110.0)
    some = ["--tables", "awm8", "--defence", "ibau", "--seeds", "1"]
    assert _run(tmp_path, *some, "--budget", "1") == 0  # each would train a network first
    assert asked == [] and "24 purifications are missing" in capsys.readouterr().out
    assert _run(tmp_path, *some, "--budget", "12") == 0  # 11 minutes for most, 26 for one
    assert len(asked) == 15 and not any("_a2a/" in name for name in asked)
    assert not any("/5000/" in name for name in asked)  # half an hour
    assert "9 purifications are missing" in capsys.readouterr().out


def test_numbers_of_images_can_be_chosen(tmp_path, asked, capsys):
    some = ["--tables", "awm8", "--defence", "ibau", "--seeds", "1", "--samples", "one-shot,500"]
    assert _run(tmp_path, *some, "--budget", "1e6") == 0
    assert {name.split("/")[2] for name in asked} == {"one-shot", "500"} and len(asked) == 12


def test_attacks_can_be_chosen(tmp_path, asked, capsys):
    some = ["--tables", "defences", "--defence", "ibau", "--seeds", "1", "--budget", "1e6"]
    assert _run(tmp_path, *some, "--attack", "awm", "--samples", "500") == 0
    assert sorted(name.split("/")[0] for name in asked) == sorted(attacks.AWM_ATTACKS)
    assert _run(tmp_path, *some, "--attack", "sig,badnets") == 0 and len(asked) == 6 + 3


def _options(tmp_path):
    return tables._parser().parse_args(["--runs", str(tmp_path / "runs")])


def test_estimates_are_what_cells_like_them_took(tmp_path, asked):
    _run(tmp_path, "--tables", "awm8", "--defence", "ibau", "--seeds", "1", "--budget", "1e6")
    estimates = tables.Estimates(tables.read(tmp_path / "runs"), _options(tmp_path))
    cell = next(c for c in table_cells.cells(("awm8",), 1) if c.column.defence == "ibau")
    assert estimates.of(cell) == 100.0
    estimates.add(cell, 400.0)
    assert estimates.of(cell) == 100.0  # the median of seven
    other = next(c for c in table_cells.cells(("awm2",), 1) if c.column.defence == "ibau")
    guess = tables._SECONDS["ibau"]
    assert estimates.of(other) == guess != 100.0
    assert estimates.total([other, other]) == 2 * guess + 15 * tables._TRAINING["cifar10"]


def test_what_there_are_networks_for_comes_before_what_would_train_others(tmp_path, asked):
    """Dear defences on networks at hand before cheap ones on networks that are not."""
    some = ["--tables", "awm8", "--samples", "one-shot", "--seeds", "1", "--budget", "1e6"]
    assert _run(tmp_path, *some, "--defence", "ibau,awm") == 0
    names = [name.split("/")[0] for name in asked]
    assert names == [name for name in dict.fromkeys(names) for _ in range(2)]
    assert names[0] == "badnets" and names[-1] == "trojan_a2a"  # no surrogate; thrice the epochs


def test_every_defence_against_every_attack(tmp_path, asked):
    cells = list(table_cells.cells(("defences",), 2))
    many, once = len(attacks.ATTACKS), {"clp", "ac", "abl"}  # which look at no clean images
    once |= {name for name, defence in DEFENCES.items() if defence.needs != "clean"}
    each = 2 * len(DEFENCES) - len(once)
    assert len(cells) == 2 * many * each
    assert {cell.attack for cell in cells} == set(attacks.ATTACKS)
    assert {cell.column.defence for cell in cells} == set(DEFENCES)
    assert not any(cell.samples == 500 and cell.column.defence in once for cell in cells)
    # What the papers' tables have is run once.
    _run(tmp_path, "--tables", "awm8", "--defence", "ibau", "--samples", "one-shot", "--seeds",
         "2", "--budget", "1e6")
    before = len(asked)
    _run(tmp_path, "--tables", "defences", "--defence", "ibau,clp", "--seeds", "2", "--budget",
         "1e6")
    assert len(asked) == before + 2 * (3 * many - 6)
    out = tmp_path / "out"
    assert report.main(["--runs", str(tmp_path / "runs"), "--out", str(out)]) == 0
    page = (out / "defences.md").read_text()
    one, more = page.split("## small_vgg, 500 clean images, the AWM paper's six attacks")
    assert "## small_vgg, one image a class, the AWM paper's six attacks" in one
    assert "| clp |" in one and "| clp |" not in more
    # ASR without the attacker's class: half the stand-in's; DER (49 - 1.75 - 8.5 + 100) / 2.
    entry = "90.5±0.7 / 1.8±0.4 / 69.4±0.2"
    six, rest = more.split("## small_vgg, 500 clean images, other attacks")
    for part, attacked in ((six, 6), (rest, many - 6)):
        assert f"| ibau | {' | '.join([entry] * attacked)} |\n" in part
    # An average is over the six or over the others, never over all.
    assert f"| 90.5 | 1.8 | 69.4 | {many} |" not in page
    assert "| none | 100 | 90.5 | 1.8 | 69.4 | 6 | 2 |" in one
    assert f"| none | 100 | 90.5 | 1.8 | 69.4 | {many - 6} | 2 |" in one
    places = f"{3 * many} of {many * each} places filled"
    front = (out / "README.md").read_text()
    assert f"(defences.md), {places}." in front and "defences.md" not in front.split(places)[1]


def test_report_by_hand(tmp_path, asked, capsys):
    _run(tmp_path, "--tables", "awm8", "--defence", "awm_paper", "--seeds", "2", "--budget", "1e6")
    out = tmp_path / "out"
    argv = ["--runs", str(tmp_path / "runs"), "--out", str(out)]
    assert report.main(argv) == 0
    rows = (out / "awm8.md").read_text().splitlines()
    before = next(row for row in rows if row.startswith("| badnets | before"))
    assert before.startswith("| badnets | before | 98.1 / 98.4 | 99.0 / 98.0 | +0.9 / -0.4 |")
    one = next(row for row in rows if row.startswith("| badnets | one-shot"))
    # Beside our default stands the paper's AWM too.
    assert one.endswith("| 95.5 / 4.5 | missing | - |")
    # 1.5/43 is 3.5: the seed with 3 passes, that with 4 does not; the mean does not either.
    assert "| 95.5 / 4.5 | 90.5±0.7 / 3.5±0.7 1/2 | -5.0 / -1.0 |" in one
    assert one.count("missing") == 3 and "| 95.8 / 16.5 | missing | - |" in one
    front = (out / "README.md").read_text()
    assert re.search(r"Table 8 .*\| 24 of 96 \| 2 \| 24 \| 0 \| \d+ \|", front)
    assert "machine test" in front
    page = (out / "tables.html").read_text()
    # Figures of which nothing was run have none, but for those whose points are listed; of this
    # project's own, averages and scores for one-shot and for 500.
    assert page.count("<table>") == len(PLANS) - len(OWN) + 4 and "<script" not in page

    (out / "findings.md").write_text("By hand.\n")
    assert report.main(argv) == 0
    texts = {p.name: p.read_text() for p in out.iterdir()}
    assert "\n\nBy hand.\n\n" in texts["README.md"]
    none = tmp_path / "none"
    assert report.main(["--runs", str(none), "--out", str(out)]) == 2  # a slip of the pen
    none.mkdir()
    assert report.main(["--runs", str(none), "--out", str(out)]) == 0
    assert {p.name: p.read_text() for p in out.iterdir()} == texts  # from figures.json alone


def test_what_cannot_be_made_is_left_out_and_told(tmp_path, asked, monkeypatch, capsys):
    """Without CIFAR-10's files GTSRB's cells are made all the same; a defence's own error, too."""
    whole = tables.oneshot.run

    def run(args):
        if args.dataset == "cifar10":
            raise FileNotFoundError("no files")
        if args.attack[0] == "l0_inv":
            raise ValueError("no such network")
        return whole(args)

    monkeypatch.setattr(tables.oneshot, "run", run)
    argv = ["--tables", "awm8,awm1", "--defence", "ibau", "--samples", "100", "--seeds", "1",
            "--budget", "1e6"]
    assert _run(tmp_path, *argv) == 2
    told = capsys.readouterr()
    assert "6 of these could not be made" not in told.err  # two: one of GTSRB, one for CIFAR-10
    assert "2 of these could not be made, the first for this" in told.err
    assert len(asked) == 5 and "no files Left out, with 4 more" in told.out
    assert _run(tmp_path, *argv[:2], "--samples", "77") == 2
    assert "there is none. Leave some of them out" in capsys.readouterr().err


def test_a_report_of_nothing_is_refused(tmp_path, capsys):
    (tmp_path / "runs").mkdir()
    assert report.main(["--runs", str(tmp_path / "runs"), "--out", str(tmp_path / "out")]) == 2
    assert "found none. Those of experiments.oneshot" in capsys.readouterr().err


def test_seeds_of_other_settings_are_left_out_and_other_networks_marked(tmp_path, asked):
    """The first seed's settings count: a release that changes them makes it anew first."""
    argv = ["--tables", "awm8", "--attack", "badnets", "--defence", "ibau", "--samples", "one-shot",
            "--budget", "1e6"]
    assert _run(tmp_path, *argv) == 0
    path, = (tmp_path / "runs").glob("*/results.json")
    run = json.loads(path.read_text())
    cells = list(run["cells"].values())
    for cell, fingerprint in zip(cells, ("new", "new", "old"), strict=True):
        cell["fingerprint"] = fingerprint
    cells[1]["before"] = {**cells[1]["before"], "acc": 12.0}
    path.write_text(json.dumps(run))
    assert report.main(["--runs", str(tmp_path / "runs"), "--out", str(tmp_path / "out")]) == 0
    page = (tmp_path / "out" / "awm8.md").read_text()
    assert "90.5±0.7 / 3.5±0.7 1/2 †" in page


def test_damaged_files_are_named_and_kept(tmp_path, asked, capsys):
    _run(tmp_path, "--tables", "awm2", "--defence", "ibau", "--seeds", "1", "--budget", "1e6")
    path = next((tmp_path / "runs").glob("*/results.json"))
    path.write_text("[]")
    assert _run(tmp_path, "--tables", "awm2") == 2
    assert f"Expected {path}" in capsys.readouterr().err and path.read_text() == "[]"
    out = tmp_path / "out"
    out.mkdir()
    (tmp_path / "none").mkdir()
    for damaged in ("{", '{"cells": {"a": {}}}', '{"cells": {}, "measured": {"anp_fig8": {}}}'):
        (out / "figures.json").write_text(damaged)
        assert report.main(["--runs", str(tmp_path / "none"), "--out", str(out)]) == 2
        assert "figures.json" in capsys.readouterr().err
