"""WaNet's warp against PyTorch's grid_sample and upsampling, and by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from awm_jax import attacks, warps
from awm_jax.attacks.wanet import Warp, identity, sample, warping_grid

KEY = jax.random.key(0)


def test_half_a_pixel_by_hand():
    image = jnp.array([[0.0, 1.0], [2.0, 5.0]]).reshape(1, 2, 2, 1)
    grid = jnp.array([[[0.0, 0.0], [-1.0, 0.0]], [[1.0, 1.0], [3.0, -1.0]]])  # x, y
    out = sample(image, grid[None])
    # The middle of all four; the middle of the left edge; the lower right; beyond the upper right.
    assert out.ravel().tolist() == [2.0, 1.0, 5.0, 1.0]


def test_the_identity_changes_nothing():
    images = jax.random.uniform(KEY, (2, 5, 7, 3))
    grid = jnp.broadcast_to(identity(5, 7), (2, 5, 7, 2))
    np.testing.assert_allclose(sample(images, grid), images, atol=1e-6)


@pytest.mark.parametrize("shape", [(2, 32, 32, 3), (1, 9, 17, 1)])
def test_sampling_is_pytorchs(shape):
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    images, grid = rng.random(shape), rng.uniform(-1.3, 1.3, (*shape[:3], 2))
    theirs = torch.nn.functional.grid_sample(
        torch.tensor(images).permute(0, 3, 1, 2), torch.tensor(grid), mode="bilinear",
        padding_mode="border", align_corners=True).permute(0, 2, 3, 1)
    with jax.enable_x64(True):
        ours = sample(jnp.asarray(images), jnp.asarray(grid))
    np.testing.assert_allclose(ours, theirs.numpy(), atol=1e-12)


@pytest.mark.parametrize("height, width, knots", [(32, 32, 4), (17, 40, 3), (8, 8, 2)])
def test_the_field_is_pytorchs_bicubic_upsampling(height, width, knots):
    torch = pytest.importorskip("torch")
    noise = np.random.default_rng(1).uniform(-1, 1, (knots, knots))
    theirs = torch.nn.functional.interpolate(
        torch.tensor(noise)[None, None], size=(height, width), mode="bicubic",
        align_corners=True)[0, 0].numpy()
    ours = warps.cubic(knots, height) @ noise @ warps.cubic(knots, width).T
    np.testing.assert_allclose(ours, theirs, atol=1e-12)


@pytest.mark.parametrize("height, width", [(32, 32), (32, 64), (64, 16)])
def test_the_warp_is_its_formula(height, width):
    key, strength = jax.random.key(3), 0.5
    grid = np.asarray(warping_grid(key, height, width))
    noise = np.asarray(jax.random.uniform(key, (4, 4, 2), minval=-1.0, maxval=1.0), np.float64)
    noise /= np.abs(noise).mean()
    down, across = warps.cubic(4, height), warps.cubic(4, width)
    field = np.stack([down @ noise[..., c] @ across.T / (width, height)[c] for c in (0, 1)],
                     axis=-1)
    still = np.asarray(identity(height, width))
    np.testing.assert_allclose(grid, np.clip(still + strength * field, -1, 1), atol=1e-6)
    assert np.abs(grid).max() <= 1
    # A pixel is 2 / (W - 1), 2 / (H - 1) of the grid's units: as far across as down.
    moved = np.abs(grid - still) * (np.array([width, height]) - 1) / 2
    assert (moved.mean((0, 1)) > 0.05).all() and moved.max() < 1


def test_random_warps_jitter_within_their_bound():
    grid = warping_grid(KEY, 16, 16)
    ramp = jnp.tile(jnp.linspace(0, 1, 16)[None, None, :, None], (3, 16, 1, 1))
    plain, jittered = Warp(grid)(ramp), Warp(grid).cover(jax.random.key(1), ramp)
    # The ramp rises by 1/15 a pixel, the jitter is at most 1/16 of 15/2 pixels.
    assert float(jnp.abs(jittered - plain).max()) <= 1 / 15 * 15 / 32 + 1e-6
    assert not np.allclose(jittered[0], jittered[1])
    np.testing.assert_array_equal(jittered, Warp(grid).cover(jax.random.key(1), ramp))


def test_other_sizes_are_refused_and_jit_is_eager():
    attack = attacks.make("wanet", KEY, (8, 8, 3), 10)
    images = jax.random.uniform(KEY, (2, 8, 8, 3))
    np.testing.assert_allclose(attack.apply(images), attack.trigger(images), atol=1e-6)
    with pytest.raises(ValueError, match="8x8"):
        attack.trigger(images[:, :4])
    one, same, other = (attacks.make("wanet_a2a", jax.random.key(k), (8, 8, 3), 10).trigger.grid
                        for k in (1, 1, 2))
    np.testing.assert_array_equal(one, same)
    assert not np.array_equal(one, other)


@pytest.mark.parametrize("height, width", [(32, 32), (32, 64), (64, 16)])
def test_the_jitter_is_up_to_half_a_pixel_across_and_down(height, width):
    """Images whose channels are the pixel's own place, so that a warp shows where it looked."""
    still = identity(height, width)
    moved = Warp(still).cover(KEY, jnp.broadcast_to(still, (3, height, width, 2)))
    half = (np.array([width, height]) - 1) / 2
    pixels = np.abs((np.asarray(moved) - np.asarray(still)) * half).max((0, 1, 2))
    assert (pixels < 0.5).all() and (pixels > 0.4).all()
