"""What AWM does with its survey: where searches start, what they go for, how far."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from awm_jax import models
from awm_jax.defences import awm_purify as awm
from awm_jax.defences import awm_steps
from awm_jax.defences.survey import Survey, dispersal, log_odds


def _settings(**overrides):
    """Those of the default for six images of 8x8 pixels."""
    return awm.AWMConfig(epochs=2, inner_steps=2, outer_steps=2, batch_size=4, tau=100.0,
                         **overrides).resolve(6, (8, 8, 3))


def _survey(damage, stay=0.5):
    """Its triggers are noise."""
    rng = np.random.default_rng(0)
    triggers = jnp.asarray(rng.normal(size=(len(damage) + 1, 8, 8, 3)), jnp.float32)
    return Survey(triggers[:-1], jnp.asarray(damage), triggers[-1], jnp.array(stay), jnp.array(1.0))


def test_every_second_trigger_pursues_the_suspect(tiny, small_batch):
    """It raises that class's log-odds, and its L1 norm may be four times the others'."""
    images, labels = jnp.asarray(small_batch.images), jnp.asarray(small_batch.labels)
    settings = dataclasses.replace(_settings(inner_lr=0.5), taus=(0.5,))
    state = awm_steps.init(tiny, settings)
    outer = (state.masks, state.opt_state)

    def trigger(suspect, epoch):
        problem = awm_steps._problem(tiny, images, labels, None, state.triggers,
                                     jnp.array(suspect), settings)
        delta = problem.start(None, epoch, outer)
        for key in jax.random.split(jax.random.key(1), 4):
            delta = problem.ascend(key, epoch, delta, outer)
        return delta

    def odds(delta, target):
        logits = models.apply(tiny, jnp.clip(images + delta[None], 0, 1))
        return float(log_odds(logits, jnp.array(target)))

    pursued = {k: trigger(k, 3) for k in (0, 2)}
    for target, delta in pursued.items():
        assert odds(delta, target) > odds(jnp.zeros_like(delta), target)
        assert 0.5 * 1.01 < float(jnp.abs(delta).sum()) <= 4 * 0.5 * (1 + 1e-5)
    assert np.abs(pursued[0] - pursued[2]).max() > 0
    # Its turn has not come, the survey's own trigger is gone on from, there was no survey.
    for suspect, epoch in ((2, 0), (2, 1), (-1, 3)):
        assert 0 < float(jnp.abs(trigger(suspect, epoch)).sum()) <= 0.5 * (1 + 1e-5)


def test_second_epoch_starts_from_the_worst_surveyed_trigger(tiny, small_batch):
    images, labels = jnp.asarray(small_batch.images), jnp.asarray(small_batch.labels)
    settings = _settings()
    found = _survey([1.0, 2.0, 9.0, 3.0])

    def start(found, epoch):
        state = awm_steps.init(tiny, settings, found)
        problem = awm_steps._problem(tiny, images, labels, None, state.triggers,
                                     state.suspect, settings)
        return np.asarray(problem.start(jax.random.key(0), jnp.array(epoch), None))

    np.testing.assert_array_equal(start(found, 1), found.triggers[2])
    for arguments in ((found, 0), (found, 2), (found, 3), (None, 1)):
        np.testing.assert_array_equal(start(*arguments), 0.0)


def test_every_trigger_goes_for_a_suspected_all_to_all_backdoor(tiny, small_batch):
    """It disperses the answers within the epochs' own bound, from where the last one ended."""
    images = jnp.asarray(small_batch.images)
    settings = dataclasses.replace(_settings(inner_lr=0.5), taus=(0.5,))
    found = _survey([1.0, 2.0, 4.0, 3.0], stay=0.01)
    state = awm_steps.init(tiny, settings, found)
    assert int(state.suspect) == 4
    surveyed = state.triggers[settings.epochs:]
    expected = [found.dispersal, *found.triggers[jnp.array([2, 3, 1])]]
    np.testing.assert_array_equal(surveyed, expected)
    triggers = state.triggers.at[0].set(0.25).at[1].set(0.5)
    problem = awm_steps._problem(tiny, images, jnp.asarray(small_batch.labels), None,
                                 triggers, state.suspect, settings)
    outer = (state.masks, state.opt_state)
    for epoch, start in ((0, found.dispersal), (1, triggers[0])):
        np.testing.assert_array_equal(problem.start(None, epoch, outer), start)
    own = models.apply(tiny, images).argmax(axis=1)

    def value(delta):
        triggered = jnp.clip(images + delta[None], 0, 1)
        return float(dispersal(models.apply(tiny, triggered), own))

    delta = jnp.zeros((8, 8, 3))
    for key in jax.random.split(jax.random.key(1), 8):
        delta = problem.ascend(key, 3, delta, outer)
    assert value(delta) > value(jnp.zeros_like(delta))
    assert 0 < float(jnp.abs(delta).sum()) <= 0.5 * (1 + 1e-5)


