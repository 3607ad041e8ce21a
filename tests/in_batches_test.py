"""Poisoning anew in every batch: counts, labels, training with it, and its interruptions."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from awm_jax import attacks, training
from awm_jax.attacks.in_batches import State, in_batches
from awm_jax.types import Arch

KEY = jax.random.key(0)
SHAPE = (8, 8, 3)
ARCH = Arch(name="tiny_cnn", num_classes=3, image_shape=SHAPE)
CONFIG = training.TrainConfig(epochs=3, batch_size=16, augment=False)


def _set():
    rng = np.random.default_rng(0)
    return rng.integers(0, 255, (48, *SHAPE), np.uint8), np.arange(48, dtype=np.int32) % 3


def test_counts_and_labels_are_exact():
    attack = attacks.make("wanet", KEY, SHAPE, 3, target=2)
    plan = in_batches(attack, 0.2, 16)
    assert (plan.poisoned, plan.covered, hash(plan)) == (3, 6, hash(in_batches(attack, 0.2, 16)))
    images, labels = jax.random.uniform(KEY, (16, *SHAPE)), jnp.arange(16) % 3
    state, changed, wanted = plan(KEY, State(attack.trigger), None, images, labels)
    assert wanted.tolist() == [2, 2, 2, *(i % 3 for i in range(3, 16))]
    np.testing.assert_array_equal(changed[:3], attack.trigger(images[:3]))
    np.testing.assert_array_equal(changed[3:9], attack.trigger.cover(KEY, images[3:9]))
    np.testing.assert_array_equal(changed[9:], images[9:])
    assert state.trigger is attack.trigger


def test_refusals_name_the_value():
    wanet, badnets = (attacks.make(name, KEY, SHAPE, 3, target=0) for name in ("wanet", "badnets"))
    with pytest.raises(ValueError, match="got badnets"):
        in_batches(badnets, 0.1, 16)
    with pytest.raises(ValueError, match="batch of 16, it poisons 8"):
        in_batches(wanet, 0.5, 16)
    with pytest.raises(ValueError, match=r"rate=0\.0"):
        in_batches(wanet, 0.0, 16)
    assert in_batches(wanet, 0.01, 16).poisoned == 1


@functools.cache
def _trained(name):
    attack = attacks.make(name, KEY, SHAPE, 3)
    kept = {}
    params = training.train(
        KEY, *_set(), ARCH, CONFIG, attacker=in_batches(attack, 0.1, 16),
        attacker_state=State(attack.trigger, attack.learner),
        on_epoch=lambda done, total, state, loss: kept.update({done: jax.device_get(state)}))
    return attack, params, kept


@pytest.mark.parametrize("name", ["input_aware"])  # whose trigger is part of the state
def test_interrupted_training_ends_where_the_uninterrupted_one_does(name):
    attack, params, kept = _trained(name)
    last = {}
    resumed = training.train(
        KEY, *_set(), ARCH, CONFIG, state=kept[1], attacker=in_batches(attack, 0.1, 16),
        on_epoch=lambda done, total, state, loss: last.update(state=jax.device_get(state)))
    for a, b in zip(*map(jax.tree.leaves, (params, resumed)), strict=True):
        np.testing.assert_array_equal(a, b)
    for a, b in zip(*map(jax.tree.leaves, (kept[3].attacker, last["state"].attacker)), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_learnt_trigger_is_another_at_the_end_and_a_fixed_one_is_not():
    for name, learns in (("wanet", False), ("input_aware", True)):
        attack, _, kept = _trained(name)
        same = all((a == b).all() for a, b in zip(*map(jax.tree.leaves, (
            attack.trigger, kept[3].attacker.trigger)), strict=True))
        assert same != learns


def test_the_network_is_another_than_without_and_the_callers_arrays_live_on():
    attack, params, _ = _trained("wanet")
    plain = training.train(KEY, *_set(), ARCH, CONFIG)
    assert any((a != b).any() for a, b in zip(*map(jax.tree.leaves, (plain, params)), strict=True))
    np.asarray(attack.trigger.grid)  # not donated
