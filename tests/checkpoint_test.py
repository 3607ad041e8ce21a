"""Networks on disk."""

import dataclasses

import jax
import numpy as np
import pytest

from awm_jax import checkpoint


def test_round_trip_is_exact(tmp_path, small_params):
    params = dataclasses.replace(
        small_params, arch=dataclasses.replace(small_params.arch, mean=(0.1, 0.2, 0.3)))
    checkpoint.save(tmp_path / "net", params, {"note": "x"})
    assert checkpoint.exists(tmp_path / "net")
    loaded, metadata = checkpoint.load(tmp_path / "net")
    assert loaded.arch == params.arch and metadata == {"note": "x"}
    assert jax.tree.structure(loaded) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, loaded, params)


def test_overwriting_must_be_asked_for(tmp_path, small_params):
    checkpoint.save(tmp_path / "net", small_params)
    with pytest.raises(FileExistsError, match="overwrite=True"):
        checkpoint.save(tmp_path / "net", small_params)
    checkpoint.save(tmp_path / "net", small_params, {"second": 1}, overwrite=True)
    assert checkpoint.load(tmp_path / "net")[1] == {"second": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["net"]


def test_an_interrupted_save_leaves_the_old_one(tmp_path, small_params, monkeypatch):
    checkpoint.save(tmp_path / "net", small_params, {"old": 1})

    def stop(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "_replace", stop)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save(tmp_path / "net", small_params, {"new": 1}, overwrite=True)
    assert checkpoint.load(tmp_path / "net")[1] == {"old": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["net"]


def test_missing_and_damaged_directories_are_named(tmp_path, small_params):
    with pytest.raises(FileNotFoundError, match="nothing-here"):
        checkpoint.load(tmp_path / "nothing-here")
    checkpoint.save_tree(tmp_path / "tree", {"a": np.ones(2)})
    with pytest.raises(OSError, match="no network"):
        checkpoint.load(tmp_path / "tree")
    (tmp_path / "tree" / "awm_jax.json").write_text("{")
    with pytest.raises(OSError, match="damaged"):
        checkpoint.load_tree(tmp_path / "tree", {"a": np.ones(2)})


def test_trees_come_back_in_the_structure_asked_for(tmp_path):
    from awm_jax.training import TrainState

    state = TrainState({"w": np.ones(2)}, {}, (np.zeros(1), {"m": np.ones(3)}), np.int32(4))
    checkpoint.save_tree(tmp_path / "state", state)
    loaded = checkpoint.load_tree(tmp_path / "state", state)
    assert isinstance(loaded, TrainState) and int(loaded.epoch) == 4
    assert jax.tree.structure(loaded) == jax.tree.structure(state)
