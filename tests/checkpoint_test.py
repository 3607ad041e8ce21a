"""Networks on disk."""

import dataclasses
import shutil

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
    assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(loaded))
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


def test_a_failed_rename_puts_the_old_one_back(tmp_path, small_params, monkeypatch):
    checkpoint.save(tmp_path / "net", small_params, {"old": 1})
    real, calls = checkpoint.os.replace, []

    def second_fails(source, target):
        calls.append(target)
        if len(calls) == 2:
            raise OSError("disk full")
        real(source, target)

    monkeypatch.setattr(checkpoint.os, "replace", second_fails)
    with pytest.raises(OSError, match="disk full"):
        checkpoint._replace(_another(tmp_path), tmp_path / "net")
    assert len(calls) == 3 and checkpoint.load(tmp_path / "net")[1] == {"old": 1}


def _another(folder):
    """A finished directory that waits for its name."""
    (folder / "new").mkdir()
    return folder / "new"


def test_other_directories_are_never_overwritten(tmp_path, small_params):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.txt").write_text("years")
    with pytest.raises(FileExistsError, match="never overwritten"):
        checkpoint.save(tmp_path / "home", small_params, overwrite=True)
    assert [p.name for p in (tmp_path / "home").iterdir()] == ["thesis.txt"]


def test_missing_and_damaged_directories_are_named(tmp_path, small_params):
    with pytest.raises(FileNotFoundError, match="nothing-here"):
        checkpoint.load(tmp_path / "nothing-here")
    checkpoint.save_tree(tmp_path / "tree", {"a": np.ones(2)})
    with pytest.raises(OSError, match="no network"):
        checkpoint.load(tmp_path / "tree")
    with pytest.raises(OSError, match=r"'a'.*\(2,\) instead of \(3,\)"):
        checkpoint.load_tree(tmp_path / "tree", {"a": np.ones(3)})
    for like in ({"b": np.ones(2)}, {"a": np.ones(2), "b": np.ones(2)}, {}):
        with pytest.raises(OSError, match="another structure"):
            checkpoint.load_tree(tmp_path / "tree", like)
    checkpoint.save(tmp_path / "half", small_params)
    shutil.rmtree(tmp_path / "half" / "tree")
    with pytest.raises(OSError, match="half is damaged"):
        checkpoint.load(tmp_path / "half")
    (tmp_path / "tree" / "awm_jax.json").write_text("{")
    with pytest.raises(OSError, match="damaged"):
        checkpoint.load_tree(tmp_path / "tree", {"a": np.ones(2)})


def test_trees_come_back_in_the_structure_asked_for(tmp_path):
    from awm_jax.training import TrainState

    state = TrainState({"w": np.ones(2)}, {}, (np.zeros(1), {"m": np.ones(3)}), np.int32(4))
    checkpoint.save_tree(tmp_path / "state", state)
    loaded = checkpoint.load_tree(tmp_path / "state", state)
    assert isinstance(loaded, TrainState) and int(loaded.epoch) == 4
    jax.tree.map(np.testing.assert_array_equal, loaded, state)
    assert jax.tree.structure(loaded) == jax.tree.structure(state)
