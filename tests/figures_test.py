"""The papers' figures: what is kept of runs, and the pages and pictures made of it."""

import doctest
import json
import shlex

import numpy as np
import pytest
from PIL import Image

from experiments import cells as declared
from experiments import (
    figure_cells,
    kept,
    pages,
    proportions,
    report,
    table_cells,
    tables,
    thresholds,
)
from experiments.figure_cells import FIGURES, MEASURED, RECORDS

_MASKS = [80.0, 0, 0, 0, 0, 0, 0, 0, 0, 20.0]


def _write(runs, cell, acc, asr, **more):
    """Puts a purification where `experiments.oneshot` would, beside those that are there."""
    path = tables.folder(cell, runs) / "results.json"
    run = json.loads(path.read_text()) if path.exists() else {
        "dataset": cell.dataset, "arch": cell.arch, "versions": {"jax": "0"}, "cells": {}}
    scores = {"acc": acc, "asr": asr / 2, "asr_all": asr, "recovered": 0.0}
    run["cells"][f"{cell.attack}/{cell.samples}/{cell.column.defence}/{cell.seed}"] = {
        "attack": cell.attack, "defence": cell.column.defence, "samples": cell.samples,
        "seed": cell.seed, "seconds": 1.0, "status": "OK", "before": scores, "after": scores,
        **more}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(run))


def _cells(name, seeds=1):
    return list(table_cells.cells((name,), seeds))


def _report(tmp_path, runs="runs"):
    out = tmp_path / "out"
    assert report.main(["--runs", str(tmp_path / runs), "--out", str(out)]) == 0
    return out


def _same_without_runs(tmp_path, out):
    """Pages and pictures come again from figures.json alone."""
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    (tmp_path / "none").mkdir()
    for path in [*out.glob("*.png"), *out.glob("*.md")]:
        path.unlink()
    _report(tmp_path, "none")
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_declared_figures_are_those_of_the_papers():
    assert FIGURES["awm_fig3"].table.attacks == ("trojan_sq", "trojan_wm", "badnets", "l0_inv")
    assert FIGURES["awm_fig3"].table.samples == (500,)
    assert min(FIGURES["awm_fig2_tau"].values) == 10 and max(FIGURES["awm_fig2_tau"].values) == 3000
    gammas = FIGURES["awm_fig2_gamma"].values
    assert (min(gammas), max(gammas)) == (1e-8, 1e-5)
    assert {0.5, 0.8} <= set(FIGURES["awm_fig2_alpha"].values)
    assert FIGURES["anp_fig10"].table.measures == ("acc", "asr")
    for figure in FIGURES.values():
        assert len(figure.values) * len(figure.variants) == len(figure.table.columns)
        assert not figure.table.paper
    for name, record in RECORDS.items():
        expected = len(record.attacks) * len(record.samples) * len(record.headings)
        assert len(kept.cells_of(record)) == expected, name


def test_points_of_a_figure_by_hand(tmp_path):
    for cell in _cells("awm_fig3", 2):
        if cell.column.heading in ("tau=10", "tau=1000") and cell.attack == "badnets":
            _write(tmp_path / "runs", cell, 80.0 + 2 * cell.seed, 10.0 if "1000" in
                   cell.column.heading else 60.0)
    out = _report(tmp_path)
    lines = (out / "awm_fig3.md").read_text().splitlines()
    assert "not printed in the paper" in lines[2]
    header = next(line for line in lines if line.startswith("| tau |")).strip("| ").split(" | ")
    assert header[5:7] == ["badnets, paper", "badnets, ours"] and len(header) == 10
    assert f"| 10{' | missing' * 4} | 81.0±1.4 / 60.0±0.0{' | missing' * 3} | 0-2 |" in lines
    assert f"| 50{' | missing' * 8} | 0 |" in lines
    assert "![AWM, Figure 3: tau, CIFAR-10, 500 clean images, small_vgg](awm_fig3-small_vgg.png)" \
        in lines
    with Image.open(out / "awm_fig3-small_vgg.png") as picture:
        assert np.asarray(picture).std() > 1
    front = (out / "README.md").read_text()
    assert "(awm_fig3.md) | small_vgg | 2 of 48 points |" in front
    assert "(anp_fig10.md) | resnet18 | 0 of 27 points |" in front
    assert not (out / "anp_fig10-resnet18.png").exists()
    assert "awm_fig3-small_vgg.png" in (out / "tables.html").read_text()
    _same_without_runs(tmp_path, out)


