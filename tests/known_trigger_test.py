"""The command that tells AWM the true trigger."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from awm_jax import attacks
from awm_jax.attacks import Trigger
from awm_jax.defences import AWMConfig, awm_config
from awm_jax.defences import survey as surveys
from awm_jax.defences.survey import Survey
from experiments import defending, known_trigger


@pytest.mark.parametrize("name", ["badnets", "l0_inv", "l2_inv"])
def test_what_is_added_does_what_the_trigger_does(name):
    trigger = attacks.make(name, jax.random.key(1), (32, 32, 3), 10).trigger
    images = jax.random.uniform(jax.random.key(2), (5, 32, 32, 3))
    found = known_trigger.added(trigger)
    np.testing.assert_allclose(jnp.clip(images + found[None], 0, 1), trigger(images), atol=1e-7)
    assert float(jnp.abs(found).sum()) > 0


@pytest.mark.parametrize("pattern, mask", [(0.5, 1.0), (0.2, 0.2)])
def test_a_trigger_that_mixes_with_the_image_is_refused(pattern, mask):
    with pytest.raises(ValueError, match="mixes with the image"):
        known_trigger.added(Trigger(jnp.full((2, 2, 3), pattern), jnp.full((2, 2, 1), mask)))


def test_a_told_survey_suspects_the_target_by_its_trigger():
    found = Survey(triggers=np.zeros((4, 2, 2, 1)), damage=np.array([3.0, 4.0, 1.0, 2.0]),
                   dispersal=np.zeros((2, 2, 1)), stay=np.array(0.0), kept=np.array(1.0),
                   warp=np.zeros((6, 6, 2)), bent=np.full(4, 0.24),
                   strain=np.array(9.0), elsewhere=np.zeros((2, 2, 1)),
                   elsewhere_damage=np.array(0.0))
    assert int(found.suspect) == 4 and found.bends  # all to all, by a warp
    new = known_trigger.told(found, jnp.full((2, 2, 1), 0.5), 2)
    assert int(new.suspect) == 2 and not new.bends and float(new.trigger.min()) == 0.5
    assert np.asarray(new.damage)[[0, 1, 3]].tolist() == [3.0, 4.0, 2.0]
    assert np.asarray(new.triggers)[[0, 1, 3]].max() == 0


def test_both_ways_from_the_same_images(tiny_dataset, monkeypatch, capsys):
    given = []
    real = known_trigger.purify

    def purify(params, batch, *, config, key, survey):
        given.append((np.asarray(batch.images), survey))
        return real(params, batch, config=config, key=key, survey=survey)

    monkeypatch.setattr(known_trigger, "purify", purify)
    # The search need not find anything here.
    monkeypatch.setitem(awm_config.VARIANTS["distilled"], "survey_steps", 10)
    monkeypatch.setattr(surveys, "_DISPERSAL_STEPS", 2)
    monkeypatch.setattr(surveys, "_WARP_STEPS", 2)
    monkeypatch.setattr(defending, "config", lambda *_: AWMConfig(
        epochs=1, inner_steps=1, outer_steps=1))
    out = tiny_dataset / "run"
    argv = ["--attack", "badnets", "--epochs", "1", "--seeds", "1", "--samples", "20",
            "--out", str(out)]
    assert known_trigger.main(argv) == 0
    rows = json.loads((out / "known_trigger.json").read_text())["rows"]
    assert [row["way"] for row in rows] == ["as it is", "oracle"]
    assert rows[1]["share"] == 1.0 > rows[0]["share"]
    assert (given[0][0] == given[1][0]).all() and given[0][1] is None
    assert int(given[1][1].suspect) == attacks.make(
        "badnets", jax.random.key(0), (8, 8, 3), 10).target
    assert "| badnets | oracle | " in capsys.readouterr().out


def test_an_attack_without_one_pattern_gets_one_line_before_any_training(tiny_dataset, capsys):
    argv = ["--attack", "badnets_a2a", "--out", str(tiny_dataset / "run")]
    assert known_trigger.main(argv) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "one target, got badnets_a2a" in err
    assert not (tiny_dataset / "run").exists()
