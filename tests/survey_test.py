"""One trigger a class: its objective by hand, its bounds, and real backdoors that it must find."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from awm_jax import data, losses, models, torch_compat
from awm_jax.data import splits
from awm_jax.defences import awm, awm_steps
from awm_jax.defences.survey import log_odds, survey


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


def test_bounds_damage_and_determinism(small_params, small_batch):
    images = jnp.asarray(small_batch.images)
    look = jax.jit(lambda key: survey(key, small_params, lambda _: images, steps=3, tau=1.5))
    found = look(jax.random.key(0))
    assert found.triggers.shape == (4, 8, 8, 3) and found.damage.shape == (4,)
    norms = np.abs(found.triggers).sum(axis=(1, 2, 3))
    assert (norms > 0).all() and (norms <= 1.5 * (1 + 1e-5)).all()
    np.testing.assert_array_equal(found.triggers, look(jax.random.key(0)).triggers)
    own = models.apply(small_params, images).argmax(axis=1)
    for delta, damage in zip(found.triggers, found.damage, strict=True):
        logits = models.apply(small_params, jnp.clip(images + delta[None], 0, 1))
        np.testing.assert_allclose(losses.cross_entropy(logits, own), damage, rtol=1e-4)


def test_each_trigger_leads_towards_its_class(small_params, small_batch):
    images = jnp.asarray(small_batch.images)
    found = survey(jax.random.key(0), small_params, lambda _: images, steps=5, tau=20.0)
    for target, delta in enumerate(found.triggers):
        before, after = (log_odds(models.apply(small_params, jnp.clip(x, 0, 1)), jnp.array(target))
                         for x in (images, images + delta[None]))
        assert after > before


@pytest.mark.parametrize("name, target", [("badnets_8_02", 8), ("trojan_sq_2_02", 2)])
def test_a_published_backdoor_stands_out(shared_data, name, target):
    """From ten images, without the trigger, the attacker's class is driven twice as far."""
    params = torch_compat.load(shared_data / "third_party_models" / f"{name}_ckpt.pth")
    cifar = data.load("cifar10", shared_data)
    pool = splits.defender_split(cifar).pool_indices
    chosen = pool[splits.draw_clean(0, cifar.test_labels[pool], 10, "one-shot")]
    images = jnp.asarray(cifar.test_images[chosen].astype(np.float32) / 255.0)
    settings = awm.AWMConfig(flip=True).resolve(10, (32, 32, 3))
    found = jax.jit(awm_steps.look, static_argnames="settings")(
        jax.random.key(0), params, images, jnp.asarray(cifar.test_labels[chosen], jnp.int32),
        settings)
    order = np.argsort(found.damage)[::-1]
    assert order[0] == target and found.damage[order[0]] > 2 * found.damage[order[1]]
