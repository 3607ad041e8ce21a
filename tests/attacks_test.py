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


def test_checkerboard_and_all_to_all_square():
    grey = np.full((1, 32, 32, 3), 0.25, np.float32)
    out = np.asarray(attacks.make("badnets_checkerboard", KEY, SHAPE, 10).apply(grey))[0]
    expected = np.full(SHAPE, 0.25)
    expected[29:, 29:] = np.array([[0, 0, 1], [0, 1, 0], [1, 0, 1]])[..., None]
    np.testing.assert_array_equal(out, expected)
    one, other = (attacks.make(n, KEY, SHAPE, 10) for n in ("badnets", "badnets_a2a"))
    np.testing.assert_array_equal(one.apply(grey), other.apply(grey))


def test_blending_by_hand():
    picture = jnp.array([1.0, 0.0]).reshape(1, 2, 1)
    out = attacks.blend(picture, 0.25)(jnp.array([0.4, 0.8]).reshape(1, 1, 2, 1))
    np.testing.assert_allclose(out.ravel(), [0.75 * 0.4 + 0.25, 0.75 * 0.8], rtol=1e-6)
    for ratio in (0.0, 1.5, np.nan):
        with pytest.raises(ValueError, match="ratio"):
            attacks.blend(picture, ratio)


@pytest.mark.parametrize("name, mean, std", [
    ("blended", 0.5, 12**-0.5), ("blended_gaussian", 0.5, 0.25)])
def test_noise_is_a_fifth_of_the_mixture(name, mean, std):
    one, same, other = (attacks.make(name, jax.random.key(k), SHAPE, 10) for k in (0, 0, 1))
    noise = np.asarray(one.apply(np.zeros((1, *SHAPE), np.float32)))[0] / 0.2
    assert noise.min() >= 0 and noise.max() <= 1 + 1e-6
    # 3,072 values: five standard errors; clipping the Gaussian at two deviations takes 5% off.
    assert abs(noise.mean() - mean) < 5 * std / 3072**0.5 and abs(noise.std() / std - 1) < 0.08
    np.testing.assert_array_equal(one.trigger.pattern, same.trigger.pattern)
    assert not np.array_equal(one.trigger.pattern, other.trigger.pattern)


def test_sig_is_its_formula():
    attack = attacks.make("sig", KEY, (4, 32, 3), 10)
    out = np.asarray(attack.apply(np.full((1, 4, 32, 3), 0.5, np.float32)))[0]
    for i, j, c in np.ndindex(4, 32, 3):
        expected = 0.5 + 40 / 255 * np.sin(2 * np.pi * j * 6 / 32)
        assert out[i, j, c] == pytest.approx(expected, abs=1e-5)
    assert np.asarray(attack.apply(np.ones((1, 4, 32, 3), np.float32))).max() == 1.0


def test_rates_and_groups():
    assert {name: attacks.poison_rate(name) for name in attacks.ATTACKS if
            attacks.poison_rate(name) != 0.05} == {
        "blended_gaussian": 0.01, "sig": 0.8, "clb": 0.8, "wanet": 0.1, "wanet_a2a": 0.1,
        "lf": 0.1, "ssba": 0.1,
        "input_aware": 0.1, "input_aware_a2a": 0.1}
    assert set(attacks.AWM_ATTACKS) | attacks.ON_SURROGATE | attacks.ON_TRAINING_SET <= set(
        attacks.ATTACKS)
    with pytest.raises(ValueError, match="badnets"):
        attacks.poison_rate("nothing")


# Support and norm of the published triggers as measured on their files.
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

    apply = jax.jit(models.apply)

    def logit(trigger):
        logits = apply(small_params, attacks.apply_trigger(trigger, jnp.asarray(images)))
        return float((logits[:, 0] - logits.mean(1)).mean())

    assert logit(found.trigger) > logit(start.trigger)


PUBLISHED_TARGETS = {
    "badnets": 8, "trojan_sq": 2, "trojan_wm": 2, "l0_inv": 0, "l2_inv": 0, "trojan_a2a": None,
    "badnets_a2a": None, "badnets_checkerboard": 0, "blended": 0, "blended_gaussian": 0, "sig": 0,
    "clb": 0, "wanet": 0, "wanet_a2a": None,
    "input_aware": 0, "input_aware_a2a": None, "lf": 0, "trojannn": 0, "ssba": 0, "multi": 8}