@pytest.mark.parametrize("alpha, expected", [(None, (0.9, 0.5)), (0.7, (0.7, 0.7))])
def test_images_that_carry_a_dispersal_weigh_more(tiny, small_batch, monkeypatch, alpha,
                                                  expected):
    """Unless alpha was given: then it is what counts."""
    images, labels = jnp.asarray(small_batch.images), jnp.asarray(small_batch.labels)
    settings, used = _settings(alpha=alpha), []

    def mask_loss(params, m, delta, x, target, settings, alpha):
        used.append(float(alpha))
        return original(params, m, delta, x, target, settings, alpha)

    original = awm_steps.mask_loss
    monkeypatch.setattr(awm_steps, "mask_loss", mask_loss)
    for suspect in (1, 4):
        state = awm_steps.init(tiny, settings, _survey([1.0, 2.0, 9.0, 3.0]))
        problem = awm_steps._problem(tiny, images, labels, None, state.triggers,
                                     jnp.array(suspect), settings)
        problem.descend(jax.random.key(0), 0, jnp.zeros((8, 8, 3)),
                        (state.masks, state.opt_state))
    np.testing.assert_allclose(used, expected, rtol=1e-6)


def test_the_rate_falls_halfway_but_not_against_all_to_all(tiny, small_batch):
    """Adam's first step is as long as its rate, wherever it is taken."""
    images, labels = jnp.asarray(small_batch.images), jnp.asarray(small_batch.labels)
    settings = dataclasses.replace(_settings(), replay=0.0, monotone=False, spare=False)
    assert settings.decay_epoch == 1 and settings.steady
    start = jax.tree.map(lambda m: m - 0.5, awm_steps.init(tiny, settings).masks)

    def length(suspect, epoch, settings=settings):
        state = awm_steps.init(tiny, settings)
        problem = awm_steps._problem(tiny, images, labels, None, state.triggers,
                                     jnp.array(suspect), settings)
        (masks, _), _ = problem.descend(jax.random.key(0), jnp.array(epoch), jnp.zeros((8, 8, 3)),
                                        (start, state.opt_state))
        return max(float(jnp.abs(leaf - 0.5).max()) for leaf in jax.tree.leaves(masks))

    lengths = [length(suspect, epoch) for suspect in (1, -1, 4) for epoch in (0, 1)]
    np.testing.assert_allclose(lengths, [0.01, 0.001, 0.01, 0.001, 0.01, 0.01], rtol=1e-3)
    other = dataclasses.replace(settings, steady=False)
    np.testing.assert_allclose(length(4, 1, other), 0.001, rtol=1e-3)


@pytest.mark.parametrize("variant", ["distilled", "paper", "official"])
def test_the_rate_is_that_of_a_schedule(variant):
    settings = awm.AWMConfig(variant=variant, outer_lr=0.03).resolve(43, (8, 8, 3))
    rate = optax.piecewise_constant_schedule(
        settings.outer_lr, {settings.decay_epoch * settings.outer_steps: 0.1})
    for epoch in range(settings.epochs):
        expected = float(rate(epoch * settings.outer_steps))
        assert float(awm_steps._rate(jnp.array(epoch), jnp.array(False), settings)) == expected
    assert (settings.decay_epoch, expected) == {
        "distilled": (8, pytest.approx(0.003)), "paper": (50, pytest.approx(0.003)),
        "official": (20, pytest.approx(0.03))}[variant]
