"""The command that trains backdoored networks and scores them."""

import json
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from awm_jax import attacks, data, metrics, models
from awm_jax.data import splits
from awm_jax.types import Arch
from experiments import backdoor, networks, scene

ARGV = ["--epochs", "1", "--attack", "badnets,wanet", "--arch", "tiny_cnn"]


def test_scores_each_network_and_a_benign_one_and_keeps_them(tiny_dataset, capsys, monkeypatch):
    out = tiny_dataset / "run"
    assert backdoor.main([*ARGV, "--benign", "--out", str(out)]) == 0
    rows = json.loads((out / "networks.json").read_text())["rows"]
    assert [(row["attack"], row["rate"]) for row in rows] == [
        ("badnets", 0.05), ("wanet", 0.1), ("benign", None)]
    assert all(0 <= row["acc"] <= 100 for row in rows)
    assert rows[0]["covered"] is None and 0 <= rows[1]["covered"] <= 100
    assert all(0 <= row["asr"] <= 100 for row in rows[:2]) and rows[2]["asr"] is None
    assert "| benign | - | - | 1 |" in (out / "networks.md").read_text()

    def refuse(*args, **kwargs):
        raise AssertionError("trained again")

    monkeypatch.setattr(networks.training, "train", refuse)
    assert backdoor.main([*ARGV, "--benign", "--out", str(out)]) == 0
    assert json.loads((out / "networks.json").read_text())["rows"] == rows


def test_table_by_hand():
    row = {"attack": "a", "target": 3, "rate": 0.8, "epochs": 2, "acc": 98.765, "asr": 50.0,
           "asr_all": 49.0, "recovered": 1.0, "covered": None, "parts": [], "asr_parts": []}
    assert backdoor.table([row]).splitlines()[-1] == (
        "| a | 3 | 0.8 | 2 | 98.77 | 50.00 | 49.00 | 1.00 | - |")
    covered = backdoor.table([{**row, "covered": 90.125}])
    assert covered.splitlines()[-1].endswith("| 1.00 | 90.12 |")
    several = backdoor.table([{**row, "parts": ["x", "y"], "asr_parts": [40.0, 30.125]}])
    assert several.splitlines()[-2:] == [
        "| a: x | 3 | - | - | - | 40.00 | - | - | - |",
        "| a: y | 3 | - | - | - | 30.12 | - | - | - |"]


class _Blank(NamedTuple):
    """A trigger whose cover leaves a black image."""

    shade: jax.Array

    def __call__(self, images):
        return images

    def cover(self, key, images):
        return images * self.shade


def test_covered_images_are_counted_by_their_true_class(tiny_dataset):
    """Black images all get one class, whose share of the images is the accuracy."""
    digits = data.load("digits")
    arch = Arch(name="tiny_cnn", num_classes=10, image_shape=(8, 8, 3))
    params = models.create(jax.random.key(0), arch)
    attack = attacks.Attack("blank", _Blank(jnp.zeros(())), 0, 10, cover_ratio=1.0)
    on_stage = scene.Scene("blank", params, attack, digits, splits.defender_split(digits), None)
    (black,) = metrics.predict(params, np.zeros((1, 8, 8, 3), np.float32))
    labels = digits.test_labels[on_stage.split.eval_indices]
    assert on_stage.covered == pytest.approx(100 * (labels == black).mean())
    assert 0 < on_stage.covered < 100


@pytest.mark.parametrize("argv, word", [
    (["--attack", "trojan_sq"], "32x32"), (["--attack", "sig", "--target", "11"], "0..9"),
    (["--benign", "--attack", "badnets", "--checkpoint", "."], "no --checkpoint")])
def test_what_does_not_go_together_is_refused(tiny_dataset, argv, word, capsys):
    assert backdoor.main([*argv, "--out", str(tiny_dataset / "run")]) == 2
    assert word in capsys.readouterr().err and not (tiny_dataset / "run").exists()
