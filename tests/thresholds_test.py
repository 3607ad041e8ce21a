"""The command that scores every threshold of a pruning defence's masks."""

import json

import jax
import numpy as np
import pytest

from awm_jax.defences import DEFENCES
from awm_jax.defences.base import Result, Status
from experiments import cli, defending, networks, scene, thresholds

_ARGV = ["--attack", "badnets", "--epochs", "1", "--arch", "tiny_cnn", "--samples", "20", "--set",
         "steps=8"]


def _args(*more):
    return thresholds._parser().parse_args([*_ARGV, *more])


@pytest.fixture
def on_stage(tiny_dataset):
    """A backdoored network."""
    args = _args()
    return scene.make("badnets", args, cli.load(args), networks.directory())


def _zeroed(params, masks, threshold):
    """The network with the scales zeroed whose masks are no larger, by hand."""
    weights = jax.tree.map(np.array, params.weights)
    for layer, values in masks.items():
        weights[layer]["scale"][np.asarray(values) <= threshold] = 0
    return type(params)(weights, params.batch_stats, params.arch)


@pytest.mark.parametrize("name", thresholds.PRUNING)
def test_every_threshold_is_what_the_defence_would_have_left(on_stage, name):
    more = ["--set", "recover_steps=8", "--set", "unlearn_steps=8"] if name == "rnp" else []
    args = _args("--defence", name, "--thresholds", "1,.2,.9,.9995", *more)
    row, = thresholds.measure(on_stage, 3, args)
    assert [point["threshold"] for point in row["points"]] == [0.2, 0.9, 0.9995, 1.0]
    assert row["points"][-1]["pruned"] == row["neurons"] == 14 and row["before"]["acc"] > 0
    config = defending.config(name, args, on_stage.dataset)
    batch, _ = on_stage.clean(3, 20)
    for point in row["points"]:
        alone = DEFENCES[name](on_stage.params, batch, key=jax.random.key(3), config=type(config)(
            **{**vars(config), "threshold": point["threshold"]}))
        masks = alone.info["masks"]
        assert point["pruned"] == int(alone.info["pruned"]) == sum(
            int((np.asarray(values) <= point["threshold"]).sum()) for values in masks.values())
        expected = on_stage.evaluate(alone.params)._asdict()
        assert {key: expected[key] for key in ("acc", "asr", "asr_all")}.items() <= point.items()
        assert on_stage.evaluate(_zeroed(on_stage.params, masks, point["threshold"])).acc == (
            pytest.approx(point["acc"], abs=1e-6))
    assert row["used"] == pytest.approx(0.2)


def test_there_are_defences_that_prune():
    assert set(thresholds.PRUNING) == {"anp", "rnp"}


def _given(monkeypatch, masks, status=Status.OK):
    """A defence that gives these masks at once."""
    def defence(params, batch, *, key, config):
        return Result(params, {"masks": masks, "threshold": np.float32(0.2)}, status)

    own = DEFENCES["anp"]
    monkeypatch.setitem(DEFENCES, "anp", type("Given", (), {
        "__call__": staticmethod(defence), "default": own.default,
        "Config": staticmethod(own.Config)})())


def test_the_same_network_is_scored_once(on_stage, monkeypatch):
    _given(monkeypatch, {"bn1": np.array([.1, .1, 1, 1, 1, 1]), "bn2": np.ones(8)})
    before, scored = on_stage.before, []
    monkeypatch.setattr(type(on_stage), "evaluate",
                        lambda self, params: scored.append(params) or before)
    row, = thresholds.measure(on_stage, 0, _args("--thresholds", "0,.05,.1,.2,.5"))
    assert [point["pruned"] for point in row["points"]] == [0, 0, 2, 2, 2] and len(scored) == 1


def test_masks_that_are_not_finite_are_told(on_stage, monkeypatch):
    _given(monkeypatch, {"bn1": np.full(6, np.nan)}, Status.NONFINITE)
    with pytest.raises(ValueError, match=r"finite masks, those of anp on badnets, seed 0.*lower"):
        thresholds.measure(on_stage, 0, _args())


def test_the_best_is_within_five_points_or_nothing():
    before = {"acc": 90.0, "asr": 99.0, "asr_all": 99.0}
    points = [{"threshold": t, "pruned": 1, "acc": acc, "asr": asr, "asr_all": asr}
              for t, acc, asr in ((0.1, 89.0, 50.0), (0.2, 85.0, 40.0), (0.3, 84.9, 0.0))]
    assert thresholds.best({"before": before, "points": points})["threshold"] == 0.2
    assert thresholds.best({"before": before, "points": points[2:]})["threshold"] == -1
    worse = [{**points[0], "asr": 100.0}]
    assert thresholds.best({"before": before, "points": worse})["pruned"] == 0


def test_the_command_writes_rows_table_and_picture(tiny_dataset, capsys):
    out = tiny_dataset / "run"
    argv = [*_ARGV, "--seeds", "2", "--thresholds", ".2,.9", "--out", str(out)]
    assert thresholds.main(argv) == 0
    rows = json.loads((out / "thresholds.json").read_text())["rows"]
    assert [row["seed"] for row in rows] == [0, 1] and rows[0]["set"] == ["steps=8"]
    text = (out / "thresholds.md").read_text()
    assert "| badnets, anp, steps=8, 20 | 0.9 | " in text and text.count("\n") == 6
    assert (out / "thresholds.png").stat().st_size > 0
    assert text.strip() in capsys.readouterr().out


@pytest.mark.parametrize("more, said", [
    (["--set", "tau=3"], "Expected tau of --set"), (["--set", "prune=best"], "prune='best'"),
    (["--samples", "9999"], "9999")])
def test_what_cannot_be_gets_one_line_before_any_training(tiny_dataset, capsys, more, said):
    out = tiny_dataset / "run"
    assert thresholds.main([*_ARGV, *more, "--out", str(out)]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and said in err and not out.exists()


@pytest.mark.parametrize("text", ["", "a", "-.1", "1.1", "nan", ".2,,"])
def test_thresholds_outside_their_range_are_refused(capsys, text):
    with pytest.raises(SystemExit):
        _args("--thresholds", text)
    assert "from 0 to 1" in capsys.readouterr().err
