"""A scan: its score by hand, its bounds, its words; and the AUC of the experiment."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from awm_jax import detection, models
from awm_jax.command import verdict
from awm_jax.defences import AWMConfig
from awm_jax.defences.neural_cleanse import anomaly_index
from awm_jax.defences.survey import Survey
from awm_jax.detection import Findings
from experiments import detection as experiment


def _findings(damage, stay=0.5, kept=1.0, bent=0.0, strain=0.0, elsewhere=0.0):
    shape = (2, 2, 1)
    damage = jnp.asarray(damage)
    survey = Survey(jnp.zeros((len(damage), *shape)), damage, jnp.zeros(shape), jnp.array(stay),
                    jnp.array(kept), jnp.zeros((6, 6, 2)),
                    jnp.zeros(len(damage)).at[-1].set(bent), jnp.array(strain), jnp.zeros(shape),
                    jnp.array(elsewhere))
    return Findings(survey, detection.signed_anomaly(damage), jnp.zeros(shape), jnp.array(0.9),
                    jnp.array(1.0), jnp.array(0.8))


@pytest.mark.parametrize("damage, stay, kept, score, level", [
    ([1.0, 1.35, 0.5], 0.5, 1.0, 1.0, "suspicious"),  # log 1.35 / log 1.35
    ([1.0, 1.0, 0.5], 0.5, 1.0, 0.3, "clean-looking"),  # .15 / .5, no lead at all
    ([1.0, 1.0, 0.5], 0.5, 0.2, 0.0, "clean-looking"),  # the classes fell together
    ([1.0, 1.35**0.75, 0.5], 0.5, 0.2, 0.75, "unclear"),
    ([1.0, 1.0, 0.5], 0.05, 0.9, 3.0, "suspicious"),
    ([0.0, 0.0, 0.0], 0.5, 0.2, 0.0, "clean-looking"),  # no trigger does anything
    # A class that stands out is suspected for that alone, as by `Survey.suspect`.
    ([1.35**3, 1.0, 0.5], 0.01, 0.9, 3.0, "suspicious"),
])
def test_the_score_by_hand(damage, stay, kept, score, level):
    found = _findings(damage, stay, kept)
    assert found.score == pytest.approx(score, abs=1e-5)
    told = verdict.of(found, 10)
    if score != 1.0:  # rounding decides at the threshold itself
        assert told.level == level
    assert told.headline and told.reasons and "10 images" in told.limits[0]
    assert found.all_to_all == (stay < 0.15 and kept > 0.5 and found.lead < 2)


@pytest.mark.parametrize("bent, strain, score, level", [
    (0.9, 10.0, 1.8, "suspicious"),  # .9 / .5
    (0.9, 2.8, 0.8, "unclear"),  # 2.8 / 3.5: moved, but not far
    (0.45, 10.0, 0.9, "unclear"),  # .45 / .5: far, but few
    (0.1, 0.1, 0.3, "clean-looking"),  # .15 / .5, of the dispersal
])
def test_a_warp_that_most_answers_follow_is_suspicious(bent, strain, score, level):
    found = _findings([1.0, 1.0, 1.0, 0.5], bent=bent, strain=strain)
    told = verdict.of(found, 10)
    assert found.score == pytest.approx(score, abs=1e-5) and told.level == level
    assert ("warp" in told.headline) == (level == "suspicious") == bool(found.survey.bends)
    assert not found.all_to_all
    if level == "suspicious":
        assert "90%" in told.headline and "class 3" in told.headline


def test_a_warp_that_scatters_answers_is_suspicious_sooner():
    found = _findings([1.0, 1.0, 1.0, 1.0, 1.0, 0.5], strain=2.0)
    found = found._replace(survey=found.survey._replace(bent=jnp.full(6, 0.1)))
    told = verdict.of(found, 10)
    assert found.score == pytest.approx(1.2)  # .6 / .5, below 2 / 1.25
    assert told.level == "suspicious" and found.all_to_all and bool(found.survey.bends)
    assert "60% of the images into one class or another" in told.headline


@pytest.mark.parametrize("damage, elsewhere, told", [
    ([1.0, 5.0, 0.5], 1.4, True), ([1.0, 5.0, 0.5], 1.3, False), ([1.0, 1.1, 0.5], 2.1, False)])
def test_a_second_trigger_of_a_suspicious_network_is_told(damage, elsewhere, told):
    reasons = verdict.of(_findings(damage, kept=0.2, elsewhere=elsewhere), 10).reasons
    assert told == any(f"class 1 is still driven {elsewhere:.1f} times" in r for r in reasons)


def test_of_two_classes_a_warp_is_unclear_too():
    told = verdict.of(_findings([1.0, 1.0], bent=0.9, strain=9.0), 10)
    assert told.level == "unclear" and "the other class, but two classes" in told.headline


def test_anomaly_is_neural_cleanses_with_a_sign():
    damage = np.random.default_rng(0).uniform(1, 9, 12)
    found = detection.signed_anomaly(jnp.asarray(damage))
    np.testing.assert_allclose(np.abs(found), anomaly_index(jnp.log(damage)), rtol=1e-5)
    np.testing.assert_array_equal(np.sign(found), np.sign(np.log(damage)
                                                          - np.median(np.log(damage))))


@pytest.fixture(scope="module")
def scanned(tiny, small_batch):
    return detection.scan(tiny, small_batch, config=AWMConfig(tau=200.0), key=jax.random.key(1))


def test_shares_are_what_the_triggers_do(tiny, small_batch, scanned):
    images = jnp.asarray(small_batch.images)

    def answers(delta):
        return np.asarray(models.apply(tiny, jnp.clip(images + delta[None], 0, 1)).argmax(axis=1))

    own, under = answers(np.zeros((8, 8, 3))), answers(scanned.universal)
    moved = under != own
    assert float(scanned.flips) == pytest.approx(moved.mean())
    assert moved.any()
    most = np.bincount(under[moved]).max()
    assert float(scanned.concentration) == pytest.approx(most / moved.sum())
    worst = int(scanned.survey.damage.argmax())
    driven = answers(scanned.survey.triggers[worst])
    others = own != worst
    assert float(scanned.arrivals) == pytest.approx((driven[others] == worst).mean())


def test_bounds_and_keys(tiny, small_batch, scanned):
    bound = 2 * 200.0 * 64 / 1024
    assert 0 < np.abs(scanned.universal).sum() <= bound * (1 + 1e-5)
    again = detection.scan(tiny, small_batch, config=AWMConfig(tau=200.0), key=jax.random.key(1))
    for a, b in zip(jax.tree.leaves(scanned), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(a, b)


def test_what_cannot_be_scanned_is_refused(tiny, small_batch):
    with pytest.raises(ValueError, match="paper has none"):
        detection.scan(tiny, small_batch, config=AWMConfig(variant="paper"))
    with pytest.raises(ValueError, match="normalisation"):
        detection.scan(tiny, small_batch._replace(images=small_batch.images * 3))
    huge = dataclasses.replace(tiny, weights=jax.tree.map(lambda w: 1e30 * w, tiny.weights))
    with pytest.raises(ValueError, match=r"finite findings.*BatchNorm"):
        detection.scan(huge, small_batch, config=AWMConfig(tau=200.0))


def test_auc_and_table():
    rng = np.random.default_rng(0)
    clean, found = rng.normal(size=9).tolist(), (rng.normal(size=7) + 1).tolist()
    from sklearn.metrics import roc_auc_score

    expected = roc_auc_score([0] * 9 + [1] * 7, clean + found)
    assert experiment.auc(clean, found) == pytest.approx(expected)
    assert experiment.auc([], found) is None
    shared = {"lead": 1.0, "anomaly": 1.0, "concentration": 1.0, "arrivals": 1.0}
    rows = [{"attack": "none", "asr": None, "score": 0.2, **shared},
            {"attack": "badnets", "asr": 99.0, "score": 1.2, **shared},
            {"attack": "badnets", "asr": 10.0, "score": 0.1, **shared}]
    text = experiment.table(rows)
    assert "| badnets | 2 | 54.5 | 1 | 1.20 to 1.20 | 1 of 1 | 1.00 |" in text
    assert "| none | 1 | - | - | 0.20 to 0.20 | 0 of 1 | - |" in text


def test_the_experiment_trains_scans_and_writes(tiny_dataset, capsys):
    out = tiny_dataset / "run"
    argv = ["--epochs", "1", "--arch", "tiny_cnn", "--networks", "1", "--out", str(out)]
    assert experiment.main([*argv, "--checkpoint", str(tiny_dataset)]) == 2
    assert "no --checkpoint" in capsys.readouterr().err and not out.exists()
    assert experiment.main(argv) == 0
    rows = json.loads((out / "networks.json").read_text())["rows"]
    assert [(row["attack"], row["seed"]) for row in rows] == [("none", 0), ("badnets", 0)]
    assert rows[0]["asr"] is None and 0 <= rows[1]["asr"] <= 100
    assert rows[0]["score"] != rows[1]["score"]  # another network
    assert (out / "networks.md").read_text().rstrip() == experiment.table(rows)
