"""The two ways under the L1 bound."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from awm_jax import projections


def _bisected(delta, tau):
    """Independent reference: the threshold by bisection."""
    low, high = 0.0, np.abs(delta).max()
    for _ in range(200):
        mid = (low + high) / 2
        if np.maximum(np.abs(delta) - mid, 0).sum() > tau:
            low = mid
        else:
            high = mid
    return np.sign(delta) * np.maximum(np.abs(delta) - high, 0)


@pytest.mark.parametrize("tau, expected", [
    (2.0, [2.0, 0.0, 0.0]), (4.0, [3.5, -0.5, 0.0]), (6.0, [13 / 3, -4 / 3, 1 / 3]),
    (9.0, [5.0, -2.0, 1.0]),
])
def test_l1_ball_by_hand(tau, expected):
    out = projections.l1_ball(jnp.array([5.0, -2.0, 1.0]), tau)
    np.testing.assert_allclose(out, expected, rtol=1e-6)


@pytest.mark.parametrize("seed", range(5))
def test_l1_ball_agrees_with_bisection(x64, seed):
    delta = np.random.default_rng(seed).normal(size=(4, 4, 3))
    np.testing.assert_allclose(projections.l1_ball(jnp.asarray(delta), 3.0), _bisected(delta, 3.0),
                               rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("project", [projections.l1_ball, projections.scale_to_l1])
@pytest.mark.parametrize("scale", [0.0, 1e-6, 1.0, 1e6])
def test_bound_holds_and_inside_is_untouched(project, scale):
    delta = scale * jax.random.normal(jax.random.key(1), (8, 8, 3))
    out = project(delta, 5.0)
    assert bool(jnp.isfinite(out).all())
    assert float(projections.l1_norm(out)) <= 5.0 * (1 + 1e-5)
    if float(projections.l1_norm(delta)) <= 5.0:
        np.testing.assert_array_equal(out, delta)


def test_scaling_keeps_the_direction():
    delta = jnp.array([3.0, -1.0])
    np.testing.assert_allclose(projections.scale_to_l1(delta, 2.0), [1.5, -0.5])
    np.testing.assert_array_equal(projections.scale_to_l1(delta, 4.0), delta)


def test_gradient_at_zero_is_finite():
    grad = jax.grad(lambda d: projections.scale_to_l1(d, 1.0).sum())(jnp.zeros(3))
    assert bool(jnp.isfinite(grad).all())
