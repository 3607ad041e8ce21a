"""What AWM does with its survey: where searches start, what they go for, how far."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from awm_jax import losses, models, warps
from awm_jax.defences import awm_losses, awm_steps
from awm_jax.defences import awm_purify as awm
from awm_jax.defences.survey import Survey, dispersal, log_odds


def _settings(**overrides):
    """Those of the default for six images of 8x8 pixels."""
    return awm.AWMConfig(epochs=2, inner_steps=2, outer_steps=2, batch_size=4, tau=100.0,
                         **overrides).resolve(6, (8, 8, 3))


def _survey(damage, stay=0.5, bent=(0.0, 0.0, 0.0, 0.0), elsewhere=0.0):
    """Its triggers are noise, its warp goes down and right everywhere."""
    rng = np.random.default_rng(0)
    triggers = jnp.asarray(rng.normal(size=(len(damage) + 1, 8, 8, 3)), jnp.float32)
    return Survey(triggers[:-1], jnp.asarray(damage), triggers[-1], jnp.array(stay), jnp.array(1.0),
                  jnp.full((6, 6, 2), 0.25), jnp.asarray(bent), jnp.array(9.0), triggers[0],
                  jnp.array(elsewhere))


def test_every_second_trigger_pursues_the_suspect(tiny, small_batch):
    """It raises that class's log-odds, and its L1 norm may be four times the others'."""
    images, labels = jnp.asarray(small_batch.images), jnp.asarray(small_batch.labels)
    settings = dataclasses.replace(_settings(inner_lr=0.5), taus=(0.5,))
    state = awm_steps.init(tiny, settings)
    outer = (state.masks, state.opt_state)

    def trigger(suspect, epoch):
        problem = awm_steps._problem(tiny, images, labels, None,
                                     state._replace(suspect=jnp.array(suspect)), settings)
        inner = problem.start(None, epoch, outer)
        for key in jax.random.split(jax.random.key(1), 4):
            inner = problem.ascend(key, epoch, inner, outer)
        return inner[0]

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
        problem = awm_steps._problem(tiny, images, labels, None, state, settings)
        delta, warp = problem.start(jax.random.key(0), jnp.array(epoch), None)
        assert warp is None if found is None else not warp.any()
        return np.asarray(delta)

    np.testing.assert_array_equal(start(found, 1), found.triggers[2])
    for arguments in ((found, 0), (found, 2), (found, 3), (None, 1)):
        np.testing.assert_array_equal(start(*arguments), 0.0)


def test_every_trigger_goes_for_a_class_with_several(tiny, small_batch):
    """From the first epoch on, within four times the bound; both that were found are replayed."""
    images, labels = jnp.asarray(small_batch.images), jnp.asarray(small_batch.labels)
    settings = dataclasses.replace(_settings(inner_lr=0.5), taus=(0.5,))
    found = _survey([1.0, 2.0, 9.0, 3.0], elsewhere=6.1)
    state = awm_steps.init(tiny, settings, found)
    assert bool(state.several) and int(state.suspect) == 2
    both = [found.triggers[2], found.elsewhere]
    np.testing.assert_array_equal(state.triggers[settings.epochs:], both * 2)
    outer = (state.masks, state.opt_state)

    def odds(epoch, several):
        problem = awm_steps._problem(tiny, images, labels, None,
                                     state._replace(several=jnp.array(several)), settings)
        inner = jnp.zeros((8, 8, 3)), jnp.zeros((6, 6, 2))
        for key in jax.random.split(jax.random.key(1), 4):
            inner = problem.ascend(key, epoch, inner, outer)
        size = float(jnp.abs(inner[0]).sum())
        assert (size > 0.5 * 1.01) == several and size <= 4 * 0.5 * (1 + 1e-5)
        return float(log_odds(models.apply(tiny, jnp.clip(images + inner[0][None], 0, 1)), 2))

    for epoch in (0, 2):
        assert odds(epoch, True) > odds(epoch, False)


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
                                 state._replace(triggers=triggers), settings)
    outer = (state.masks, state.opt_state)
    for epoch, start in ((0, found.dispersal), (1, triggers[0])):
        np.testing.assert_array_equal(problem.start(None, epoch, outer)[0], start)
    own = models.apply(tiny, images).argmax(axis=1)

    def value(delta):
        triggered = jnp.clip(images + delta[None], 0, 1)
        return float(dispersal(models.apply(tiny, triggered), own))

    inner = jnp.zeros((8, 8, 3)), jnp.zeros((6, 6, 2))
    for key in jax.random.split(jax.random.key(1), 8):
        inner = problem.ascend(key, 3, inner, outer)
    delta = inner[0]
    assert not inner[1].any()
    assert value(delta) > value(jnp.zeros_like(delta))
    assert 0 < float(jnp.abs(delta).sum()) <= 0.5 * (1 + 1e-5)


@pytest.mark.parametrize("images, alpha, expected", [
    (6, None, (0.9, 0.5, 0.8)), (500, None, (0.9, 0.5, 0.8)), (6, 0.7, (0.7, 0.7, 0.7))])
def test_triggered_images_weigh_more_where_there_is_more_to_erase(tiny, small_batch, monkeypatch,
                                                                  images, alpha, expected):
    """Against one trigger, all to all, several; unless alpha was given: then it is what counts."""
    settings = awm.AWMConfig(batch_size=4, alpha=alpha).resolve(images, (8, 8, 3))
    images, labels = jnp.asarray(small_batch.images), jnp.asarray(small_batch.labels)
    used = []

    def mask_loss(params, m, delta, x, target, settings, alpha):
        used.append(float(alpha))
        return original(params, m, delta, x, target, settings, alpha)

    original = awm_losses.mask_loss
    monkeypatch.setattr(awm_losses, "mask_loss", mask_loss)
    for found in (_survey([1.0, 2.0, 9.0, 3.0]), _survey([1.0, 2.0, 4.0, 3.0], stay=0.01),
                  _survey([1.0, 2.0, 9.0, 3.0], elsewhere=6.1)):
        state = awm_steps.init(tiny, settings, found)
        problem = awm_steps._problem(tiny, images, labels, None, state, settings)
        problem.descend(jax.random.key(0), 0, (jnp.zeros((8, 8, 3)), jnp.zeros((6, 6, 2))),
                        (state.masks, state.opt_state))
    np.testing.assert_allclose(used, expected, rtol=1e-6)


def test_the_rate_falls_halfway_but_not_against_all_to_all_or_warps(tiny, small_batch):
    """Adam's first step is as long as its rate, wherever it is taken."""
    images, labels = jnp.asarray(small_batch.images), jnp.asarray(small_batch.labels)
    settings = dataclasses.replace(_settings(), replay=0.0, monotone=False, spare=False)
    assert settings.decay_epoch == 1 and settings.steady
    start = jax.tree.map(lambda m: m - 0.5, awm_steps.init(tiny, settings).masks)

    def length(suspect, epoch, settings=settings, bends=False):
        state = awm_steps.init(tiny, settings)
        problem = awm_steps._problem(
            tiny, images, labels, None,
            state._replace(suspect=jnp.array(suspect), bends=jnp.array(bends)), settings)
        (masks, _), _ = problem.descend(jax.random.key(0), jnp.array(epoch),
                                        (jnp.zeros((8, 8, 3)), None), (start, state.opt_state))
        return max(float(jnp.abs(leaf - 0.5).max()) for leaf in jax.tree.leaves(masks))

    lengths = [length(suspect, epoch) for suspect in (1, -1, 4) for epoch in (0, 1)]
    np.testing.assert_allclose(lengths, [0.01, 0.001, 0.01, 0.001, 0.01, 0.01], rtol=1e-3)
    np.testing.assert_allclose(length(1, 1, bends=True), 0.01, rtol=1e-3)
    other = dataclasses.replace(settings, steady=False)
    np.testing.assert_allclose(length(4, 1, other), 0.001, rtol=1e-3)


