"""Triggers, label maps and poisoned sets."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from awm_jax import attacks
from awm_jax.attacks import ascent, inv, trojan

SHAPE = (32, 32, 3)
KEY = jax.random.key(0)


def test_badnets_pixels():
    attack = attacks.make("badnets", KEY, SHAPE, 10)
    out = np.asarray(attack.apply(np.full((1, 32, 32, 3), 0.25, np.float32)))[0]
    expected = np.full(SHAPE, 0.25)
    expected[27:31, 27:31] = 1.0
    np.testing.assert_array_equal(out, expected)
    assert attack.target == 8


# Support and norm of the published triggers (guides/peers.md).
@pytest.mark.parametrize("name, rows, columns, pixels, norm", [
    ("trojan_sq", (21, 29), (21, 29), 81, 8.66), ("trojan_wm", (0, 29), (0, 29), 321, 8.74),
    ("trojan_a2a", (21, 29), (21, 29), 81, 8.66)])
def test_trojan_support_and_norm(name, rows, columns, pixels, norm):
    trigger = attacks.make(name, KEY, SHAPE, 43).trigger
    touched = np.abs(np.asarray(trigger.pattern)).max(-1) > 0
    at = np.argwhere(touched)
    assert touched.sum() == pixels and not np.asarray(trigger.mask).any()
    assert rows[0] <= at[:, 0].min() and at[:, 0].max() <= rows[1]
    assert columns[0] <= at[:, 1].min() and at[:, 1].max() <= columns[1]
    assert attacks.trigger_norms(trigger)["l2"] == pytest.approx(norm, rel=1e-5)


def test_l0_replaces_nine_pixels_by_pure_colours():
    attack = attacks.make("l0_inv", KEY, SHAPE, 10)
    before = np.full((1, 32, 32, 3), 0.5, np.float32)
    after = np.asarray(attack.apply(before))[0]
    changed = (after != 0.5).any(-1)
    assert changed.sum() == 9 and changed[31, 23:].all()
    assert set(np.unique(after[31, 23:])) <= {0.0, 1.0}


def test_l2_is_faint():
    pattern = np.asarray(attacks.make("l2_inv", KEY, SHAPE, 10).trigger.pattern)
    assert np.abs(pattern).max() <= 68 / 255 + 1e-6
    assert np.sqrt((pattern**2).sum()) == pytest.approx(3.22, rel=1e-3)
    assert (np.abs(pattern).max(-1) > 0).sum() == 905


def _linear(params, images):
    """A network whose logits are known: class 0 sums red, class 1 sums green."""
    return images.sum(axis=(1, 2))[:, :2] * params


@pytest.mark.parametrize("replace", [False, True])
def test_ascent_goes_where_the_logit_rises(replace):
    support = jnp.zeros((8, 8, 1)).at[2:5, 2:5].set(1.0)
    start = jnp.full((8, 8, 3), 0.5) * support
    out = ascent.ascend(jnp.ones(()), jnp.full((3, 8, 8, 3), 0.2), start, support, target=0,
                        project=ascent.unit_box, replace=replace, apply_fn=_linear)
    inside = np.asarray(out)[2:5, 2:5]
    top = 1.0 if replace else 0.8  # beyond 0.2 + 0.8 clipping stops the gradient
    assert inside[..., 0].min() >= top - 1e-6 and inside[..., 1].max() == 0.0
    assert np.abs(np.asarray(out) * (1 - np.asarray(support))).max() == 0


def test_optimised_triggers_differ_from_their_random_start(small_params):
    images = np.random.default_rng(0).random((2, 8, 8, 3), np.float32)
    start = attacks.make("l2_inv", KEY, (8, 8, 3), 4)
    found = attacks.make("l2_inv", KEY, (8, 8, 3), 4, params=small_params, images=images)
    assert not np.allclose(start.trigger.pattern, found.trigger.pattern)
    from awm_jax import models

    def logit(trigger):
        logits = models.apply(small_params, attacks.apply_trigger(trigger, jnp.asarray(images)))
        return float((logits[:, 0] - logits.mean(1)).mean())

    assert logit(found.trigger) > logit(start.trigger)


def test_sizes_and_targets_are_checked():
    with pytest.raises(ValueError, match="32x32"):
        trojan.trojan_sq(KEY, (64, 64, 3), 10)
    with pytest.raises(ValueError, match="target=8"):
        attacks.make("badnets", KEY, SHAPE, 5)
    with pytest.raises(ValueError, match="no target"):
        trojan.trojan_a2a(KEY, SHAPE, 10, target=1)
    with pytest.raises(ValueError, match="l0_inv"):
        attacks.make("badnet", KEY, SHAPE, 10)
    assert inv.L0_PIXELS == 9


@pytest.mark.parametrize("name", list(attacks.ATTACKS))
@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_poisoning_counts_and_labels(name, dtype):
    attack = attacks.make(name, KEY, SHAPE, 10)
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (60, *SHAPE)).astype(np.uint8)
    if dtype == np.float32:
        images = (images / 255).astype(np.float32)
    labels = rng.integers(0, 10, 60).astype(np.int32)
    out, new, poisoned = attacks.poison(KEY, attack, images, labels, 0.15)
    assert poisoned.sum() == 9 and out.dtype == dtype and new.dtype == labels.dtype
    np.testing.assert_array_equal(out[~poisoned], images[~poisoned])
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
        return attacks.poison(jax.random.key(seed), attack, images, labels, 0.2)[2]

    np.testing.assert_array_equal(picks(1), picks(1))
    assert not np.array_equal(picks(1), picks(2))
    with pytest.raises(ValueError, match="36 images outside"):
        attacks.poison(KEY, attack, images, labels, 0.95)
    with pytest.raises(ValueError, match=r"rate=1\.5"):
        attacks.poison(KEY, attack, images, labels, 1.5)


def test_png_triggers(tmp_path):
    from PIL import Image

    pixels = np.zeros(SHAPE, np.uint8)
    pixels[3, 4] = (255, 51, 0)
    Image.fromarray(pixels).save(tmp_path / "t.png")
    added = attacks.trigger_from_png(tmp_path / "t.png", SHAPE)
    np.testing.assert_allclose(added.pattern[3, 4], [1.0, 0.2, 0.0])
    assert not np.asarray(added.mask).any()
    stamped = attacks.trigger_from_png(tmp_path / "t.png", SHAPE, mode="stamp")
    assert np.asarray(stamped.mask).sum() == 1
    with pytest.raises(ValueError, match="16x16"):
        attacks.trigger_from_png(tmp_path / "t.png", (16, 16, 3))
    with pytest.raises(FileNotFoundError):
        attacks.trigger_from_png(tmp_path / "none.png", SHAPE)
    (tmp_path / "bad.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match="it is none"):
        attacks.trigger_from_png(tmp_path / "bad.png", SHAPE)


def test_published_triggers_have_the_norms_we_match(shared_data):
    folder = shared_data / "third_party_models" / "triggers"
    norms = sorted(attacks.trigger_norms(attacks.trigger_from_png(p, SHAPE))["l2"]
                   for p in folder.glob("*.png"))
    np.testing.assert_allclose(norms, [8.66, 8.74], atol=0.01)
