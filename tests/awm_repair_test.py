"""The last step of AWM: what masks leave alone learns from the suspect network again."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage

import awm_jax
from awm_jax import losses, models
from awm_jax.data import augment
from awm_jax.defences import (
    DEFENCES,
    AWMConfig,
    awm_batches,
    awm_repair,
    awm_rows,
    awm_steps,
    rows,
)

QUICK = {"epochs": 2, "inner_steps": 2, "outer_steps": 2, "batch_size": 4, "tau": 100.0}


def _numbers(tree):
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


def _halved(params, settings, suspect=0):
    """A state whose masks of the deep layers are one half, as after a run."""
    state = awm_steps.init(params, settings)
    return state._replace(
        masks={**state.masks, "conv2": jax.tree.map(lambda m: m / 2, state.masks["conv2"])},
        suspect=jnp.array(suspect), epoch=jnp.array(settings.epochs))


@pytest.fixture
def case(tiny, small_batch):
    settings = AWMConfig(repair=2, **QUICK).resolve(len(small_batch.images),
                                                    tiny.arch.image_shape)
    state = _halved(tiny, settings)
    run = functools.partial(awm_repair.repair, params=tiny, images=small_batch.images,
                            labels=small_batch.labels, settings=settings)
    return settings, state, run


def test_all_weights_move_and_kernels_with_masks_least(tiny, small_batch, case):
    settings, state, run = case
    found = run(jax.random.key(0), state)
    moved = jax.tree.map(lambda a, b: np.abs(np.asarray(a - b)).max(), found.weights, tiny.weights)
    assert min(jax.tree.leaves(moved)) > 0
    steps = settings.repair * awm_repair.STEPS * awm_repair.RATE / 2  # a cosine's mean
    assert moved["conv2"]["kernel"] <= 0.2 * 0.5 * steps * 2
    assert moved["conv1"]["kernel"] <= 0.2 * steps * 2
    assert moved["dense"]["kernel"] > 2 * moved["conv2"]["kernel"]
    assert jax.tree.all(jax.tree.map(jnp.array_equal, found.masks, state.masks))
    again = run(jax.random.key(0), state)
    np.testing.assert_array_equal(_numbers(found.weights), _numbers(again.weights))
    other = run(jax.random.key(1), state)
    assert np.abs(_numbers(found.weights) - _numbers(other.weights)).max() > 0
    jitted = jax.jit(awm_repair.repair, static_argnames="settings")(
        jax.random.key(0), state, tiny, small_batch.images, small_batch.labels, settings)
    np.testing.assert_allclose(_numbers(found.weights), _numbers(jitted.weights), atol=1e-5)


@pytest.mark.parametrize("other", ["all_to_all", "none", "bends", "several", "nonfinite"])
def test_nothing_is_repaired_unless_one_small_trigger_is_suspected(tiny, case, other):
    _, state, run = case
    change = {"all_to_all": {"suspect": jnp.array(tiny.arch.num_classes)},
              "none": {"suspect": jnp.array(-1)}, "bends": {"bends": jnp.array(True)},
              "several": {"several": jnp.array(True)}, "nonfinite": {"finite": jnp.array(False)}}
    found = run(jax.random.key(0), state._replace(**change[other]))
    np.testing.assert_array_equal(_numbers(found.weights), _numbers(tiny.weights))


def test_the_first_step_is_adams_along_the_slope(tiny, small_batch, case, monkeypatch):
    """Adam's first step is the rate against the sign of the slope, here of a loss written anew."""
    settings, state, _ = case
    monkeypatch.setattr(awm_repair, "STEPS", 1)
    one = dataclasses.replace(settings, repair=1, replay=1.0, inner_steps=1)
    trigger = jax.random.normal(jax.random.key(5), tiny.arch.image_shape) / 9
    state = state._replace(triggers=jnp.broadcast_to(trigger, state.triggers.shape))
    key = jax.random.key(3)
    found = awm_repair.repair(key, state, tiny, small_batch.images, small_batch.labels, one)

    epoch = jax.random.fold_in(jax.random.fold_in(key, one.epochs + 3), 0)
    step = jax.random.split(jax.random.split(epoch, 3)[2], 1)[0]
    x, _ = awm_batches.minibatch(jax.random.split(step)[0], small_batch.images,
                                 small_batch.labels, one, strong=True)
    target = jax.nn.softmax(models.apply(tiny, x))

    def loss(weights):
        kernel = weights["conv2"]["kernel"] / 2
        halved = {**weights, "conv2": {**weights["conv2"], "kernel": kernel}}
        network = dataclasses.replace(tiny, weights=halved)
        parts = [losses.soft_cross_entropy(models.apply(network, z), target)
                 for z in (x, jnp.clip(x + trigger[None], 0, 1))]
        return 0.98 * parts[0] + 0.02 * parts[1]

    slope = jax.grad(loss)(tiny.weights)
    shares = {("dense", "kernel"): 1, ("bn2", "scale"): 1, ("conv1", "kernel"): 0.2,
              ("conv2", "kernel"): 0.1}
    for (layer, name), share in shares.items():
        moved = np.asarray(found.weights[layer][name] - tiny.weights[layer][name])
        wanted = np.asarray(slope[layer][name])
        sure = np.abs(wanted) > 1e-5
        assert sure.any()
        np.testing.assert_allclose(moved[sure], -5e-4 * share * np.sign(wanted[sure]),
                                   rtol=0.05, atol=1e-7)


