"""The command that perturbs neurons and reports what the network predicts."""

import json

import numpy as np
import pytest

from experiments import proportions

ARGV = ["--epochs", "1", "--samples", "20", "--eps", ".4", "--seeds", "2"]


def test_measures_the_suspect_and_a_benign_network(tiny_dataset, capsys):
    out = tiny_dataset / "run"
    assert proportions.main([*ARGV, "--benign", "--out", str(out)]) == 0
    rows = json.loads((out / "proportions.json").read_text())["rows"]
    assert [(row["network"], row["samples"]) for row in rows] == [
        ("badnets", 20), ("benign", 20)]
    for row in rows:
        shares = np.asarray(row["shares"])
        assert shares.shape == (2, 10) and row["eps"] == 0.4
        np.testing.assert_allclose(shares.sum(axis=1), 1, atol=1e-6)
        assert (shares[0] != shares[1]).any()  # another draw, another start
    assert rows[0]["shares"] != rows[1]["shares"]
    assert (out / "badnets.png").stat().st_size > 0
    assert (out / "badnets-benign.png").stat().st_size > 0
    assert capsys.readouterr().out.count("| badnets | 20 | 0.4 |") == 1


def test_table_by_hand():
    row = {"network": "a", "samples": 4, "eps": 0.5, "steps": 1, "target": 1,
           "shares": [[0.0, 0.25, 0.75], [0.0, 0.75, 0.25]], "error_rate": [0.5, 0.5]}
    line = "| a | 4 | 0.5 | 50.00±0.00 | 50.00±35.36 | 50.00±35.36 (1) |"
    assert line in proportions._table([row])
    # Rows that would look alike say what they differ in.
    text = proportions._table([{**row, "key": "a/s0/4"}, {**row, "key": "a/s1/4"}])
    assert "| a (a/s0, steps 1, 2 draws) |" in text and "| a (a/s1, steps 1, 2 draws) |" in text
    assert "| 50.00±0.00 | - |" in proportions._table([{**row, "target": None}])


@pytest.mark.parametrize("argv, word", [
    (["--samples", "one-shot,0"], "number > 0, got '0'"), (["--eps", "a"], "numbers > 0"),
    (["--eps", ".1,0"], "numbers > 0"), (["--eps", "nan"], "numbers > 0"),
    (["--steps", "0"], "whole number")])
def test_wrong_values_get_one_line(argv, word, capsys):
    with pytest.raises(SystemExit) as caught:
        proportions.main(argv)
    err = capsys.readouterr().err
    assert caught.value.code == 2 and err.count("\n") == 1 and word in err


def test_a_benign_twin_of_a_strangers_network_is_refused(tiny_dataset, capsys):
    argv = ["--benign", "--checkpoint", str(tiny_dataset), "--out", str(tiny_dataset / "run")]
    assert proportions.main(argv) == 2
    assert "no --checkpoint" in capsys.readouterr().err and not (tiny_dataset / "run").exists()
