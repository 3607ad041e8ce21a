"""Input-aware: its losses by hand and against PyTorch, its masks, its training along."""

import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from awm_jax import attacks, data, models
from awm_jax.attacks.in_batches import InBatches, State, in_batches
from awm_jax.types import Arch

module = importlib.import_module("awm_jax.attacks.input_aware")  # the package has the function
KEY = jax.random.key(0)
SHAPE = (8, 8, 3)
IMAGES = jax.random.uniform(jax.random.key(0), (12, *SHAPE))
LABELS = jnp.arange(12) % 4
PLAN = InBatches(2, 4, poisoned=3, covered=2, learn=module.learn)


@functools.cache
def _found():
    """Everything about one batch, by one program: compiling takes the time."""
    attack = attacks.make("input_aware", KEY, SHAPE, 4, target=2)
    params = models.create(KEY, Arch(name="tiny_cnn", num_classes=4, image_shape=SHAPE))

    @jax.jit
    def work(state):
        trigger = state.trigger
        return {"parts": trigger.parts(IMAGES), "triggered": trigger(IMAGES),
                "some": trigger(IMAGES[3:5]), "cover": trigger.cover(jax.random.key(5), IMAGES),
                "loss": module.generator_loss(*trigger, PLAN, params, IMAGES, LABELS)[0],
                "step": PLAN(KEY, state, params, IMAGES, LABELS)}

    state = State(attack.trigger, attack.learner)
    return state, params, jax.device_get(work(state))


def test_the_sharpened_mask_by_hand():
    # (tanh(20 * .55 - 10) + 1) / 2 = (tanh(1) + 1) / 2
    np.testing.assert_allclose(module.sharpen(jnp.array([0.5, 0.55, 0.45])),
                               [0.5, 0.880797, 0.119203], atol=1e-5)


def test_diversity_is_pytorchs():
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    x, y, gx, gy = (rng.random((5, 4, 4, 3)) for _ in range(4))

    def distance(a, b):
        return torch.sqrt(((torch.tensor(a) - torch.tensor(b)) ** 2).mean(dim=(1, 2, 3)))

    expected = (distance(x, y) / (distance(gx, gy) + 1e-7)).mean()
    with jax.enable_x64(True):
        found = module.diversity(*map(jnp.asarray, (x, y, gx, gy)))
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-12)


def test_diversity_has_a_slope_where_two_images_are_the_same():
    x = IMAGES[:2]
    slope = jax.grad(lambda made: module.diversity(x, x, made, made))(x)
    assert np.isfinite(slope).all()


def test_a_trigger_is_its_formula_and_depends_on_its_image_alone():
    _, _, found = _found()
    picture, mask = found["parts"]
    assert 0 <= picture.min() and picture.max() <= 1 and 0 <= mask.min() and mask.max() <= 1
    expected = np.asarray(IMAGES) * (1 - mask) + picture * mask
    np.testing.assert_allclose(found["triggered"], expected, atol=2e-5)
    np.testing.assert_allclose(found["some"], expected[3:5], atol=2e-5)
    assert np.abs(picture[0] - picture[1]).max() > 1e-3


def _put(found, i, donor):
    picture, mask = found["parts"]
    return np.asarray(IMAGES[i]) * (1 - mask[donor]) + picture[donor] * mask[donor]


def test_a_cover_carries_the_trigger_of_another_image():
    _, _, found = _found()
    made = [np.stack([_put(found, i, (i - shift) % 12) for i in range(12)])
            for shift in range(1, 12)]
    assert min(np.abs(found["cover"] - one).max() for one in made) < 2e-5
    assert np.abs(found["cover"] - found["triggered"]).max(axis=(1, 2, 3)).min() > 1e-4


def test_the_generators_loss_is_its_formula():
    _, params, found = _found()
    others = [5, 6, 7]  # the images behind the five that are changed
    changed = np.stack([*(_put(found, i, i) for i in range(3)),
                        *(_put(found, 3 + i, others[i]) for i in range(2))])
    scores = jax.nn.log_softmax(models.apply(params, jnp.asarray(changed)))
    entropy = -sum(float(scores[i, c]) for i, c in enumerate([2, 2, 2, 3, 0]))

    def distance(a, b):
        return np.sqrt(np.mean((np.asarray(a) - np.asarray(b)) ** 2))

    picture = found["parts"][0]
    apart = np.mean([distance(IMAGES[i], IMAGES[j]) / (distance(picture[i], picture[j]) + 1e-7)
                     for i, j in enumerate(others)])
    np.testing.assert_allclose(found["loss"], entropy / 12 + apart, rtol=1e-4)
    np.testing.assert_allclose(found["step"][1][:5], changed, atol=2e-5)


def test_a_step_moves_the_pattern_and_not_the_mask():
    state, _, found = _found()
    new, changed, labels = found["step"]
    assert labels.tolist() == [2, 2, 2, *(i % 4 for i in range(3, 12))]
    np.testing.assert_array_equal(changed[5:], IMAGES[5:])

    def moved(a, b):
        return max(np.abs(x - y).max() for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True))

    assert moved(new.trigger.mask, state.trigger.mask) == 0
    assert moved(new.trigger.pattern, state.trigger.pattern) == pytest.approx(0.01, rel=1e-2)


@pytest.mark.usefixtures("optimised")
def test_masks_become_sparse_and_differ_on_real_images():
    images = data.load("digits").train_images[:256, ::2, ::2]
    attack = attacks.make("input_aware", KEY, (16, 16, 3), 10, images=images)
    masks = np.asarray(jax.jit(module.masks)(attack.trigger.mask, images[:64] / np.float32(255)))
    assert 0.001 < masks.mean() < 0.08  # the paper's density is .032, which depends on rounding
    assert (np.abs(masks[:32] - masks[32:]).max(axis=(1, 2, 3)) > 0.5).mean() > 0.8
    assert ((masks < 0.1) | (masks > 0.9)).mean() > 0.95


def test_masks_that_stay_empty_are_an_error(monkeypatch):
    monkeypatch.setattr(module, "train_masks", lambda key, weights, images: (weights, None))
    monkeypatch.setattr(module, "_density", lambda weights, images: 0.0)
    with pytest.raises(ValueError, match="after 5 attempts"):
        attacks.make("input_aware", KEY, SHAPE, 4, images=IMAGES)


def test_all_to_all_and_keys():
    attack = attacks.make("input_aware_a2a", KEY, SHAPE, 4)
    assert attack.relabel(np.array([0, 3])).tolist() == [1, 0]
    again, other = (attacks.make("input_aware_a2a", jax.random.key(seed), SHAPE, 4)
                    for seed in (0, 1))

    def same(a, b):
        return all((x == y).all() for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True))

    assert same(attack.trigger, again.trigger) and not same(attack.trigger, other.trigger)
    plan = in_batches(attack, 0.25, 12)
    assert (plan.poisoned, plan.covered, plan.target) == (3, 3, None)


@pytest.mark.parametrize("shape, match", [((12, 8, 3), "multiples of 8"),
                                          ((8, 8, 1), "3 channels")])
def test_other_images_are_refused(shape, match):
    with pytest.raises(ValueError, match=match):
        attacks.make("input_aware", KEY, shape, 4)
