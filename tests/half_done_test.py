"""Several sweeps in one run directory: each has a state of its own and leaves the others' alone."""

import json

import numpy as np
import pytest

from awm_jax import checkpoint
from awm_jax.defences import awm_rows, rows
from experiments import half_done, oneshot, sweeping


def _save(place, names, done=1):
    checkpoint.save_tree(place, {"0": np.zeros(1)}, {"rows": names, "chunk": 1, "done": done},
                         overwrite=True)


def _left(folder, names, name=None, done=1):
    """What a run of these rows leaves that is interrupted; under an older name if one is given."""
    with pytest.raises(KeyboardInterrupt), half_done.claimed(folder, names) as place:
        _save(place if name is None else folder / name, names[:1], done)
        raise KeyboardInterrupt
    return place if name is None else folder / name


def _there(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("name", [None, "1a2b3c4d-host0"])
def test_an_interrupted_run_goes_on_from_its_own(tmp_path, name):
    """From all of its rows or those left, or more than it had; also from a place of before."""
    other = _left(tmp_path, ["x", "y"])
    mine = _left(tmp_path, ["a", "b"], name)
    for names in (["b", "a"], ["a"], ["c", "a", "b"]):
        with pytest.raises(KeyboardInterrupt), half_done.claimed(tmp_path, names) as place:
            assert place == mine
            raise KeyboardInterrupt
    assert _there(tmp_path) == sorted([mine.name, other.name])
    with half_done.claimed(tmp_path, ["a"]) as place:
        assert place == mine
    assert _there(tmp_path) == [other.name]
    with half_done.claimed(tmp_path, ["b", "y"]) as place:  # of rows that nobody kept alone
        assert not place.exists()
    assert _there(tmp_path) == [other.name] and checkpoint.metadata(other)["rows"] == ["x"]


def test_two_at_once_have_a_place_each(tmp_path):
    """Even the same command twice; the first one's state stays as long as it lives, and longer."""
    with pytest.raises(KeyboardInterrupt), half_done.claimed(tmp_path, ["a", "b"]) as first:
        _save(first, ["a"])
        for _ in range(2):
            with half_done.claimed(tmp_path, ["a", "b"]) as second:
                assert second != first and not second.exists()
                _save(second, ["a"])
            assert not second.exists() and checkpoint.exists(first)
        half_done.clear(tmp_path)
        assert checkpoint.exists(first)
        raise KeyboardInterrupt
    half_done.clear(tmp_path)
    assert not _there(tmp_path)


def test_the_farthest_of_several_is_gone_on_from_and_all_are_removed(tmp_path):
    early, late = (_left(tmp_path, ["a"], name, done) for name, done in (("p", 1), ("q", 3)))
    half = tmp_path / ".q-unfinished"  # of a run that was killed while it wrote
    half.mkdir()
    with half_done.claimed(tmp_path, ["a"]) as place:
        assert place == late and early.exists()
    assert not _there(tmp_path)


def test_what_is_no_state_is_left_alone(tmp_path):
    for name in ("somebodys", ".hidden"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("precious")
    checkpoint.save_tree(tmp_path / "tree", {"0": np.zeros(1)}, {"no": "rows"})
    with half_done.claimed(tmp_path, ["a"]) as place:
        _save(place, ["a"])
    assert _there(tmp_path) == [".hidden", "somebodys", "tree"]


def test_a_state_that_cannot_be_read_starts_again(tmp_path):
    """Of another release with other fields, or of the same with other shapes; damaged."""
    like = {"a": np.zeros((1, 3)), "b": np.zeros((1, 2))}, None
    asked, meta = [rows.Row(None, 0, 0, None, "a")], {"rows": ["a"], "chunk": 1, "done": 2}
    history = {str(i): np.zeros((1, 2), np.float32) for i in range(2, 8)}
    for kept, fits in (({"0": like[0]["a"], "1": like[0]["b"], **history}, True),
                       ({"0": like[0]["b"], "1": like[0]["a"], **history}, False),
                       ({"0": like[0]["a"]}, False)):
        checkpoint.save_tree(tmp_path / "state", kept, meta, overwrite=True)
        assert (awm_rows._interrupted(tmp_path / "state", meta, asked, like) is not None) == fits


ARGV = ["--epochs", "1", "--purify_epochs", "2", "--arch", "one_block_cnn", "--defence",
        "awm_paper", "--attack", "badnets", "--set", "inner_steps=2", "--set", "outer_steps=2",
        "--seeds", "1", "--sweep", "on"]


def test_two_sweeps_in_one_folder_do_not_touch_each_other(tiny_dataset, monkeypatch, capsys):
    """They differ in a setting that they could share a program with; the first is interrupted."""
    real, stops = awm_rows.purify, [True]

    def purify(*args, keep, on_epochs, **options):
        def watch(done, *rest):
            on_epochs(done, *rest)
            if stops:
                raise KeyboardInterrupt

        return real(*args, every=1, keep=keep, on_epochs=watch, **options)

    monkeypatch.setattr(sweeping.awm_rows, "purify", purify)
    out = tiny_dataset / "run"
    argv = [*ARGV, "--out", str(out), "--set"]
    assert oneshot.main([*argv, "alpha=.5"]) == 130
    (state,) = (out / "sweep").iterdir()
    stops.clear()
    assert oneshot.main([*argv, "alpha=.9"]) == 0
    assert "go on" not in capsys.readouterr().out
    assert [*(out / "sweep").iterdir()] == [state] and checkpoint.exists(state)
    assert oneshot.main([*argv, "alpha=.5"]) == 0
    assert "1 rows go on after 1 of 2 epochs" in capsys.readouterr().out
    assert not [*(out / "sweep").iterdir()]
    assert len(json.loads((out / "results.json").read_text())["cells"]) == 2
