"""One trigger a class: its objective by hand, its bounds, and real backdoors that it must find."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from awm_jax import data, losses, models, torch_compat, warps
from awm_jax.data import splits
from awm_jax.defences import awm_purify as awm
from awm_jax.defences import awm_steps
from awm_jax.defences import survey as survey_module
from awm_jax.defences.survey import Survey, dispersal, log_odds, objective, survey
from awm_jax.types import Arch, Params


def test_log_odds_by_hand():
    """p = (1/4, 3/4) and (1/2, 1/2): log(1/3) and log 1, and minus that for the other class."""
    logits = jnp.log(jnp.array([[0.25, 0.75], [0.5, 0.5]]))
    np.testing.assert_allclose(log_odds(logits, jnp.array(0)), -np.log(3) / 2, rtol=1e-6)
    np.testing.assert_allclose(log_odds(logits, jnp.array(1)), np.log(3) / 2, rtol=1e-6)


def test_log_odds_from_probabilities_and_its_slope():
    """Against log p - log(1 - p), also where cross-entropy's gradient has died."""
    z = np.random.default_rng(0).normal(size=(5, 7)) * 3
    p = np.exp(z) / np.exp(z).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(log_odds(jnp.asarray(z), jnp.array(2)),
                               (np.log(p) - np.log1p(-p))[:, 2].mean(), rtol=1e-4)
    sure = jnp.array([[60.0, 0.0]])
    assert float(jax.grad(lambda z: log_odds(z, jnp.array(0)))(sure)[0, 0]) == 1.0
    assert float(jax.grad(lambda z: losses.cross_entropy(z, jnp.array([0])))(sure)[0, 0]) == 0.0


def test_dispersal_by_hand():
    """Two images, both driven out of their class: apart log 3 + 5 log 2, together less."""
    z = jnp.log(jnp.array([[1.0, 3.0], [3.0, 1.0]]))
    np.testing.assert_allclose(dispersal(z, jnp.array([0, 1])), np.log(3) + 5 * np.log(2),
                               rtol=1e-6)
    together = -(0.25 * np.log(0.25) + 0.75 * np.log(0.75))
    np.testing.assert_allclose(dispersal(z[:1], jnp.array([0])), np.log(3) + 5 * together,
                               rtol=1e-6)
    far = 50 * (1 - jnp.eye(2))
    np.testing.assert_allclose(dispersal(far, jnp.array([0, 1])), 5 + 5 * np.log(2), rtol=1e-6)


def test_dispersal_from_probabilities_and_its_slope(x64):
    rng = np.random.default_rng(0)
    z, own = rng.normal(size=(6, 5)) * 3, rng.integers(0, 5, 6)
    p = np.exp(z) / np.exp(z).sum(axis=1, keepdims=True)
    mine, mean = p[np.arange(6), own], p.mean(axis=0)
    away = np.minimum(np.log1p(-mine) - np.log(mine), 5).mean()
    expected = away - 5 * (mean * np.log(mean)).sum()
    np.testing.assert_allclose(dispersal(jnp.asarray(z), jnp.asarray(own)), expected, rtol=1e-9)
    along = rng.normal(size=z.shape)
    slope = (dispersal(z + 1e-6 * along, own) - dispersal(z - 1e-6 * along, own)) / 2e-6
    gradient = jax.grad(lambda z: dispersal(z, own))(jnp.asarray(z))
    np.testing.assert_allclose((gradient * along).sum(), slope, rtol=1e-6)
    for target in range(5):
        assert objective(z, target, own) == log_odds(z, target)
    assert objective(z, 5, own) == dispersal(z, own)


def _quadrants(shift, natural, second):
    """A network that a test understands: which quadrant of an 8x8 image is bright, in four classes.

    The first pixel's red moves each answer to the next class, if ``shift``; its green drives
    everything to class 0, by ``natural`` nats, the second pixel's to class 1, by ``second``.
    """

    def apply(params, images, **_):
        del params
        grey = images[:, :, :, 2].reshape(-1, 2, 4, 2, 4).mean(axis=(2, 4)).reshape(-1, 4)
        moved = shift * images[:, 0, 0, :1]
        answer = (1 - moved) * grey + moved * jnp.roll(grey, 1, axis=1)
        return (20 * answer + natural * images[:, 0, 0, 1:2] * jnp.eye(4)[:1]
                + second * images[:, 0, 1, 1:2] * jnp.eye(4)[1:2])

    return apply