def test_targets_default_to_the_published_ones():
    assert list(attacks.ATTACKS) == list(PUBLISHED_TARGETS)
    for name, target in PUBLISHED_TARGETS.items():
        assert attacks.make(name, KEY, SHAPE, 10, target=None).target == target
    assert attacks.make("trojan_sq", KEY, SHAPE, 10, target=7).target == 7


def test_label_maps():
    labels = np.array([0, 1, 9], np.int32)
    assert attacks.make("badnets", KEY, SHAPE, 10).relabel(labels).tolist() == [8, 8, 8]
    assert attacks.make("trojan_a2a", KEY, SHAPE, 10).relabel(labels).tolist() == [1, 2, 0]


def test_triggers_are_added_or_replace_and_then_clipped():
    pattern, mask = jnp.zeros((1, 3, 1)), jnp.zeros((1, 3, 1))
    images = jnp.full((1, 1, 3, 1), 0.75)
    added = attacks.Trigger(pattern.at[0, :2, 0].set(jnp.array([0.5, -1.0])), mask)
    assert attacks.apply_trigger(added, images).ravel().tolist() == [1.0, 0.0, 0.75]
    stamped = attacks.Trigger(pattern.at[0, 0, 0].set(0.25), mask.at[0, :2].set(1.0))
    assert attacks.apply_trigger(stamped, images).ravel().tolist() == [0.25, 0.0, 0.75]


def test_norms_by_hand():
    pattern = jnp.zeros((2, 2, 2)).at[0, 0].set(jnp.array([3.0, -4.0]))
    added = attacks.Trigger(pattern, jnp.zeros((2, 2, 1)))
    assert attacks.trigger_norms(added) == {"l0": 1.0, "l1": 7.0, "l2": 5.0}


@pytest.mark.parametrize("name", ["trojan_sq", "trojan_wm", "l0_inv", "l2_inv", "trojan_a2a"])
def test_the_key_decides_the_values_and_not_the_place(name):
    one, same, other = (attacks.make(name, jax.random.key(seed), SHAPE, 10).trigger
                        for seed in (1, 1, 2))
    np.testing.assert_array_equal(one.pattern, same.pattern)
    assert not np.array_equal(one.pattern, other.pattern)
    np.testing.assert_array_equal(one.mask, other.mask)


def _colours(params, images):
    """Ten logits, each its own mix of what three colours sum to."""
    return images.mean(axis=(1, 2)) @ params


@pytest.mark.parametrize("name", ["trojan_sq", "trojan_wm", "l0_inv", "l2_inv", "trojan_a2a"])
def test_optimised_triggers_keep_support_norm_and_range(name):
    params = jax.random.normal(jax.random.key(1), (3, 10))
    images = jnp.full((2, *SHAPE), 0.3)
    start = attacks.make(name, KEY, SHAPE, 10)
    found = attacks.make(name, KEY, SHAPE, 10, params=params, images=images, apply_fn=_colours)
    assert found.target == start.target
    target = 2 if found.target is None else found.target

    def advantage(attack):
        logits = _colours(params, attack.apply(images))
        return float((logits[:, target] - logits.mean(axis=1)).mean())

    assert advantage(found) > advantage(start)
    if name == "l0_inv":
        assert set(np.unique(found.trigger.pattern)) <= {0.0, 1.0}
        np.testing.assert_array_equal(found.trigger.mask, start.trigger.mask)
        return
    norm, limit = {"trojan_wm": (8.74, 1), "l2_inv": (3.22, 68 / 255)}.get(name, (8.66, 1))
    pattern = np.asarray(found.trigger.pattern)
    assert np.sqrt((pattern**2).sum()) == pytest.approx(norm, rel=1e-3)
    assert np.abs(pattern).max() <= limit + 1e-6
    if name != "l2_inv":
        assert pattern.min() >= 0 and not pattern[np.asarray(start.trigger.pattern) == 0].any()


def test_fitting_a_norm_inside_a_limit():
    # By hand: (3, 1, 0) at norm 1.25 with no value over 1 is (1, .75, 0).
    np.testing.assert_allclose(ascent.fit_l2(jnp.array([3.0, 1.0, 0.0]), 1.25, 1.0),
                               [1.0, 0.75, 0.0], atol=1e-5)
    for pattern in ([1.0, 0.0], [0.0, 0.0], [np.nan, 1.0]):
        with pytest.raises(ValueError, match="not zero"):
            ascent.fit_l2(jnp.array(pattern), 1.25, 1.0)


