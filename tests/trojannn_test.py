"""TrojanNN: which neurons, the descent against a loop in NumPy, and what a network makes of it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from awm_jax import attacks, models
from awm_jax.attacks.trojannn import connected, excite
from awm_jax.attacks.trojannn import corner as place

KEY = jax.random.key(0)


def _squashed(weight, images):
    """Features: tanh of weighted sums of all values."""
    return jnp.tanh(images.reshape(len(images), -1)) @ weight


def test_the_best_connected_are_found_by_hand(small_params):
    kernel = np.zeros((5, 3), np.float32)
    kernel[0], kernel[2], kernel[4] = (1, 1, 1), (-4, 0, 0), (3, -2, 1)  # sums 3, 4 and 6
    weights = {**small_params.weights, "dense": {"kernel": jnp.asarray(kernel)}}
    assert connected(dataclasses.replace(small_params, weights=weights)).tolist() == [4, 2]
    own = np.abs(np.asarray(small_params.weights["dense"]["kernel"])).sum(axis=1)
    assert connected(small_params).tolist() == np.argsort(-own)[:2].tolist()


def test_the_descent_is_a_loop_in_numpy(x64):
    rng = np.random.default_rng(0)
    weight, images = 60 * rng.normal(size=(27, 4)), rng.random((5, 3, 3, 3))
    start = rng.random((3, 3, 3))
    mask = np.zeros((3, 3, 1))
    mask[1:, 1:] = 1
    neurons = [3, 1]
    pattern, costs, tried = start * mask, [], []
    for _ in range(12):
        x = (images * (1 - mask) + pattern * mask).reshape(5, -1)
        gap = (np.tanh(x) @ weight)[:, neurons] - 100
        costs.append((gap**2).sum(1).mean())
        tried.append(pattern)
        slope = 2 * gap @ weight[:, neurons].T * (1 - np.tanh(x) ** 2)
        gradient = slope.mean(0).reshape(3, 3, 3) * mask
        move = 0.1 * np.sqrt(12) * gradient / np.sqrt((gradient**2).sum())
        pattern = np.clip(pattern - move, 0, 1)
    arguments = [jnp.asarray(v) for v in (weight, images, start, mask, neurons)]
    found, traced = excite(*arguments, steps=12, features_fn=_squashed)
    np.testing.assert_allclose(traced, costs, rtol=1e-10)
    np.testing.assert_allclose(found, tried[int(np.argmin(costs))], atol=1e-10)
    assert min(costs) < costs[0]
    with jax.disable_jit():
        eager, _ = excite(*arguments, steps=12, features_fn=_squashed)
    np.testing.assert_allclose(eager, found, atol=1e-10)


def test_a_network_is_excited_in_the_corner_alone(small_params):
    images = np.random.default_rng(0).random((2, 8, 8, 3), np.float32)
    start = attacks.make("trojannn", KEY, (8, 8, 3), 4)
    found = attacks.make("trojannn", KEY, (8, 8, 3), 4, params=small_params, images=images)
    features = jax.jit(models.features)
    neurons = connected(small_params)

    def cost(attack):
        return float(((features(small_params, attack.apply(images))[:, neurons] - 100) ** 2).sum())

    assert cost(found) < cost(start)
    for attack in (start, found):
        pattern, mask = (np.asarray(v) for v in attack.trigger)
        assert 0 <= pattern.min() and pattern.max() <= 1 and not (pattern * (1 - mask)).any()
        inside = np.asarray(attack.apply(images))[:, 5:7, 5:7]
        np.testing.assert_allclose(inside, np.broadcast_to(pattern[5:7, 5:7], inside.shape))
    np.testing.assert_array_equal(found.trigger.mask, start.trigger.mask)


@pytest.mark.parametrize("shape, pixels", [((8, 8, 1), 4), ((32, 32, 3), 64), ((28, 40, 3), 49)])
def test_the_square_is_in_the_corner_of_any_size(shape, pixels):
    mask = place(shape)
    rows, columns = np.nonzero(mask[..., 0])
    assert mask.sum() == pixels and mask.shape == (*shape[:2], 1)
    assert (rows.max(), columns.max()) == (shape[0] - 2, shape[1] - 2)
    one, same, other = (attacks.make("trojannn", jax.random.key(s), shape, 10) for s in (1, 1, 2))
    np.testing.assert_array_equal(one.trigger.pattern, same.trigger.pattern)
    assert not np.array_equal(one.trigger.pattern, other.trigger.pattern)


def test_what_does_not_go_together_is_refused(small_params):
    images = np.zeros((2, 8, 8, 3), np.float32)
    with pytest.raises(ValueError, match="8x8"):
        attacks.make("trojannn", KEY, (7, 8, 3), 4)
    with pytest.raises(ValueError, match="no params for a random"):
        attacks.make("trojannn", KEY, (8, 8, 3), 4, params=small_params)
    with pytest.raises(ValueError, match="num_classes=10 logits, got 4"):
        attacks.make("trojannn", KEY, (8, 8, 3), 10, params=small_params, images=images)
