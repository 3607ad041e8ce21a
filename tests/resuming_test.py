"""Commands whose rows are kept one by one: what is interrupted goes on, what is done stays."""

import json
import types

import pytest

from awm_jax.defences.awm_config import VARIANTS
from experiments import (
    backdoor,
    cli,
    detection,
    known_trigger,
    proportions,
    resuming,
    scene,
    thresholds,
    visualise,
)

_SCORES = {"acc": 90.0, "asr": 1.0, "asr_all": 2.0, "recovered": 3.0}
_OF_DETECTION = dict.fromkeys(("score", "lead", "anomaly", "concentration", "arrivals"), 0.5)
ROWS = {
    backdoor: {"attack": "a", "target": 0, "rate": 0.1, "epochs": 1, **_SCORES, "covered": None,
               "parts": [], "asr_parts": []},
    detection: {"attack": "none", "seed": 0, "asr": None, "all_to_all": False, **_OF_DETECTION},
    known_trigger: {"network": "a", "way": "oracle", "seed": 0, "share": 0.5, "after": _SCORES},
    proportions: {"network": "a", "samples": 20, "eps": 0.1, "steps": 1, "target": 0,
                  "shares": [[0.5, 0.5]], "error_rate": [0.5]},
    thresholds: {"network": "a", "defence": "anp", "set": [], "samples": 20, "before": _SCORES,
                 "points": [{"threshold": 0.2, "pruned": 1, **_SCORES}]},
    visualise: {"network": "a", "defence": "ft", "before": _SCORES, "after": _SCORES,
                "correlations": {"backdoored": {"spearman": 0.5}}},
}
# Two rows each.
ASKED = [(backdoor, "_rows", "networks", ["--attack", "badnets,sig"]),
         (detection, "_rows", "networks", ["--networks", "1"]),
         (known_trigger, "measure", "known_trigger", ["--seeds", "2"]),
         (proportions, "measure", "proportions", ["--eps", ".1,.2"]),
         (thresholds, "measure", "thresholds", ["--seeds", "2"]),
         (visualise, "show", "visualise", ["--attack", "badnets,sig", "--defence", "ft"])]


@pytest.mark.parametrize("command, name, file, argv", ASKED)
def test_an_interrupted_command_goes_on(tiny_dataset, monkeypatch, capsys, command, name, file,
                                        argv):
    calls = []

    def row(*args):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return ROWS[command] if command is visualise else [ROWS[command]]

    monkeypatch.setattr(command, name, row)
    out = tiny_dataset / "run"
    argv = [*argv, "--epochs", "1", "--arch", "tiny_cnn", "--out", str(out)]
    assert command.main(argv) == 130
    assert cli.GOES_ON in capsys.readouterr().err
    first = json.loads((out / f"{file}.json").read_text())["rows"]
    assert len(first) == 1 and first[0]["commit"]
    assert command.main(argv) == 0 and len(calls) == 3
    rows = json.loads((out / f"{file}.json").read_text())["rows"]
    assert rows[0] == first[0] and len({row["key"] for row in rows}) == 2 == len(rows)
    assert command.main(argv) == 0 and len(calls) == 3  # all is there
    # Other networks' rows stand beside these in the file; a fresh start leaves the file, renamed.
    assert command.main([*argv, "--network_seed", "1"]) == 0 and len(calls) == 5
    assert len(json.loads((out / f"{file}.json").read_text())["rows"]) == 4
    assert command.main([*argv, "--fresh"]) == 0 and len(calls) == 7
    assert len(json.loads((out / f"{file}.json").read_text())["rows"]) == 2
    assert len(json.loads((out / f"{file}.earlier.json").read_text())["rows"]) == 4


@pytest.mark.parametrize("command, more", [
    (known_trigger, ["--samples", "20"]), (proportions, ["--steps", "2"]),
    (proportions, ["--seeds", "3"]), (visualise, ["--seed", "1"]), (visualise, ["--images", "99"]),
    (visualise, ["--purify_epochs", "3"]), (visualise, ["--target", "1"]),
    (thresholds, ["--samples", "20"]), (thresholds, ["--thresholds", ".2"]),
    (thresholds, ["--defence", "rnp"]), (thresholds, ["--set", "lr=.1"]),
    (detection, ["--samples", "20"]), (backdoor, ["--poison_rate", ".2"])])
