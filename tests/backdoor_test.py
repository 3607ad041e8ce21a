"""The command that trains backdoored networks and scores them."""

import json

import pytest

from experiments import backdoor, networks

ARGV = ["--epochs", "1", "--attack", "badnets,wanet"]


def test_scores_each_network_and_a_benign_one_and_keeps_them(tiny_dataset, capsys, monkeypatch):
    out = tiny_dataset / "run"
    assert backdoor.main([*ARGV, "--benign", "--out", str(out)]) == 0
    rows = json.loads((out / "networks.json").read_text())["rows"]
    assert [(row["attack"], row["rate"]) for row in rows] == [
        ("badnets", 0.05), ("wanet", 0.1), ("benign", None)]
    assert all(0 <= row["acc"] <= 100 for row in rows)
    assert all(0 <= row["asr"] <= 100 for row in rows[:2]) and rows[2]["asr"] is None
    assert "| benign | - | - | 1 |" in (out / "networks.md").read_text()

    def refuse(*args, **kwargs):
        raise AssertionError("trained again")

    monkeypatch.setattr(networks.training, "train", refuse)
    assert backdoor.main([*ARGV, "--benign", "--out", str(out)]) == 0
    assert json.loads((out / "networks.json").read_text())["rows"] == rows


def test_table_by_hand():
    row = {"attack": "a", "target": 3, "rate": 0.8, "epochs": 2, "acc": 98.765, "asr": 50.0,
           "asr_all": 49.0, "recovered": 1.0, "parts": [], "asr_parts": []}
    assert backdoor.table([row]).splitlines()[-1] == (
        "| a | 3 | 0.8 | 2 | 98.77 | 50.00 | 49.00 | 1.00 |")
    several = backdoor.table([{**row, "parts": ["x", "y"], "asr_parts": [40.0, 30.125]}])
    assert several.splitlines()[-2:] == [
        "| a: x | 3 | - | - | - | 40.00 | - | - |", "| a: y | 3 | - | - | - | 30.12 | - | - |"]


@pytest.mark.parametrize("argv, word", [
    (["--attack", "trojan_sq"], "32x32"), (["--attack", "sig", "--target", "11"], "0..9"),
    (["--benign", "--attack", "badnets", "--checkpoint", "."], "no --checkpoint")])
def test_what_does_not_go_together_is_refused(tiny_dataset, argv, word, capsys):
    assert backdoor.main([*argv, "--out", str(tiny_dataset / "run")]) == 2
    assert word in capsys.readouterr().err and not (tiny_dataset / "run").exists()
