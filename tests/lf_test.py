"""LF: the filter, the range, and where the energy is."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import fft, ndimage

from awm_jax import attacks
from awm_jax.attacks.lf import low_pass, smooth

SHAPE = (32, 32, 3)
KEY = jax.random.key(0)


def _colours(params, images):
    """Ten logits, each its own mix of what three colours sum to in the left and right half."""
    return jnp.concatenate([half.mean(axis=(1, 2)) for half in jnp.split(images, 2, axis=2)],
                           axis=1) @ params


def _found(seed=0, shape=SHAPE):
    """The attack on a network of known logits, that network, and its images."""
    params = jax.random.normal(jax.random.key(1), (6, 10))
    images = jnp.full((2, *shape), 0.3)
    return attacks.make("lf", jax.random.key(seed), shape, 10, params=params, images=images,
                        apply_fn=_colours), params, images


@pytest.mark.parametrize("height, width", [(32, 32), (8, 20)])
def test_the_filter_is_scipys(height, width):
    pattern = np.random.default_rng(0).normal(size=(height, width, 2)).astype(np.float32)
    sigma = (height * 6 / 32, width * 6 / 32)
    expected = ndimage.gaussian_filter(pattern.astype(np.float64), sigma, axes=(0, 1),
                                       mode="reflect", truncate=8)
    # SciPy samples the Gaussian, ours is exact in the cosines: they part where it is narrow.
    np.testing.assert_allclose(low_pass(jnp.asarray(pattern)), expected,
                               atol=1e-5 if height == 32 else 2e-3)


def test_the_filter_by_hand():
    """A cosine of k half periods comes back exp(-(pi k 6/32)^2 / 2) times as high."""
    for k, factor in ((0, 1.0), (1, 0.8407), (2, 0.4995), (4, 0.0622)):
        wave = np.cos(np.pi * k * (np.arange(32) + 0.5) / 32).astype(np.float32)
        out = np.asarray(low_pass(jnp.asarray(wave).reshape(1, 32, 1))).ravel()
        np.testing.assert_allclose(out, factor * wave, atol=1e-4)


@pytest.mark.parametrize("found", [False, True])
@pytest.mark.parametrize("shape", [SHAPE, (40, 64, 3)])
def test_smooth_and_in_range(found, shape):
    attack = _found(shape=shape)[0] if found else attacks.make("lf", KEY, shape, 10)
    pattern = np.asarray(attack.trigger.pattern, np.float64)
    assert pattern.shape == shape and not np.asarray(attack.trigger.mask).any()
    assert pattern.min() == 0 and pattern.max() == pytest.approx(0.2, rel=1e-6)
    k = np.indices(shape[:2])
    high = (k[0] >= shape[0] / 4) | (k[1] >= shape[1] / 4)

    def share(picture):
        energy = fft.dctn(picture - picture.mean(axis=(0, 1)), axes=(0, 1), norm="ortho") ** 2
        return energy[high].sum() / energy.sum()

    assert share(pattern) < 1e-6
    assert share(np.random.default_rng(0).random(shape)) > 0.9


def test_what_is_found_excites_the_target_more_than_noise():
    found, params, images = _found()
    start = attacks.make("lf", KEY, SHAPE, 10)

    def advantage(dirty):
        logits = _colours(params, dirty)
        return float((logits[:, 0] - logits.mean(axis=1)).mean())

    gained = advantage(found.apply(images)) - advantage(images)
    assert gained > advantage(start.apply(images)) - advantage(images)
    # The most that any pattern gains: in each half .2 of the colours that help, none of the others.
    most = 0.2 * np.asarray(params[:, 0] - params.mean(axis=1)).clip(0).sum()
    assert 0.5 * most < gained < most


def test_the_key_decides():
    one, same, other = (attacks.make("lf", jax.random.key(s), SHAPE, 10).trigger for s in (1, 1, 2))
    np.testing.assert_array_equal(one.pattern, same.pattern)
    assert not np.array_equal(one.pattern, other.pattern)
    np.testing.assert_array_equal(_found(1)[0].trigger.pattern, _found(1)[0].trigger.pattern)


def test_eager_is_compiled():
    pattern = jax.random.normal(KEY, SHAPE)
    np.testing.assert_allclose(jax.jit(smooth)(pattern), smooth(pattern), atol=1e-6)
    assert not np.asarray(smooth(jnp.ones(SHAPE) * 0)).any()  # nothing to stretch