def test_records_and_masks_are_kept_and_drawn(tmp_path):
    runs = tmp_path / "runs"
    curve = {"epoch": [1, 2, 3], "clean_accuracy": [97.0, 96.0, 95.0], "asr": [90.0, 9.0, 1.0]}
    for cell in kept.cells_of(RECORDS["awm_fig4"]):
        if cell.attack == "badnets" and cell.column.heading == "AWM":
            _write(runs, cell, 95.0, 4.0, curve={**curve, "asr_all": [91.0, 12.0, 4.123]})
        if cell.attack == "l0_inv" and cell.column.heading == "AWM":
            _write(runs, cell, 95.0, 4.0, curve=curve)  # made before all images were counted
    for record in ("awm_fig5", "awm_fig6"):
        for cell in kept.cells_of(RECORDS[record]):
            heading = cell.column.heading
            if heading != "VGG-2" and cell.samples == 100:
                layer = f"conv{heading[-1]}" if heading.startswith("VGG") else "conv1"
                _write(runs, cell, 95.0, 4.0, masks={layer: _MASKS})
    out = _report(tmp_path)
    text = (out / "awm_fig4.md").read_text()
    assert "| attack | epoch 0 | epoch 1 | epoch 2 |\n" in text  # 3 is in the picture alone
    assert "| badnets | 95.0 / 4.0 | 97.0 / 91.0 | 96.0 / 12.0 |" in text
    assert "| l0_inv (attacker's class left out) | 95.0 / 2.0 | 97.0 / 90.0 | 96.0 / 9.0 |" in text
    assert "Missing: trojan_sq, AWM; trojan_wm, AWM; l2_inv, AWM." in text
    assert (out / "awm_fig4-0.png").exists() and not (out / "awm_fig4-1.png").exists()
    text = (out / "awm_fig6.md").read_text()
    assert "| VGG-1: conv1 | 80.0 | 0.0 |" in text and "Missing: trojan_a2a, VGG-2." in text
    assert "| conv1 | 80.0 | 0.0 |" in (out / "awm_fig5.md").read_text()
    front = (out / "README.md").read_text()
    assert "(awm_fig4.md) | small_vgg | 2 of 10 |" in front
    assert "(awm_fig6.md) | small_vgg | 5 of 6 |" in front
    held = kept.read(out / "figures.json")
    assert held.cells["gtsrb/small_vgg/badnets/one-shot/awm_paper/0"]["curve"]["asr_all"][2] == 4.12
    _same_without_runs(tmp_path, out)

    # Only what figures need is kept: another seed's curve is not.
    cell = next(c for c in _cells("awm8", 2) if c.seed == 1 and c.column.defence == "awm_paper")
    _write(runs, cell, 95.0, 4.0, curve=curve)
    _report(tmp_path)
    assert "curve" not in kept.read(out / "figures.json").cells[table_cells.name(cell)]


def test_a_purification_made_again_loses_the_record_of_the_one_before(tmp_path):
    cell = kept.cells_of(RECORDS["awm_fig6"])[0]
    _write(tmp_path / "runs", cell, 95.0, 4.0, masks={"conv1": _MASKS})
    out = _report(tmp_path)
    _write(tmp_path / "runs", cell, 95.0, 4.0)
    _report(tmp_path)  # the same scores: the same purification, its masks are still true
    assert "masks" in kept.read(out / "figures.json").cells[table_cells.name(cell)]
    _write(tmp_path / "runs", cell, 94.0, 4.0)
    _report(tmp_path)
    assert "masks" not in kept.read(out / "figures.json").cells[table_cells.name(cell)]


def test_commands_rows_are_found_where_the_missing_ones_are_asked_for(tmp_path, capsys):
    assert report.main(["--runs", str(tmp_path / "runs"), "--out", str(tmp_path / "out")]) == 2
    assert "found neither" in capsys.readouterr().err  # a name that was mistyped, say
    _write(tmp_path / "runs", _cells("awm8")[0], 80.0, 10.0)
    out = _report(tmp_path)
    for name, one in MEASURED.items():
        text = (out / f"{name}.md").read_text()
        command = text.partition(f"python -m experiments.{one.command} ")[2].partition("`")[0]
        module = {"proportions": proportions, "thresholds": thresholds}[one.command]
        args = module._parser().parse_args(shlex.split(command))
        assert args.arch == one.arch and args.out == tables.RUNS / name
        assert f"({name}.md) | {one.arch} | missing |" in (out / "README.md").read_text()
    run = {"dataset": "cifar10", "arch": "small_vgg", "versions": {"jax": "0"}, "rows": [
        {"key": f"{network}/{eps}", "network": network, "samples": 500, "eps": eps,
         "steps": 1, "target": 1,
         "shares": [[0.25, 0.75], [0.75, 0.25]], "error_rate": [eps, eps]}
        for network in ("badnets", "benign") for eps in (0.1, 0.2)]}
    path = tmp_path / "runs" / "anp_fig8-vgg" / "proportions.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(run))
    _report(tmp_path)
    text = (out / "anp_fig8.md").read_text()
    assert "## cifar10, small_vgg\n" in text and "The paper's network is ResNet-18." in text
    assert "| benign | 500 | 0.2 | 20.00±0.00 | 50.00±35.36 | 50.00±35.36 (0) |" in text
    names = {f"anp_fig8-vgg-{part}.png" for part in ("0", "1", "errors")}
    assert names == {p.name for p in out.glob("anp_fig8*.png")}
    assert "(anp_fig8.md) | small_vgg | drawn |" in (out / "README.md").read_text()
    assert "Missing" in (out / "awm_fig1.md").read_text()
    _same_without_runs(tmp_path, out)
    path.write_text('{"rows": 1}')
    capsys.readouterr()
    assert report.main(["--runs", str(tmp_path / "runs"), "--out", str(out)]) == 2
    assert f"Expected {path}" in capsys.readouterr().err


