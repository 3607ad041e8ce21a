"""Tables out of several run directories."""

import json

import pytest

from experiments import merge


def _run(folder, cells, dataset="digits", samples="one-shot"):
    """A run directory; cells as (attack, defence, seed, ACC after)."""
    def scores(acc):
        return {"acc": acc, "asr": 1.0, "asr_all": 2.0, "recovered": 3.0}

    folder.mkdir()
    (folder / "results.json").write_text(json.dumps({
        "dataset": dataset, "arch": "small_vgg", "cells": {
            f"{cell}": {"attack": cell[0], "defence": cell[1], "seed": cell[2], "der": 4.0,
                        "samples": samples, "status": "OK", "seconds": 1.0,
                        "before": scores(99.0), "after": scores(cell[3])} for cell in cells}}))
    return folder


def test_seeds_and_attacks_of_two_runs_become_one_table(tmp_path, capsys):
    one = _run(tmp_path / "1", [("a", "ft", 0, 90.0), ("a", "anp", 0, 50.0)])
    two = _run(tmp_path / "2", [("a", "ft", 1, 80.0), ("a", "ft", 0, 10.0), ("b", "ft", 0, 70.0)])
    out = tmp_path / "table.md"
    assert merge.main([str(one), str(two), "--out", str(out)]) == 0
    text = out.read_text()
    # Of seed 0, the first run's; the second run has another.
    assert "| ft | 85.0±7.1 / 1.0±0.0 / 4.0±0.0 | 70.0 / 1.0 / 4.0 |" in text
    assert "| anp | 50.0 / 1.0 / 4.0 | - |" in text
    assert "85.00±7.07" in text and text in capsys.readouterr().out


@pytest.mark.parametrize("other", [{"dataset": "gtsrb"}, {"samples": "100"}])
def test_runs_that_do_not_belong_together_are_refused(tmp_path, capsys, other):
    one = _run(tmp_path / "1", [("a", "ft", 0, 90.0)])
    two = _run(tmp_path / "2", [("a", "ft", 1, 90.0)], **other)
    assert merge.main([str(one), str(two)]) == 2
    assert next(iter(other.values())) in capsys.readouterr().err


def test_settings_and_networks_are_not_mixed(tmp_path, capsys):
    """Named as oneshot does: the attack and its network, the defence and its settings, the seed."""
    run = _run(tmp_path / "1", [("a", "ft", 0, 90.0), ("a", "ft", 1, 20.0)])
    found = json.loads((run / "results.json").read_text())
    first = "a/e6-p0.05-s0/ft-11-one-shot/0"
    for second, status in (("a/e6-p0.05-s0/ft-11-one-shot/1", 0),
                           ("a/e6-p0.05-s0/ft-22-one-shot/1", 2),
                           ("a/e6-p0.05-s1/ft-11-one-shot/1", 2)):
        found["cells"] = dict(zip((first, second), found["cells"].values(), strict=True))
        (run / "results.json").write_text(json.dumps(found))
        assert merge.main([str(run), "--out", str(tmp_path / "new" / "table.md")]) == status
    assert "e6-p0.05-s0/ft-11-one-shot and a/e6-p0.05-s1" in capsys.readouterr().err


@pytest.mark.parametrize("content", ["{", "[]", '{"rows": []}', '{"cells": []}',
                                     '{"cells": {"a": {}}, "dataset": "x", "arch": "y"}'])
def test_files_of_another_kind_are_named(tmp_path, capsys, content):
    (tmp_path / "results.json").write_text(content)
    assert merge.main([str(tmp_path)]) == 2
    err = capsys.readouterr().err
    assert "results.json to be written by experiments.oneshot" in err and err.count("\n") == 1


def test_no_results_there(tmp_path, capsys):
    assert merge.main([str(tmp_path)]) == 2
    assert "results.json" in capsys.readouterr().err