def test_it_gives_back_what_masks_took(tiny, small_batch, case):
    _, state, run = case
    target = jax.nn.softmax(models.apply(tiny, small_batch.images))

    def off(state):
        network = awm_steps.network(tiny, state)
        logits = models.apply(network, small_batch.images)
        return float(losses.soft_cross_entropy(logits, target))

    assert off(run(jax.random.key(0), state)) < off(state)


def test_purify_repairs_last_and_rows_do_as_it_does(tiny, small_batch):
    config = AWMConfig(repair=1, **QUICK)
    plain = awm_jax.purify(tiny, small_batch, config=AWMConfig(**QUICK))
    out = awm_jax.purify(tiny, small_batch, config=config)
    np.testing.assert_allclose(_numbers(out.masks), _numbers(plain.masks), atol=1e-6)
    changed = np.abs(_numbers(out.params.weights["dense"]) - _numbers(tiny.weights["dense"])).max()
    assert bool(out.survey.small) and changed > 0
    ended = awm_jax.purify(tiny, small_batch, config=config, on_epochs=lambda *_: True)
    np.testing.assert_array_equal(_numbers(ended.params.weights), _numbers(tiny.weights))
    other = awm_jax.purify(tiny, small_batch, config=config, key=jax.random.key(1))
    stacked = rows.stack(DEFENCES["awm"], [tiny], [small_batch])
    both = [rows.Row(jax.random.key(i), 0, 0, config, str(i)) for i in (0, 1)]
    (group,) = awm_rows.purify(both, stacked, chunk=2)
    for found, alone in zip(group.found, (out, other), strict=True):
        np.testing.assert_allclose(_numbers(found.params.weights), _numbers(alone.params.weights),
                                   atol=1e-4)


def test_repair_wants_a_survey():
    for options in ({"variant": "paper"}, {"replay": 0.0}, {"variant": "official"}):
        with pytest.raises(ValueError, match="repair=3"):
            AWMConfig(repair=3, **options)
    with pytest.raises(ValueError, match="repair=-1"):
        AWMConfig(repair=-1)


@pytest.mark.parametrize("flip", [False, True])
def test_strong_images_lie_where_an_affine_map_puts_them(flip):
    """Against SciPy, whose matrices are rebuilt from the same draws."""
    images = np.random.default_rng(0).random((12, 9, 11, 2), np.float32)
    key = jax.random.key(2)
    out = np.asarray(augment._moved(key, jnp.asarray(images), flip))
    zoom, stretch, turn, down, right, side = np.asarray(
        jax.random.uniform(key, (6, 12), minval=-1.0), np.float64)
    zoom, stretch = np.exp(-0.375 + 0.625 * zoom), np.exp(0.25 * stretch)
    turn *= 0.5 if flip else 0.2
    middle, mirrored = np.array([4.0, 5.0]), 0
    for i, image in enumerate(images):
        sign = -1.0 if flip and side[i] < 0 else 1.0
        mirrored += sign < 0
        sin, cos = np.sin(turn[i]) * zoom[i], np.cos(turn[i]) * zoom[i]
        matrix = np.array([[cos / stretch[i], sin], [-sign * sin, sign * cos * stretch[i]]])
        cut = max(1 - zoom[i], 0) / 2
        centre = middle + np.array([down[i] * (cut * 9 + 4), right[i] * (cut * 11 + 4)])
        for c in range(2):
            wanted = scipy.ndimage.affine_transform(
                image[..., c].astype(np.float64), matrix, centre - matrix @ middle, order=1,
                mode="mirror")
            np.testing.assert_allclose(out[i, ..., c], wanted, atol=1e-4)
    assert (mirrored > 0) == flip


def test_strong_images_are_recoloured_within_bounds():
    images = jnp.full((64, 4, 4, 3), 0.75)
    out = np.asarray(augment.strong(jax.random.key(0), images, flip=True))
    assert out.min() >= 0 and out.max() <= 1 and (out.std(axis=(1, 2)) < 1e-6).all()
    furthest = 0.25 * (0.24 + 0.16) + 0.15 + 0.06
    off = np.abs(out - 0.75)
    assert off.max() <= furthest + 1e-6 and off.max() > furthest / 2
    apart = out[:, 0, 0].max(axis=1) - out[:, 0, 0].min(axis=1)
    assert 0 < apart.max() <= 0.25 * 0.32 + 0.12 + 1e-6
    np.testing.assert_array_equal(out, augment.strong(jax.random.key(0), images, flip=True))