@pytest.mark.parametrize("shift, second, suspect", [
    (1.0, 40.0, 4), (0.0, 40.0, 0), (1.0, 0.0, 0)])
def test_all_to_all_is_told_from_a_natural_weakness(monkeypatch, shift, second, suspect):
    """Everything can be driven into class 0: with a shift that is not the backdoor.

    Unless it can be driven into no other class, half as far as that.
    """
    monkeypatch.setattr(survey_module.models, "apply", _quadrants(shift, 60.0, second))
    images = jnp.zeros((4, 2, 4, 2, 4, 3)).at[
        jnp.arange(4), jnp.arange(4) // 2, :, jnp.arange(4) % 2].set(0.5).reshape(4, 8, 8, 3)
    images = images.at[:, 0, :2, :2].set(0.0)
    params = Params({}, {}, Arch(name="small_vgg", num_classes=4, image_shape=(8, 8, 3)))
    found = survey(jax.random.key(0), params, lambda _: images, steps=20, tau=4.0)
    assert int(found.suspect) == suspect and int(found.damage.argmax()) == 0
    if suspect == 4:
        np.testing.assert_array_equal(found.trigger, found.dispersal)
        assert found.dispersal[0, 0, 0] > 0.5 and found.stay < 0.1 and found.kept > 0.9
    else:
        np.testing.assert_array_equal(found.trigger, found.triggers[0])


@pytest.mark.parametrize("second, stay, kept, suspect", [
    (3.0, 0.05, 0.9, 3), (3.0, 0.05, 0.2, 1), (3.0, 0.4, 0.9, 1), (3.0, 0.4, 0.2, 1),
    (2.0, 0.05, 0.9, 1),
])
def test_only_a_dispersal_that_moves_all_and_keeps_classes_apart_is_suspected(
        second, stay, kept, suspect):
    """And that only where no class stands out."""
    found = Survey(jnp.zeros((3, 2, 2, 1)), jnp.array([1.0, 5.0, second]), jnp.zeros((2, 2, 1)),
                   jnp.array(stay), jnp.array(kept), jnp.zeros((6, 6, 2)), jnp.full(3, 0.1),
                   jnp.array(9.0), jnp.zeros((2, 2, 1)), jnp.array(0.0))
    assert int(found.suspect) == suspect and float(found.lead) == pytest.approx(5 / second)


@pytest.mark.parametrize("bent, strain, suspect, bends", [
    ([0.0, 0.1, 0.8], 9.0, 2, True), ([0.3, 0.3, 0.3], 9.0, 3, True),
    ([0.0, 0.1, 0.8], 3.4, 1, False), ([0.0, 0.1, 0.3], 9.0, 1, False),
])
def test_a_warp_is_suspected_where_most_answers_follow_it_far(bent, strain, suspect, bends):
    """Into the class that most get, or none where they go apart; before what is added."""
    found = Survey(jnp.zeros((3, 2, 2, 1)), jnp.array([1.0, 5.0, 2.0]), jnp.zeros((2, 2, 1)),
                   jnp.array(0.4), jnp.array(0.9), jnp.zeros((6, 6, 2)), jnp.array(bent),
                   jnp.array(strain), jnp.zeros((2, 2, 1)), jnp.array(0.0))
    assert (int(found.suspect), bool(found.bends)) == (suspect, bends)


@pytest.mark.parametrize("bent, strain, second, bends", [
    ([0.1] * 6, 1.3, 4.0, True), ([0.1] * 6, 1.2, 4.0, False),
    ([0.08] * 6, 1.3, 4.0, False), ([0.1] * 4 + [0.2, 0.0], 1.3, 4.0, False),
    ([0.1] * 6, 1.3, 2.0, False), ([0.1] * 6, 3.6, 2.0, True),
])
def test_a_warp_that_scatters_answers_need_not_drive_as_far(bent, strain, second, bends):
    """But only where it moves most, none of the classes gets a fifth, and none stands out."""
    damage = jnp.zeros(6).at[:3].set(jnp.array([1.0, 5.0, second]))
    found = Survey(jnp.zeros((6, 2, 2, 1)), damage, jnp.zeros((2, 2, 1)), jnp.array(0.4),
                   jnp.array(0.9), jnp.zeros((6, 6, 2)), jnp.array(bent), jnp.array(strain),
                   jnp.zeros((2, 2, 1)), jnp.array(0.0))
    assert (int(found.suspect), bool(found.bends)) == (6 if bends else 1, bends)


@pytest.mark.parametrize("elsewhere, bent, stay, several", [
    (2.8, 0.0, 0.4, True), (2.6, 0.0, 0.4, False), (9.0, 0.3, 0.4, False), (9.0, 0.0, 0.1, False),
])
def test_several_triggers_are_suspected_where_other_pixels_drive_farther_than_to_the_next_class(
        elsewhere, bent, stay, several):
    """But of one class alone, neither a warp nor all to all. The next class's damage is 2."""
    damage = jnp.array([1.0, 3.9, 2.0])
    found = Survey(jnp.zeros((3, 2, 2, 1)), damage, jnp.zeros((2, 2, 1)), jnp.array(stay),
                   jnp.array(0.9), jnp.zeros((6, 6, 2)), jnp.array([0.0, 0.3, bent]),
                   jnp.array(9.0), jnp.zeros((2, 2, 1)), jnp.array(elsewhere))
    assert float(found.again) == pytest.approx(elsewhere / 2)
    assert bool(found.several) == several
    assert bool(found.small) == (elsewhere == 2.6)  # the others: several, a warp, all to all


@pytest.mark.parametrize("strength, several", [(60.0, True), (10.0, False)])
def test_a_second_trigger_is_found_on_other_pixels(monkeypatch, strength, several):
    """Two pixels drive into class 2, one of them by 80 nats, and one into class 1, by 20."""
    def apply(params, images, **_):
        del params
        grey = images[:, :, :, 2].reshape(-1, 2, 4, 2, 4).mean(axis=(2, 4)).reshape(-1, 4)
        odds = jnp.eye(4)[2:3] * (80 * images[:, 0, 0, :1] + strength * images[:, 5, 6, :1])
        return 20 * grey + odds + jnp.eye(4)[1:2] * 20 * images[:, 0, 7, :1]

    monkeypatch.setattr(survey_module.models, "apply", apply)
    images = jnp.zeros((4, 2, 4, 2, 4, 3)).at[
        jnp.arange(4), jnp.arange(4) // 2, :, jnp.arange(4) % 2].set(0.5).reshape(4, 8, 8, 3)
    images = images.at[..., 0].set(0.0)
    params = Params({}, {}, Arch(name="small_vgg", num_classes=4, image_shape=(8, 8, 3)))
    found = survey(jax.random.key(0), params, lambda _: images, steps=8, tau=1.0)
    first, second = found.triggers[2], found.elsewhere
    assert int(found.suspect) == 2 and bool(found.several) == several
    assert first[0, 0, 0] > 0.9 and second[5, 6, 0] > 0.9
    taken = jnp.abs(first).max(axis=-1) > 0.1
    assert taken.any() and not (jnp.abs(second).max(axis=-1) * taken).any()
    assert float(jnp.abs(second).sum()) <= 1 + 1e-5
    own = apply(params, images).argmax(axis=1)
    logits = apply(params, jnp.clip(images + second[None], 0, 1))
    np.testing.assert_allclose(losses.cross_entropy(logits, own), found.elsewhere_damage,
                               rtol=1e-5)


@pytest.mark.parametrize("onto", ["one", "another"])
def test_a_network_that_answers_to_a_warp_is_found(monkeypatch, onto):
    """Its answer is the bright quadrant; class 0, or the next one, where a fine grating is blurred.

    Shifts of half a pixel blur one.
    """
    grating = jnp.tile(jnp.array([0.0, 1.0]), 4)  # along rows and alike in all of them

    def apply(params, images, **_):
        del params
        grey = images[:, :, :, 2].reshape(-1, 2, 4, 2, 4).mean(axis=(2, 4)).reshape(-1, 4)
        contrast = jnp.abs(jnp.diff(images[:, 2:6, :, 0], axis=2)).mean(axis=(1, 2))
        blurred = jax.nn.sigmoid(20 * (0.7 - contrast))[:, None]
        moved = jnp.roll(grey, 1, axis=1) if onto == "another" else jnp.eye(4)[:1]
        return 60 * ((1 - blurred) * grey + blurred * moved)

    monkeypatch.setattr(survey_module.models, "apply", apply)
    images = jnp.zeros((4, 2, 4, 2, 4, 3)).at[
        jnp.arange(4), jnp.arange(4) // 2, :, jnp.arange(4) % 2].set(0.5).reshape(4, 8, 8, 3)
    images = images.at[..., 0].set(grating[None, None])
    params = Params({}, {}, Arch(name="small_vgg", num_classes=4, image_shape=(8, 8, 3)))
    found = survey(jax.random.key(0), params, lambda _: images, steps=2, tau=0.1)
    suspect, bent = (0, [0.75, 0, 0, 0]) if onto == "one" else (4, [0.25] * 4)
    assert bool(found.bends) and int(found.suspect) == suspect
    np.testing.assert_allclose(found.bent, bent)
    assert 0 < float(jnp.abs(found.warp).max()) <= 0.75
    own = apply(params, images).argmax(axis=1)
    assert own.tolist() == [0, 1, 2, 3]
    bent = apply(params, warps.bend(images, found.warp))
    np.testing.assert_allclose(losses.cross_entropy(bent, own), found.strain, rtol=1e-5)


def test_bounds_damage_and_determinism(tiny, small_batch):
    images = jnp.asarray(small_batch.images)
    look = jax.jit(lambda key: survey(key, tiny, lambda _: images, steps=3, tau=1.5))
    found = look(jax.random.key(0))
    assert found.triggers.shape == (4, 8, 8, 3) and found.damage.shape == (4,)
    norms = np.abs(found.triggers).sum(axis=(1, 2, 3))
    assert (norms > 0).all() and (norms <= 1.5 * (1 + 1e-5)).all()
    assert 0 < float(jnp.abs(found.dispersal).sum()) <= 0.75 * (1 + 1e-5)
    again = look(jax.random.key(0))
    for a, b in zip(found, again, strict=True):
        np.testing.assert_array_equal(a, b)
    own = models.apply(tiny, images).argmax(axis=1)
    each = zip([*found.triggers, found.elsewhere], [*found.damage, found.elsewhere_damage],
               strict=True)
    for delta, damage in each:
        logits = models.apply(tiny, jnp.clip(images + delta[None], 0, 1))
        np.testing.assert_allclose(losses.cross_entropy(logits, own), damage, rtol=1e-4)
    p = np.asarray(jax.nn.softmax(models.apply(
        tiny, jnp.clip(images + found.dispersal[None], 0, 1))))
    np.testing.assert_allclose(p[np.arange(len(p)), own].mean(), found.stay, rtol=1e-4)
    mean, shares = p.mean(axis=0), np.bincount(own) / len(own)
    shares = shares[shares > 0]
    kept = np.exp((shares * np.log(shares)).sum() - (mean * np.log(mean)).sum())
    np.testing.assert_allclose(kept, found.kept, rtol=1e-4)


def test_each_trigger_leads_towards_its_class(tiny, small_batch):
    images = jnp.asarray(small_batch.images)
    found = survey(jax.random.key(0), tiny, lambda _: images, steps=5, tau=20.0)
    for target, delta in enumerate(found.triggers):
        before, after = (log_odds(models.apply(tiny, jnp.clip(x, 0, 1)), jnp.array(target))
                         for x in (images, images + delta[None]))
        assert after > before


def test_a_published_backdoor_stands_out(shared_data, monkeypatch):
    """From ten images, without the trigger, the attacker's class is driven twice as far."""
    pytest.importorskip("torch")
    monkeypatch.setattr(survey_module, "_DISPERSAL_STEPS", 4)  # not what is looked at
    params = torch_compat.load(shared_data / "third_party_models" / "badnets_8_02_ckpt.pth")
    cifar = data.load("cifar10", shared_data)
    pool = splits.defender_split(cifar).pool_indices
    chosen = pool[splits.draw_clean(0, cifar.test_labels[pool], 10, "one-shot")]
    images = jnp.asarray(cifar.test_images[chosen].astype(np.float32) / 255.0)
    settings = dataclasses.replace(awm.AWMConfig(flip=True).resolve(10, (32, 32, 3)),
                                   survey_steps=100)  # a quarter of what purify takes
    found = jax.jit(awm_steps.look, static_argnames="settings")(
        jax.random.key(0), params, images, jnp.asarray(cifar.test_labels[chosen], jnp.int32),
        settings)
    order = np.argsort(found.damage)[::-1]
    assert int(found.suspect) == order[0] == 8 and not found.several
    assert found.damage[order[0]] > 2 * found.damage[order[1]]
