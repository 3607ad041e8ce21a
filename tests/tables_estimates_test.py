"""How long cells will take, before one like them was timed."""

import dataclasses

import pytest

from awm_jax import data
from experiments import cli, networks, presets, scene, table_cells, tables


def _options(tmp_path):
    return tables._parser().parse_args(["--runs", str(tmp_path / "runs")])


def test_a_guess_for_awm_follows_its_batches(tmp_path):
    """16, 32 and 128 images a step in the paper's Table 7; at most 32 in this project's variant."""
    estimates = tables.Estimates({}, _options(tmp_path))
    guesses = {(c.column.defence, c.samples): estimates.of(c)
               for c in table_cells.cells(("awm8",), 1)}
    paper, ours = tables._USUAL, tables._SECONDS["awm"]
    assert [guesses["awm_paper", n] for n in ("one-shot", 100, 500)] == [
        paper, 2 * paper, 8 * paper]
    assert [guesses["awm", n] for n in ("one-shot", 100, 500)] == [ours, 2 * ours, 2 * ours]


def test_a_network_that_is_kept_is_not_trained_again(tmp_path, tiny_dataset, monkeypatch):
    """What `scene.make` asks the cache for is what an estimate looks for there."""
    cell = next(table_cells.cells(("awm2",), 1))._replace(
        dataset="digits", arch="tiny_cnn", network=("--target", "1", "--epochs", "2"))
    options = _options(tmp_path)
    options.digits_dir = None
    estimates = tables.Estimates({}, options)
    monkeypatch.setitem(tables._TRAINING, "digits", 10.0)
    untrained = estimates.total([cell])
    args = cli.parser().parse_args(tables._arguments(cell, options))
    scene.make(cell.attack, args, data.load("digits"), networks.directory())
    estimates = tables.Estimates({}, options)
    assert estimates.total([cell]) == untrained - 2 * 10.0
    # From then on, epochs are as long as that network's were; two networks share a surrogate.
    monkeypatch.setitem(presets.PRESETS, "digits", dataclasses.replace(
        presets.PRESETS["digits"], surrogate_epochs=5))
    others = [cell._replace(attack=name) for name in ("trojan_sq", "trojan_wm")]
    epoch = networks.epoch_seconds("digits", "tiny_cnn", networks.directory())
    assert 0 < epoch < 60
    assert networks.epoch_seconds("digits", "small_vgg", networks.directory()) is None
    assert estimates.total(others) == pytest.approx(
        sum(map(estimates.of, others)) + (2 + 2 + 5) * epoch)
