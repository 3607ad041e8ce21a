"""The command: its options, its errors, its files, its second start."""

import dataclasses
import json
import time

import jax
import numpy as np
import pytest

from awm_jax import attacks, checkpoint, data, formats, metrics, models
from awm_jax.defences import DEFENCES
from awm_jax.progress import waiting
from awm_jax.types import Arch
from experiments import defending, oneshot, results, scene
from experiments.cli import load, parser


@pytest.mark.parametrize("argv, word", [
    (["--dataset", "imagenet"], "digits"), (["--attack", "badnet"], "trojan_sq"),
    (["--samples", "0"], "one-shot"), (["--seeds", "-1"], "whole number"),
    (["--defence", "pepper"], "awm_paper"), (["--poison_rate", "2"], "up to 1"),
    (["--arch", "vgg"], "resnet18"), (["--epochs", "two"], "whole number"),
    (["--set", "threshold"], "NAME=VALUE")])
def test_wrong_values_get_one_line_with_the_choices(argv, word, capsys):
    with pytest.raises(SystemExit) as caught:
        parser().parse_args(argv)
    err = capsys.readouterr().err
    assert caught.value.code == 2 and err.count("\n") == 1 and word in err


def test_lists_and_all():
    args = parser().parse_args(["--attack", "all", "--defence", "ft,awm"])
    assert set(args.attack) == set(attacks.ATTACKS) and args.defence == ("ft", "awm")
    assert len(parser().parse_args(["--attack", "awm"]).attack) == 6
    assert parser().parse_args(["--attack", "sig,badnets,sig"]).attack == ("sig", "badnets")
    groups = [parser().parse_args(["--defence", name]).defence for name in ("all", "ablations")]
    assert "awm" in groups[0] and "awm_no_clip" in groups[1]
    assert sorted(groups[0] + groups[1]) == sorted(DEFENCES)


@pytest.mark.parametrize("argv, word", [
    (["--checkpoint", "/nowhere.pth"], "/nowhere.pth"), (["--trigger", "/nowhere.png"], "PNG"),
    (["--data_dir", "/nowhere", "--dataset", "gtsrb"], "/nowhere"), (["--target", "10"], "0..9"),
    (["--attack", "trojan_sq,trojan_a2a", "--target", "1"], "all-to-all"),
    (["--set", "threshhold=1"], "threshhold"), (["--set", "alpha=2"], "alpha=2"),
    (["--set", "epochs=two", "--defence", "ft"], "two"),
    (["--set", "lr=high", "--defence", "ft"], "lr to be a number, got 'high'"),
    (["--samples", "100000"], "samples=100000 in 1.."), (["--poison_rate", "1"], "Lower the rate"),
    (["--attack", "trojan_sq", "--poison_rate", ".0001"], "an image at least"),
    (["--attack", "multi", "--poison_rate", ".002"], "each of multi's triggers"),
    (["--attack", "wanet", "--poison_rate", ".6"], "wanet's cover"),
    (["--trigger_mode", "blend"], "--trigger beside --trigger_mode"),
    (["--normalise", "cifar10"], "--checkpoint beside --normalise"),
    (["--checkpoint", ".", "--epochs", "2"], "no --epochs"),
    (["--set", "lr=.1", "--grid", "lr=.2,.3", "--defence", "ft"], "lr in --set or in --grid"),
    (["--sweep", "off", "--chunk", "2"], "no --chunk=2"),
    (["--arch", "mlp", "--defence", "clp"], "BatchNorm"),
    (["--arch", "mlp", "--defence", "nad,nft"], "more than one pixel")])
