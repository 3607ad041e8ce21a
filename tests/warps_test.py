"""Warps by hand, against WaNet's sampling, and by their slope."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from awm_jax import warps
from awm_jax.attacks.wanet import identity, sample, warping_grid

KEY = jax.random.key(0)


def test_a_quarter_pixel_down_by_hand():
    image = jnp.array([[0.0, 1.0], [4.0, 9.0]]).reshape(1, 2, 2, 1)
    down = jnp.zeros((2, 2, 2)).at[..., 1].set(0.25)
    assert warps.bend(image, down).ravel().tolist() == [1.0, 3.0, 4.0, 9.0]  # the border repeats
    both = jnp.full((2, 2, 2), -0.5)  # up and to the left, into the border
    assert warps.bend(image, both).ravel().tolist() == [0.0, 0.5, 2.0, 3.5]


def test_no_warp_changes_no_bit():
    images = jax.random.uniform(KEY, (3, 9, 7, 3))
    np.testing.assert_array_equal(warps.bend(images, jnp.zeros((6, 6, 2))), images)
    np.testing.assert_array_equal(jax.jit(warps.bend)(images, jnp.zeros((3, 6, 6, 2))), images)


@pytest.mark.parametrize("height, width, knots", [(32, 32, 6), (9, 17, 3), (64, 48, 4)])
def test_bending_is_sampling_at_the_field(x64, height, width, knots):
    """`wanet.sample`, which gathers and is tested against PyTorch, at places up to a pixel away."""
    keys = jax.random.split(KEY, 2)
    images = jax.random.uniform(keys[0], (2, height, width, 3), jnp.float64)
    warp = jax.random.uniform(keys[1], (2, knots, knots, 2), jnp.float64, -1.2, 1.2)
    flow = warps.field(warp, height, width)
    assert float(jnp.abs(flow).max()) <= 1
    grid = np.asarray(identity(height, width)) + 2 * np.asarray(flow) / [width - 1, height - 1]
    np.testing.assert_allclose(warps.bend(images, warp), sample(images, jnp.asarray(grid)),
                               atol=1e-6)
    for i in range(2):  # one an image is as one alone
        np.testing.assert_allclose(warps.bend(images, warp)[i],
                                   warps.bend(images[i : i + 1], warp[i])[0], atol=1e-12)


def test_its_slope_is_that_of_finite_differences(x64):
    rng = np.random.default_rng(0)
    images, weight = rng.random((2, 8, 8, 3)), rng.normal(size=(2, 8, 8, 3))
    warp, along = rng.uniform(-0.4, 0.4, (6, 6, 2)), rng.normal(size=(6, 6, 2))

    def value(warp):
        return (warps.bend(jnp.asarray(images), warp) * weight).sum()

    slope = (value(warp + 1e-7 * along) - value(warp - 1e-7 * along)) / 2e-7
    np.testing.assert_allclose((jax.grad(value)(jnp.asarray(warp)) * along).sum(), slope, rtol=1e-5)
    # At rest, where looking right begins and looking left ends, it is the mean of both sides.
    rest = jax.grad(value)(jnp.zeros((6, 6, 2)))
    slope = (value(1e-7 * along) - value(-1e-7 * along)) / 2e-7
    np.testing.assert_allclose((rest * along).sum(), slope, rtol=1e-5)


def test_steps_stay_within_the_bound_and_reach_it():
    warp = jnp.zeros((2, 2, 2))
    gradient = warp.at[..., 0].set(3.0).at[..., 1].set(-0.1)
    for _ in range(7):
        warp = warps.ascend(warp, gradient, 0.5)
    np.testing.assert_allclose(warp, np.array([0.5, -0.5]) * np.ones((2, 2, 2)))
    np.testing.assert_array_equal(warps.ascend(warp, 0 * gradient, 0.5), warp)


@pytest.mark.parametrize("shape, words", [
    ((6, 5, 2), "6, 5, 2)"), ((1, 1, 2), "1, 1, 2)"), ((4, 4, 3), "4, 4, 3)"),
    ((3, 4, 4, 2), "got 3")])
def test_other_shapes_are_refused(shape, words):
    with pytest.raises(ValueError, match="Expected") as error:
        warps.bend(jnp.zeros((2, 8, 8, 3)), jnp.zeros(shape))
    assert words in str(error.value)


def test_wanets_own_warps_lie_within_the_bound():
    for seed in range(5):
        moved = warping_grid(jax.random.key(seed), 32, 32) - identity(32, 32)
        assert float(jnp.abs(moved).max()) * 31 / 2 < warps.BOUND