def test_what_is_asked_otherwise_is_done(tiny_dataset, monkeypatch, command, more):
    name, argv = next((name, argv) for one, name, _, argv in ASKED if one is command)
    calls = []

    def row(*args):
        calls.append(args)
        return ROWS[command] if command is visualise else [ROWS[command]]

    monkeypatch.setattr(command, name, row)
    argv = [*argv, "--epochs", "1", "--arch", "tiny_cnn", "--out", str(tiny_dataset / "run")]
    assert command.main(argv) == 0 and len(calls) == 2
    assert command.main([*argv, *more]) == 0 and len(calls) == 4


@pytest.fixture
def kept(tmp_path):
    """Opens the rows of a command."""
    def opened(arch="small_vgg", fresh=False):
        return resuming.Rows(tmp_path / "rows.json", "experiments.some",
                             types.SimpleNamespace(arch=arch, fresh=fresh),
                             types.SimpleNamespace(name="digits", num_classes=2, class_names=()))
    return opened


def _never():
    raise AssertionError("made again")


def test_rows_are_given_as_they_are_written(kept, tmp_path):
    rows = kept().of("one", lambda a, b: [{"x": (a, b)}, {"x": 3}], 1, 2)
    assert [row["x"] for row in rows] == [[1, 2], 3]
    assert kept().of("one", _never) == rows
    found = json.loads((tmp_path / "rows.json").read_text())
    assert found["rows"] == rows and found["dataset"] == "digits" and found["versions"]
    assert found["command"].startswith("python -m experiments.some")


def test_two_at_once_lose_nothing_of_each_other(kept, tmp_path):
    one, other = kept(), kept()
    one.of("a", lambda: [{"x": 1}])
    # While a row is being made, another command writes its own.
    other.of("b", lambda: one.of("c", lambda: [{"x": 3}]) and [{"x": 2}])
    found = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert [row["key"] for row in found] == ["a", "c", "b"]


@pytest.mark.parametrize("text", [
    "{", "[]", '{"rows": [{"x": 1}], "dataset": "digits", "num_classes": 2, "class_names": [], '
    '"arch": "small_vgg"}'])
def test_a_file_of_something_else_is_set_aside(kept, tmp_path, text, capsys):
    (tmp_path / "rows.json").write_text(text)
    assert kept().of("a", lambda: [{"x": 1}])[0]["x"] == 1
    assert (tmp_path / "rows.earlier.json").read_text() == text
    assert "rows.earlier.json" in capsys.readouterr().out


def test_rows_of_another_network_are_set_aside(kept, tmp_path):
    kept().of("a", lambda: [{"x": 1}])
    assert kept("resnet18").of("a", lambda: [{"x": 2}])[0]["x"] == 2
    assert (tmp_path / "rows.earlier.json").exists()


def test_a_network_is_named_by_all_that_decides_it():
    digits = types.SimpleNamespace(name="digits")
    argvs = [[], ["--epochs", "99"], ["--network_seed", "1"], ["--poison_rate", ".3"],
             ["--target", "3"]]
    names = [scene.network_name("badnets", cli.parser().parse_args(argv), digits)
             for argv in argvs]
    assert len(set(names)) == len(argvs)


def test_a_scan_with_other_constants_is_another(tiny_dataset, monkeypatch):
    calls = []
    monkeypatch.setattr(detection, "_rows", lambda *args: calls.append(args) or [ROWS[detection]])
    argv = ["--networks", "1", "--epochs", "1", "--arch", "tiny_cnn", "--out",
            str(tiny_dataset / "run")]
    assert detection.main(argv) == 0 and len(calls) == 2
    monkeypatch.setitem(VARIANTS["distilled"], "survey_steps", 500)
    assert detection.main(argv) == 0 and len(calls) == 4


def test_two_runs_of_different_kinds_in_one_file_lose_nothing(kept, tmp_path):
    """Each sets the other's rows aside when it finds them there, at whatever time."""
    first = kept()
    first.of("a1", lambda: [{"x": 1}])
    second = kept(arch="cnn")  # sets a1 aside
    second.of("b1", lambda: [{"x": 2}])
    first.of("a2", lambda: [{"x": 3}])
    files = [json.loads(path.read_text()) for path in tmp_path.glob("rows*.json")]
    assert sorted((f["arch"], [row["key"] for row in f["rows"]]) for f in files) == [
        ("cnn", ["b1"]), ("small_vgg", ["a1"]), ("small_vgg", ["a2"])]
