"""Poisoned training sets: who is changed, how many, and what their labels become."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from awm_jax import attacks

SHAPE = (32, 32, 3)
KEY = jax.random.key(0)
CLEAN = ("sig", "clb")
USUAL = [name for name in attacks.ATTACKS if name not in (*CLEAN, "multi")]


@pytest.mark.parametrize("name, dtype", [
    *((name, np.uint8) for name in USUAL),
    *((name, np.float32) for name in USUAL if name not in attacks.ON_TRAINING_SET)])
def test_poisoning_counts_and_labels(name, dtype):
    attack = attacks.make(name, KEY, SHAPE, 10)
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (60, *SHAPE)).astype(np.uint8)
    if dtype == np.float32:
        images = (images / 255).astype(np.float32)
    labels = rng.integers(0, 10, 60).astype(np.int32)
    out, new, poisoned, covered = attacks.poison(KEY, attack, images, labels, 0.15)
    assert poisoned.sum() == 9 and out.dtype == dtype and new.dtype == labels.dtype
    assert covered.sum() == 9 * attack.cover_ratio and not (poisoned & covered).any()
    np.testing.assert_array_equal(out[~poisoned & ~covered], images[~poisoned & ~covered])
    np.testing.assert_array_equal(new[~poisoned], labels[~poisoned])
    expected = (labels + 1) % 10 if attack.target is None else np.full(60, attack.target)
    np.testing.assert_array_equal(new[poisoned], expected[poisoned])
    assert (labels[poisoned] != new[poisoned]).all()
    scale = 255 if dtype == np.uint8 else 1
    triggered = np.asarray(attack.apply(images[poisoned].astype(np.float32) / scale)) * scale
    np.testing.assert_allclose(out[poisoned], triggered, atol=0.51 if scale == 255 else 1e-6)


def test_poisoning_is_decided_by_the_key_and_bounded():
    attack = attacks.make("badnets", KEY, SHAPE, 10)
    images, labels = np.zeros((40, *SHAPE), np.uint8), np.arange(40, dtype=np.int32) % 10

    def picks(seed):
        return attacks.poison(jax.random.key(seed), attack, images, labels, 0.2).poisoned

    np.testing.assert_array_equal(picks(1), picks(1))
    assert not np.array_equal(picks(1), picks(2))
    with pytest.raises(ValueError, match="36 images outside"):
        attacks.poison(KEY, attack, images, labels, 0.95)
    with pytest.raises(ValueError, match=r"rate=1\.5"):
        attacks.poison(KEY, attack, images, labels, 1.5)


def test_poisoning_all_outside_the_target_class_never_takes_one_in_it():
    attack = attacks.make("badnets", KEY, SHAPE, 10)
    images, labels = np.zeros((20, *SHAPE), np.uint8), np.arange(20, dtype=np.int32) % 10
    _, new, poisoned, _ = attacks.poison(KEY, attack, images, labels, 0.9)
    np.testing.assert_array_equal(poisoned, labels != 8)
    assert (new == 8).all()
    everyone = attacks.make("trojan_a2a", KEY, SHAPE, 10)
    _, new, poisoned, _ = attacks.poison(KEY, everyone, images, labels, 1.0)
    assert poisoned.all() and new.tolist() == ((labels + 1) % 10).tolist()
    assert not attacks.poison(KEY, attack, images, labels, 0.0).poisoned.any()


def test_poisoning_rounds_uint8_takes_jax_arrays_and_leaves_the_input():
    faint = attacks.Trigger(jnp.full((1, 1, 1), 1.6 / 255), jnp.zeros((1, 1, 1)))
    attack = attacks.Attack("faint", faint, 1, 2)
    images, labels = np.array([10, 254], np.uint8).reshape(2, 1, 1, 1), np.zeros(2, np.int32)
    for kind in (np.asarray, jnp.asarray):
        out, *_ = attacks.poison(KEY, attack, kind(images), kind(labels), 1.0)
        assert out.dtype == np.uint8 and out.ravel().tolist() == [12, 255]  # 11.6, 255.6 clipped
    assert images.ravel().tolist() == [10, 254] and not labels.any()


def test_poisoning_checks_the_set():
    attack = attacks.make("badnets", KEY, SHAPE, 10)
    images, labels = np.zeros((4, *SHAPE), np.uint8), np.arange(4)
    for wrong in (images[:3], images[:, :8], images[0]):
        with pytest.raises(ValueError, match="of shape"):
            attacks.poison(KEY, attack, wrong, labels, 0.5)
    with pytest.raises(TypeError, match="int32"):
        attacks.poison(KEY, attack, images.astype(np.int32), labels, 0.5)
    for value in (200.0, -0.1, float("nan")):
        with pytest.raises(ValueError, match=r"float images in \[0, 1\], got .*by 255"):
            attacks.poison(KEY, attacks.make("badnets", KEY, SHAPE, 10),
                           np.full((20, *SHAPE), value, np.float32), np.zeros(20, np.int32), 0.2)


@pytest.mark.parametrize("name", CLEAN)
@pytest.mark.parametrize("rate, count", [(0.8, 16), (0.1, 2), (0.0, 0), (1.0, 20)])
def test_clean_labels_stay_and_only_the_target_class_is_touched(name, rate, count):
    attack = attacks.make(name, KEY, SHAPE, 10, target=4)
    images = np.full((200, *SHAPE), 128, np.uint8)
    labels = np.repeat(np.arange(10, dtype=np.int32), 20)
    found = attacks.poison(KEY, attack, images, labels, rate)
    np.testing.assert_array_equal(found.labels, labels)
    assert found.poisoned.sum() == count and (labels[found.poisoned] == 4).all()
    np.testing.assert_array_equal((found.images != 128).any(axis=(1, 2, 3)), found.poisoned)
    assert attack.relabel(np.array([0, 9])).tolist() == [4, 4]  # what the trigger is for


def test_covers_keep_their_labels_and_are_changed_each_its_own_way():
    attack = attacks.make("wanet", KEY, SHAPE, 10)
    ramp = np.tile(np.arange(32, dtype=np.uint8)[None, :, None] * 8, (32, 1, 3))
    images, labels = np.stack([ramp] * 40), np.arange(40, dtype=np.int32) % 10
    found = attacks.poison(KEY, attack, images, labels, 0.1)
    assert found.poisoned.sum() == 4 and found.covered.sum() == 8
    np.testing.assert_array_equal(found.labels[~found.poisoned], labels[~found.poisoned])
    covers = found.images[found.covered]
    assert all((one != images[0]).any() for one in covers)
    assert len({one.tobytes() for one in covers}) == 8
    assert len({one.tobytes() for one in found.images[found.poisoned]}) == 1
    again = attacks.poison(KEY, attack, images, labels, 0.1)
    assert all((a == b).all() for a, b in zip(found, again, strict=True))
    with pytest.raises(ValueError, match="32 images for wanet's cover"):
        attacks.poison(KEY, attack, images, labels, 0.4)


def test_several_triggers_share_the_poisoned_images():
    attack = attacks.make("multi", KEY, SHAPE, 10, target=3)
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (60, *SHAPE)).astype(np.uint8)
    labels = np.arange(60, dtype=np.int32) % 10
    found = attacks.poison(KEY, attack, images, labels, 0.2)
    assert found.poisoned.sum() == 12 and not found.covered.any()
    assert (labels[found.poisoned] != 3).all() and (found.labels[found.poisoned] == 3).all()
    np.testing.assert_array_equal(found.labels[~found.poisoned], labels[~found.poisoned])
    np.testing.assert_array_equal(found.images[~found.poisoned], images[~found.poisoned])
    clean = images[found.poisoned].astype(np.float32) / 255
    made = np.stack([np.round(np.asarray(part.apply(clean)) * 255) for part in attack.parts])
    whose = (made == found.images[found.poisoned]).all(axis=(2, 3, 4))
    assert whose.sum(axis=0).tolist() == [1] * 12  # each image has one of the three triggers
    assert whose.sum(axis=1).tolist() == [4, 4, 4]
    alone = attacks.make("badnets", KEY, SHAPE, 10, target=3)
    np.testing.assert_array_equal(attack.parts[0].apply(clean), alone.apply(clean))
    together = np.asarray(attack.apply(clean))
    in_turn = clean
    for part in attack.parts:
        in_turn = np.asarray(part.apply(in_turn))
    np.testing.assert_allclose(together, in_turn, atol=1e-6)


def test_parts_are_found_on_a_network_and_of_one_target():
    params, images = jax.random.normal(jax.random.key(1), (3, 10)), jnp.full((2, *SHAPE), 0.3)

    def colours(params, images):
        return images.mean(axis=(1, 2)) @ params

    start = attacks.make("multi", KEY, SHAPE, 10)
    found = attacks.make("multi", KEY, SHAPE, 10, params=params, images=images, apply_fn=colours)
    same = [np.array_equal(a.trigger.pattern, b.trigger.pattern)
            for a, b in zip(start.parts, found.parts, strict=True)]
    assert same == [True, False, False] and {part.target for part in found.parts} == {8}
    dark, sig = attacks.make("badnets", KEY, SHAPE, 10), attacks.make("sig", KEY, SHAPE, 10)
    wanet = attacks.make("wanet", KEY, SHAPE, 10)
    for part, target in ((dark, 0), (sig, 0), (wanet, 0)):
        with pytest.raises(ValueError, match=f"{part.name} is another kind"):
            attacks.Attack("several", dark.trigger, target, 10, parts=(part,))


def test_attacks_check_their_parts():
    trigger = attacks.Trigger(jnp.zeros((2, 2, 1)), jnp.zeros((2, 2, 1)))
    with pytest.raises(ValueError, match="beside clean_label"):
        attacks.Attack("a", trigger, None, 3, clean_label=True)
    with pytest.raises(ValueError, match=r"cover_ratio=2\.0"):
        attacks.Attack("a", trigger, 0, 3, cover_ratio=2.0)
    with pytest.raises(ValueError, match="cover_ratio=-1"):
        attacks.Attack("a", trigger, 0, 3, cover_ratio=-1)