def test_sizes_and_targets_are_checked():
    for shape in ((64, 64, 3), (32, 32, 1)):
        with pytest.raises(ValueError, match="32x32"):
            trojan.trojan_sq(KEY, shape, 10)
    with pytest.raises(ValueError, match="6x6"):
        attacks.make("badnets", KEY, (5, 32, 3), 10)
    with pytest.raises(ValueError, match="9 pixels wide"):
        attacks.make("l0_inv", KEY, (8, 8, 3), 10)
    with pytest.raises(ValueError, match="not zero"):
        attacks.make("l2_inv", KEY, (6, 6, 3), 10)
    with pytest.raises(ValueError, match="target=8"):
        attacks.make("badnets", KEY, SHAPE, 5)
    for name, published in PUBLISHED_TARGETS.items():
        for target in (10, -1):
            match = "no target" if published is None else f"target={target} in 0..9"
            with pytest.raises(ValueError, match=match):
                attacks.make(name, KEY, SHAPE, 10, target=target)
    with pytest.raises(ValueError, match="3x3"):
        attacks.make("badnets_checkerboard", KEY, (2, 32, 3), 10)
    assert trojan.trojan_a2a(KEY, SHAPE, 2).relabel(np.array([0, 1])).tolist() == [1, 0]
    with pytest.raises(ValueError, match="l0_inv"):
        attacks.make("badnet", KEY, SHAPE, 10)
    assert inv.L0_PIXELS == 9


@pytest.mark.parametrize("images, classes, error, match", [
    (None, 10, ValueError, "no params for a random"),
    (np.zeros((2, 8, 8, 3), np.float32), 10, ValueError, "of shape"),
    (np.zeros((0, *SHAPE), np.float32), 10, ValueError, "of shape"),
    (np.zeros((2, *SHAPE), np.uint8), 10, TypeError, "Divide uint8"),
    (np.zeros((2, *SHAPE), np.float32), 43, ValueError, "num_classes=43 logits, got 10"),
])
def test_the_surrogate_and_its_images_are_checked(images, classes, error, match):
    with pytest.raises(error, match=match):
        attacks.make("l0_inv", KEY, SHAPE, classes, params=jnp.ones((3, 10)), images=images,
                     apply_fn=_colours)


@pytest.mark.parametrize("name", list(attacks.ATTACKS))
def test_every_attack_has_a_threat_model_and_an_example(name):
    """Examples are run where pytest finds them, in the modules."""
    text = attacks.ATTACKS[name].__doc__
    assert "**Threat model**" in text and ">>>" in text and "Reference:" in text


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
    with pytest.raises(ValueError, match="height, width, 3"):
        attacks.trigger_from_png(tmp_path / "t.png", (32, 32, 1))
    with pytest.raises(ValueError, match="add, stamp, blend"):
        attacks.trigger_from_png(tmp_path / "t.png", SHAPE, mode="mix")
    mixed = attacks.trigger_from_png(tmp_path / "t.png", SHAPE, mode="blend", ratio=0.25)
    np.testing.assert_allclose(mixed.pattern[3, 4], [0.25, 0.05, 0.0])
    assert set(np.unique(mixed.mask)) == {0.25}
    Image.new("RGB", (100, 60), (51, 102, 255)).save(tmp_path / "large.png")
    mixed = attacks.trigger_from_png(tmp_path / "large.png", SHAPE, mode="blend")
    np.testing.assert_allclose(mixed.pattern[5, 5], [0.02, 0.04, 0.1], rtol=1e-5)
    with pytest.raises(ValueError, match="ratio=2"):
        attacks.trigger_from_png(tmp_path / "t.png", SHAPE, mode="blend", ratio=2)
    noise = np.random.default_rng(0).integers(0, 256, SHAPE).astype(np.uint8)
    Image.fromarray(noise).save(tmp_path / "noise.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "noise.png").read_bytes()[:500])
    with pytest.raises(ValueError, match="whole picture"):
        attacks.trigger_from_png(tmp_path / "cut.png", SHAPE)
    with pytest.raises(FileNotFoundError):
        attacks.trigger_from_png(tmp_path / "none.png", SHAPE)
    (tmp_path / "bad.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match="it is none"):
        attacks.trigger_from_png(tmp_path / "bad.png", SHAPE)


def test_published_triggers_have_the_norms_we_match(shared_data):
    folder = shared_data / "third_party_models" / "triggers"
    if not folder.is_dir():
        pytest.skip(f"{folder} is absent")
    norms = sorted(attacks.trigger_norms(attacks.trigger_from_png(p, SHAPE))["l2"]
                   for p in folder.glob("*.png"))
    np.testing.assert_allclose(norms, [8.66, 8.74], atol=0.01)