def _thresholds(seed, asr):
    """A row of thresholds.json: a threshold that prunes nothing and one that prunes 3 of 9."""
    before = {"acc": 90.0, "asr": 99.0, "asr_all": 99.0, "recovered": 1.0}
    points = [{"threshold": 0.0, "pruned": 0, **before},
              {"threshold": 0.2, "pruned": 3, "acc": 88.0, "asr": asr, "asr_all": asr + 5}]
    return {"key": f"badnets/e4/anp-1/0,0.2/{seed}", "network": "badnets", "defence": "anp",
            "set": [], "samples": 500, "seed": seed, "neurons": 9, "used": 0.2, "before": before,
            "points": points, "commit": "abc"}


def test_thresholds_are_drawn_and_kept(tmp_path):
    run = {"dataset": "cifar10", "arch": "resnet18", "versions": {"jax": "0"},
           "rows": [_thresholds(0, 20.0), _thresholds(1, 40.0)]}
    # Its name begins with another figure's, too, which is another command's.
    path = tmp_path / "runs" / "awm_fig1_prune-resnet18" / "thresholds.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(run))
    out = _report(tmp_path)
    text = (out / "awm_fig1_prune.md").read_text()
    assert "## cifar10, resnet18\n" in text
    line = "3.00±0.00 | 88.00±0.00 | 30.00±14.14 | 35.00±14.14 | 2 |"
    assert f"| badnets, anp, 500 | 0.2 | {line}" in text and text.count(line) == 2
    assert "by triggered images | " + line in text
    assert (out / "awm_fig1_prune-resnet18.png").exists()
    assert "Missing" in (out / "awm_fig1.md").read_text()
    front = (out / "README.md").read_text()
    assert "(awm_fig1_prune.md) | resnet18 | drawn |" in front and "Commits: abc" in front
    assert not list(out.glob("anp_thresholds*.png"))
    _same_without_runs(tmp_path, out)


def test_earlier_figures_json_is_read(tmp_path):
    path = tmp_path / "figures.json"
    scores = {"acc": 9.0, "asr": 8.0, "asr_all": 7.0}
    cell = {"status": "OK", "seconds": 1.0, "versions": {}, "commit": "a", "before": scores,
            "after": scores}
    path.write_text(json.dumps({"cells": {"a/b/c/1/d/0": cell}}))  # no other commands' rows
    assert kept.read(path) == kept.Kept({"a/b/c/1/d/0": cell}, {})
    run = {"dataset": "d", "arch": "a", "versions": {}, "rows": []}
    path.write_text(json.dumps({"cells": {}, "shares": {"awm_fig1": run}}))
    assert kept.read(path).measured == {"awm_fig1": {"command": "proportions", **run}}
    assert kept.read(tmp_path / "none.json") == kept.Kept({}, {})


def test_pages_by_hand():
    page = pages.Page("A", ["x < y", [["a"], ["1"]], pages.Heading("B"),
                            pages.Picture("p.png", "q")])
    assert pages.markdown(page) == "# A\n\nx < y\n\n| a |\n|---|\n| 1 |\n\n## B\n\n![q](p.png)\n"
    whole = pages.page_html("T", [page])
    assert "<p>x &lt; y</p><div class=t><table><tr><th>a</th></tr><tr><td>1</td></tr>" in whole
    assert "<h3>B</h3><p><img src='p.png' alt='q'></p></html>" in whole
    assert "<ul><li><a href='#p0'>A</a></ul><h2 id=p0>A</h2>" in whole
    marked = pages.page_html("T", [pages.Page("A", ["`<b>` of [it](awm8.md)", [["a"], ["`c`"]]])])
    assert "<p><code>&lt;b&gt;</code> of <a href='awm8.md'>it</a></p>" in marked
    assert "<td><code>c</code></td>" in marked


@pytest.mark.parametrize("module", [declared, figure_cells, kept, pages, proportions, table_cells,
                                    tables])
def test_examples_in_docstrings(module):
    assert doctest.testmod(module).failed == 0
