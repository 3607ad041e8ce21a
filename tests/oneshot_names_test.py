"""What `experiments.oneshot` calls a network and a purification, and what of files and values."""

import dataclasses
import multiprocessing

import numpy as np
import pytest
from PIL import Image

from awm_jax import attacks, checkpoint, data
from experiments import cli, defending, oneshot, results, scene


def _args(*more):
    return cli.parser().parse_args(["--dataset", "digits", *map(str, more)])


@pytest.fixture
def digits():
    empty = np.zeros(0)
    images = np.zeros((2, 32, 32, 3), np.uint8)
    return data.Dataset("digits", images, empty, empty, empty, 10, False)


def test_another_picture_by_the_same_name_is_another_network(tmp_path, digits):
    """So neither results nor the cache of networks answer for the first."""
    names, specs = [], []
    for i, shade in enumerate((0, 255)):
        (tmp_path / str(i)).mkdir()
        Image.fromarray(np.full((32, 32, 3), shade, np.uint8)).save(tmp_path / str(i) / "t.png")
        args = _args("--trigger", tmp_path / str(i) / "t.png", "--target", 1)
        names.append(oneshot._cell_name("badnets", "clp", 0, args, digits))
        specs.append(scene.attack_of("badnets", args, digits, tmp_path)[1].digest)
    assert names[0] != names[1] and specs[0] != specs[1]
    again = _args("--trigger", tmp_path / "1" / "t.png", "--target", 1)
    assert oneshot._cell_name("badnets", "clp", 0, again, digits) == names[1]


def test_another_network_at_the_same_place_is_another(tmp_path, digits):
    names = []
    for text in ("one", "two", "one"):
        (tmp_path / "net").mkdir(exist_ok=True)
        (tmp_path / "net" / "weights").write_text(text)
        args = _args("--checkpoint", tmp_path / "net")
        names.append(oneshot._cell_name("badnets", "clp", 0, args, digits))
    assert names[0] == names[2] != names[1]
    (tmp_path / "net" / "weights").rename(tmp_path / "net" / "other")  # names within count
    assert oneshot._cell_name("badnets", "clp", 0, args, digits) != names[0]


@pytest.mark.parametrize("text, value", [("false", False), ("False", False), ("true", True)])
def test_truth_is_said_in_words(digits, text, value):
    assert defending.config("ft_sam", _args("--set", f"adaptive={text}"), digits).adaptive is value
    assert defending._value("awm", "variant", text.lower()) == text.lower()  # there it is a name


@pytest.mark.parametrize("defence, said, words", [
    ("ft_sam", "adaptive=no", "adaptive=no of ft_sam to be true or false"),
    ("ft", "epochs=1e1", "epochs=1e1 of ft to be a whole number"),
    ("ft", "batch_size=2.5", "batch_size=2.5 of ft to be a whole number"),
    ("awm", "epochs=2.0", "epochs=2.0 of awm to be a whole number"),
])
def test_values_of_another_kind_are_refused(digits, defence, said, words):
    with pytest.raises(ValueError, match=f"Expected --set {words}"):
        defending.config(defence, _args("--set", said), digits)


def test_a_variant_that_is_set_is_the_variant_by_name():
    """Its copies and recalibration too, which depend on the data set."""
    empty = np.zeros(0)
    cifar10 = data.Dataset("cifar10", empty, empty, empty, empty, 10, True)
    by_setting = defending.config("awm", _args("--set", "variant=paper"), cifar10)
    assert by_setting == defending.config("awm_paper", _args(), cifar10)


def test_what_a_file_cannot_tell_is_asked_for(tmp_path, digits):
    Image.fromarray(np.zeros((32, 32, 3), np.uint8)).save(tmp_path / "t.png")
    with pytest.raises(ValueError, match="--target beside --trigger"):
        cli.check(_args("--trigger", tmp_path / "t.png"))
    learning = dataclasses.replace(attacks.make("badnets", None, (32, 32, 3), 10), learn=print)
    (tmp_path / "net").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scene, "attack_of", lambda *args: (learning, None))
        patch.setattr(scene.splits, "defender_split", lambda dataset: None)
        with pytest.raises(ValueError, match="learnt with the network"):
            scene.make("input_aware", _args("--checkpoint", tmp_path / "net"), digits, tmp_path)


def _write(path, who, barrier):
    """Twenty cells, one at a time, as a run writes them."""
    kept = {}
    barrier.wait()
    for i in range(20):
        with results.locked(path):
            kept = {**results.read_cells(path, "digits", "cnn"), **kept, f"{who}/{i}": {}}
            results.write_json(path, {"dataset": "digits", "arch": "cnn", "cells": kept})


def test_two_runs_at_once_lose_nothing(tmp_path):
    context = multiprocessing.get_context("spawn")
    barrier, path = context.Barrier(2), tmp_path / "results.json"
    runs = [context.Process(target=_write, args=(path, who, barrier)) for who in "ab"]
    for run in runs:
        run.start()
    for run in runs:
        run.join()
    assert len(results.read_cells(path, "digits", "cnn")) == 40


def test_every_damaged_file_is_kept(tmp_path, capsys):
    for i in range(3):
        (tmp_path / "results.json").write_text(f"damaged {i}")
        assert results.read_cells(tmp_path / "results.json", "digits", "cnn") == {}
    kept = sorted(path.read_text() for path in tmp_path.glob("*damaged*"))
    assert kept == ["damaged 0", "damaged 1", "damaged 2"]


def test_networks_of_other_settings_have_another_place(tmp_path, tiny):
    first = defending._place(tmp_path, "badnets-ft", 0, "one")
    checkpoint.save(first, tiny, {"status": "OK", "made_of": "one"})
    assert defending._place(tmp_path, "badnets-ft", 0, "one") == first
    other = defending._place(tmp_path, "badnets-ft", 0, "two")
    assert other != first and "two" in other.name
    assert defending._place(tmp_path, "badnets-ft", 1, "two").name == "badnets-ft-1"


def test_what_an_earlier_run_left_is_set_aside(tmp_path, capsys):
    for text in "ab":
        (tmp_path / "rows.json").write_text(text)
        results.set_aside(tmp_path / "rows.json")
        assert "rows.earlier" in capsys.readouterr().out
    results.set_aside(tmp_path / "rows.json")  # nothing there, nothing said
    assert capsys.readouterr().out == ""
    assert [p.read_text() for p in sorted(tmp_path.iterdir())] == ["a", "b"]