def test_bad_input_ends_in_one_line_before_any_training(argv, word, capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("AWM_CACHE_DIR", str(tmp_path / "cache"))
    assert oneshot.main([*argv, "--out", str(tmp_path)]) == 2
    err = capsys.readouterr().err
    assert word in err and "Traceback" not in err
    assert not (tmp_path / "cache" / "networks").exists()


def test_of_several_defences_those_that_cannot_work_here_are_left_out(capsys):
    args = parser().parse_args(["--arch", "mlp", "--defence", "ft,clp"])
    assert oneshot._defences(args, data.load("digits")) == ("ft",)
    told = capsys.readouterr().out
    assert "Left out clp: Expected a network with BatchNorm behind convolutions, mlp" in told


ARGV = ["--epochs", "2", "--purify_epochs", "1", "--attack", "badnets", "--arch", "tiny_cnn"]


def test_writes_everything_and_resumes(tiny_dataset, capsys, monkeypatch):
    out = tiny_dataset / "run"
    assert oneshot.main([*ARGV, "--seeds", "1", "--out", str(out)]) == 0
    saved = json.loads((out / "results.json").read_text())
    (cell,) = saved["cells"].values()
    figures = {"acc", "asr", "asr_all", "recovered", "asr_parts"}
    assert figures == set(cell["before"]) == set(cell["after"])
    assert len(cell["clean_indices"]) == 10 and saved["versions"]["jax"]
    assert len(cell["damage"]) == 10 and cell["suspect"] in range(11)
    assert 0 <= cell["stay"] <= 1 and cell["kept"] > 0
    assert cell["settings"]["epochs"] == 1 and len(cell["history"]["clean_loss"]) == 1
    # What the papers' figures are rendered from.
    assert {len(points) for points in cell["curve"].values()} == {1}
    assert set(cell["curve"]) == {"epoch", "clean_accuracy", "asr", "asr_all"}
    assert cell["masks"] and all(len(row) == 10 and abs(sum(row) - 100) < 0.1
                                 for row in cell["masks"].values())
    for name in ("table.md", "badnets-pairs.png", "badnets-awm-history.png",
                 "badnets-awm-masks.png", "badnets-awm-trigger.png"):
        assert (out / name).stat().st_size > 0
    assert checkpoint.exists(out / "purified" / "badnets-awm-0")

    purified = []
    real = defending.defend
    monkeypatch.setattr(defending, "defend", lambda *a: purified.append(a[2]) or real(*a))
    scored, evaluate = [], metrics.evaluate
    monkeypatch.setattr(metrics, "evaluate", lambda *a, **k: scored.append(1) or evaluate(*a, **k))
    assert oneshot.main([*ARGV, "--seeds", "2", "--out", str(out)]) == 0
    assert purified == [1]  # seed 0 was there already
    first, second = json.loads((out / "results.json").read_text())["cells"].values()
    assert second["before"] == first["before"] == cell["before"]
    assert len(scored) == 1  # the purified network; the suspect one's scores are known
    assert "| badnets | awm |" in capsys.readouterr().out


@pytest.mark.parametrize("name, given, expected", [
    ("cifar10", [], 10), ("gtsrb", [], 0), ("digits", [], 0), ("cifar10", ["--set",
     "recalibration=0"], 0), ("gtsrb", ["--set", "recalibration=4"], 4)])
def test_where_statistics_follow_the_masks(name, given, expected):
    dataset = dataclasses.replace(data.load("digits"), name=name)
    assert defending.config("awm", parser().parse_args(given), dataset).recalibration == expected
    paper = defending.config("awm_paper", parser().parse_args([]), dataset)
    assert paper.resolve(10, (32, 32, 3)).recalibration == 0


@pytest.mark.parametrize("argv, rho", [
    (["--dataset", "gtsrb"], 8), (["--dataset", "cifar10"], 2),
    (["--dataset", "cifar10", "--arch", "vgg19_bn"], 6), (["--set", "rho=.25"], 0.25),
    (["--dataset", "gtsrb", "--set", "adaptive=False"], 0.5)])
def test_ft_sam_has_its_papers_radius(argv, rho, tiny_dataset):
    args = parser().parse_args(argv)
    dataset = dataclasses.replace(data.load("digits"), name=args.dataset)
    found = defending.config("ft_sam", args, dataset)
    assert found.radius == rho


def test_interrupt_says_how_to_go_on(tiny_dataset, capsys, monkeypatch):
    def stop(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(defending, "defend", stop)
    assert oneshot.main([*ARGV, "--out", str(tiny_dataset / "run")]) == 130
    assert "goes on" in capsys.readouterr().err


def test_interrupted_training_resumes(tiny_dataset, monkeypatch):
    from experiments import networks

    real, calls = networks.Progress.update, []

    def update(self, done, **figures):
        calls.append(done)
        if calls == [1, 2]:
            raise KeyboardInterrupt
        real(self, done, **figures)

    monkeypatch.setattr(networks.Progress, "update", update)
    argv = ["--epochs", "3", "--purify_epochs", "1", "--seeds", "1", "--arch", "tiny_cnn",
            "--out", str(tiny_dataset / "r")]
    assert oneshot.main(argv) == 130
    monkeypatch.setattr(networks.Progress, "update",
                        lambda self, done, **figures: calls.append(done))
    assert oneshot.main(argv) == 0
    assert calls[:4] == [1, 2, 2, 3]  # epoch 1 was kept, epoch 2 had to be done again


def test_damaged_results_are_set_aside(tmp_path):
    path = tmp_path / "results.json"
    path.write_text("{")
    assert results.read_cells(path, "digits", "small_vgg") == {}
    assert (tmp_path / "results.damaged.json").read_text() == "{"


def test_runs_of_another_kind_are_refused(tmp_path):
    path = tmp_path / "results.json"
    results.write_json(path, {"cells": {"a": {}}, "dataset": "digits", "arch": "small_vgg"})
    assert results.read_cells(path, "digits", "small_vgg") == {"a": {}}
    with pytest.raises(ValueError, match=r"resnet18.*digits, small_vgg.*--fresh"):
        results.read_cells(path, "digits", "resnet18")


def _cell(acc, asr, attack="a", defence="d"):
    scores = {"acc": acc, "asr": asr, "asr_all": asr, "recovered": 5.0}
    return {"attack": attack, "defence": defence, "before": scores, "after": scores,
            "status": "OK", "der": acc - asr, "seconds": 2.0}


def test_table_by_hand():
    text = results.table([_cell(90.0, 10.0), _cell(92.0, 20.0)], 10)
    means = ("91.00±1.41 | 15.00±7.07 | 91.00±1.41 | 15.00±7.07 | 15.00±7.07 | 5.00±0.00 | "
             "76.00±5.66")
    assert f"| a | d | {means} | 1/2 | OK | 2 |" in text


def test_matrix_by_hand():
    """The two of the first are of networks with other scores before, which is marked."""
    cells = [_cell(90.0, 10.0), _cell(92.0, 20.0), _cell(50.0, 40.0, "b", "e")]
    assert results.matrix(cells) == [
        ["ACC / ASR / DER", "a", "b"], ["before", "90.0 / 10.0", "50.0 / 40.0"],
        ["d", "91.0±1.4 / 15.0±7.1 / 76.0±5.7 †", "-"], ["e", "-", "50.0 / 40.0 / 10.0"]]
    assert "| before | 90.0 / 10.0 | 50.0 / 40.0 |" in results.report(cells, 10)
    assert "ACC / ASR / DER" not in results.report([_cell(1.0, 2.0)], 10)


def test_summary_by_hand():
    """Attacks weigh alike, however many seeds each has."""
    _, clp, other = results.summary([
        _cell(90.0, 10.0, "a", "clp"), _cell(80.0, 20.0, "a", "clp"),
        _cell(65.0, 35.0, "b", "clp"), _cell(1.0, 2.0, "b", "e")])
    assert clp[0] == "`clp`" and clp[1].startswith("Zheng") and other[:3] == ["`e`", "", ""]
    assert clp[2:] == ["none", "2", "75.0", "25.0", "50.0", "2", "1-2"]


def test_every_kind_of_defence_by_the_command(tiny_dataset, capsys):
    """One that fine-tunes; the settings of --set are in the results."""
    out = tiny_dataset / "kinds"
    argv = [*ARGV, "--seeds", "1", "--out", str(out), "--defence", "ft", "--set", "lr=0.05"]
    assert oneshot.main(argv) == 0
    (cell,) = json.loads((out / "results.json").read_text())["cells"].values()
    assert cell["settings"]["lr"] == 0.05 and cell["settings"]["epochs"] == 1
    assert len(cell["info"]["loss"]) == 1 and 0 <= cell["der"] <= 100
    assert checkpoint.exists(out / "purified" / "badnets-ft-0")


def test_waiting_tells_and_stops(capsys):
    with waiting("a job", every=0.05):
        time.sleep(0.3)
    told = capsys.readouterr().out
    assert told.count("a job: running for 0 s\n") >= 2
    time.sleep(0.15)
    assert capsys.readouterr().out == ""


def test_a_place_that_cannot_be_written_is_told_before_any_training(tiny_dataset, capsys):
    (tiny_dataset / "file").write_text("precious")
    assert oneshot.main([*ARGV, "--out", str(tiny_dataset / "file")]) == 2
    assert "is no folder" in capsys.readouterr().err
    assert not (tiny_dataset / "cache" / "networks").exists()


def test_fresh_puts_aside_what_was_there(tiny_dataset, capsys):
    """Others' cells, too, which this command would not make again."""
    out, other = tiny_dataset / "run", {"cells": {"a": {}}, "dataset": "digits", "arch": "cnn"}
    out.mkdir()
    results.write_json(out / "results.json", other)
    argv = [*ARGV, "--defence", "clp", "--seeds", "1", "--out", str(out), "--fresh"]
    assert oneshot.main(argv) == 0
    assert json.loads((out / "results.earlier.json").read_text()) == other
    assert len(json.loads((out / "results.json").read_text())["cells"]) == 1


@pytest.mark.parametrize("kind", ["orbax", "pytorch", "safetensors"])
def test_a_file_tells_its_architecture_and_may_be_normalised(kind, tmp_path, monkeypatch, capsys):
    """What it is given as (image - .5) / .25 is what a network of plain images does on them."""
    if kind == "pytorch":
        pytest.importorskip("torch")
    dataset = data.load("digits")
    arch = Arch(name="cnn" if kind == "orbax" else "small_vgg", num_classes=10,
                image_shape=dataset.train_images.shape[1:])
    params = models.create(jax.random.key(0), arch)
    checkpoint.save(tmp_path / "net", params)
    path = tmp_path / {"orbax": "net", "pytorch": "net.pth", "safetensors": "n.safetensors"}[kind]
    if kind != "orbax":
        formats.write(path, params, formats.Source(tmp_path / "net", "orbax", ()))
    monkeypatch.setattr(data, "load", lambda name, data_dir=None, **options: dataset)
    argv = ["--checkpoint", str(path), "--normalise"]
    plain, moved = (parser().parse_args([*argv, text]) for text in ("none", ".5/.25"))
    found = []
    for args in (plain, moved):
        assert load(args) is dataset and args.arch == arch.name
        found.append(scene.make("badnets", args, dataset, tmp_path / "cache"))
    assert "clean images their class. Were its images normalised" in capsys.readouterr().out
    images = dataset.test_images[:4].astype(np.float32) / 255
    np.testing.assert_allclose(models.apply(found[1].params, images),
                               models.apply(params, (images - 0.5) / 0.25), atol=1e-4)
    np.testing.assert_array_equal(models.apply(found[0].params, images),
                                  models.apply(params, images))
    other = parser().parse_args(["--checkpoint", str(path), "--network_seed", "1"])  # its triggers
    assert len({scene.network_name("badnets", args, dataset)
                for args in (plain, moved, other)}) == 3
    with pytest.raises(ValueError, match="resnet18"):  # what is asked for is no default
        load(parser().parse_args([*argv, "none", "--arch", "resnet18"]))


def test_some_of_the_draws_alone(tiny_dataset):
    argv = [*ARGV, "--defence", "clp", "--out", str(tiny_dataset / "run"), "--seeds", "3"]
    assert oneshot.main([*argv, "--first_seed", "2"]) == 0
    cells = json.loads((tiny_dataset / "run" / "results.json").read_text())["cells"].values()
    assert [cell["seed"] for cell in cells] == [2]
    assert oneshot.main([*argv, "--first_seed", "3"]) == 2