def test_every_search_is_for_a_warp_where_the_suspect_answers_to_one(tiny, small_batch):
    """It starts from the survey's once, raises the loss of the network's answers, and is kept."""
    images, labels = jnp.asarray(small_batch.images), jnp.asarray(small_batch.labels)
    settings = _settings()
    found = _survey([1.0, 2.0, 9.0, 3.0], bent=(0.1, 0.6, 0.0, 0.1))
    state = awm_steps.init(tiny, settings, found)
    assert int(state.suspect) == 1 and bool(state.bends)
    # Before its triggers comes one that adds nothing and bends.
    np.testing.assert_array_equal(state.triggers[settings.epochs:],
                                  [0 * found.dispersal, *found.triggers[jnp.array([2, 3, 1])]])
    assert not state.warps.at[settings.epochs].set(0).any()
    np.testing.assert_array_equal(state.warps[settings.epochs], found.warp)

    problem = awm_steps._problem(tiny, images, labels, None, state, settings)
    outer = (state.masks, state.opt_state)
    own = models.apply(tiny, images).argmax(axis=1)

    def loss(warp):
        return float(losses.cross_entropy(models.apply(tiny, warps.bend(images, warp)), own))

    for epoch in range(4):
        inner = problem.start(None, epoch, outer)
        np.testing.assert_array_equal(inner[1], found.warp if epoch == 1 else 0 * found.warp)
        for key in jax.random.split(jax.random.key(1), 8):
            inner = problem.ascend(key, epoch, inner, outer)
        delta, warp = problem.settle(epoch, inner)
        assert not delta.any() and 0 < float(jnp.abs(warp).max()) <= warps.BOUND
        assert loss(warp) > loss(0 * warp)

    after, _ = awm_steps.step(jax.random.key(0), state, tiny, images, labels, settings)
    assert after.warps[0].any() and not after.triggers[0].any()
    np.testing.assert_array_equal(after.warps[1:], state.warps[1:])


def test_masks_see_bent_images(tiny, small_batch, monkeypatch):
    """What a mask step adds to each image is its trigger and what its warp makes of it."""
    images, labels = jnp.asarray(small_batch.images), jnp.asarray(small_batch.labels)
    settings, seen = dataclasses.replace(_settings(), replay=1.0), []

    def mask_loss(params, m, delta, x, *rest):
        seen.append((x, delta))
        return original(params, m, delta, x, *rest)

    original = awm_losses.mask_loss
    monkeypatch.setattr(awm_losses, "mask_loss", mask_loss)
    warp, delta = jnp.full((6, 6, 2), 0.5), jnp.full((8, 8, 3), 0.125)
    state = awm_steps.init(tiny, settings, _survey([1.0, 2.0, 9.0, 3.0], bent=(0.9, 0, 0, 0)))
    state = state._replace(triggers=state.triggers.at[:].set(delta),
                           warps=state.warps.at[:].set(warp))
    problem = awm_steps._problem(tiny, images, labels, None, state, settings)
    problem.descend(jax.random.key(0), 0, (0 * delta, 0 * warp), (state.masks, state.opt_state))
    (x, added), = seen
    np.testing.assert_allclose(x + added, warps.bend(x, warp) + delta[None], atol=1e-6)


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
