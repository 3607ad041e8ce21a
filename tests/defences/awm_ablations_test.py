"""The objectives of the AWM paper's appendix D."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from awm_jax import losses, models, projections
from awm_jax.defences import AWMConfig, awm_steps

SHAPE = (8, 8, 3)


def _settings(**chosen):
    return AWMConfig(epochs=1, inner_steps=1, batch_size=6, **chosen).resolve(6, SHAPE)


def _problem(params, batch, settings):
    images, labels = jnp.asarray(batch.images), jnp.asarray(batch.labels)
    images = images.astype(jax.tree.leaves(params.weights)[0].dtype)
    return awm_steps._problem(params, images, labels, labels, awm_steps.init(params, settings),
                              settings)


@pytest.mark.parametrize("variant, changed", [
    ("no_clip", {"bound": "none"}), ("no_shrink", {"gamma": 0.0}),
    ("nc_ns", {"bound": "none", "gamma": 0.0}), ("l2_reg", {"bound": "l2", "taus": (250.0,)}),
    ("l2_reg_nc", {"bound": "none", "l2_weight": 1.0})])
def test_what_a_variant_changes_in_the_papers_settings(variant, changed):
    """8x8 images: a sixteenth of the pixels, a quarter of the L2 bound."""
    paper = dataclasses.asdict(_settings(variant="paper"))
    assert paper["bound"] == "l1" and paper["taus"] == (62.5,) and paper["l2_weight"] == 0
    found = dataclasses.asdict(_settings(variant=variant))
    assert {k: v for k, v in found.items() if v != paper[k]} == changed


def test_the_penalised_step_follows_the_slope_of_loss_plus_norm(tiny64, tiny_batch):
    settings = _settings(variant="l2_reg_nc", inner_lr=0.5)
    rng = np.random.default_rng(0)
    delta, along = (jnp.asarray(0.05 * rng.normal(size=SHAPE)) for _ in range(2))
    masks = awm_steps.masking.init(tiny64.weights)
    problem = _problem(tiny64, tiny_batch, settings)
    images, labels = jnp.asarray(tiny_batch.images, jnp.float64), jnp.asarray(tiny_batch.labels)

    def objective(d):
        return losses.cross_entropy(models.apply(tiny64, images + d[None]), labels) + jnp.sqrt(
            (d**2).sum())

    ahead, _ = problem.ascend(jax.random.key(0), jnp.array(0), (delta, None), (masks, None))
    moved = ahead - delta
    slope = (objective(delta + 1e-6 * along) - objective(delta - 1e-6 * along)) / 2e-6
    np.testing.assert_allclose((moved * along).sum(), 0.5 * slope, rtol=1e-5)


def test_the_first_penalised_step_starts_at_zero_and_stays_finite(tiny, tiny_batch):
    problem = _problem(tiny, tiny_batch, _settings(variant="l2_reg_nc"))
    masks = awm_steps.masking.init(tiny.weights)
    moved, _ = problem.ascend(jax.random.key(0), jnp.array(0), (jnp.zeros(SHAPE), None),
                              (masks, None))
    assert bool(jnp.isfinite(moved).all()) and float(jnp.abs(moved).max()) > 0


@pytest.mark.parametrize("variant, norm, expected", [
    ("paper", 1, 62.5), ("l2_reg", 2, 250.0), ("no_clip", 1, 192000.0)])
def test_the_bound_of_a_large_trigger(tiny, tiny_batch, variant, norm, expected):
    settled, _ = _problem(tiny, tiny_batch, _settings(variant=variant)).settle(
        jnp.array(0), (jnp.full(SHAPE, 1000.0), None))
    np.testing.assert_allclose(np.linalg.norm(np.ravel(settled), norm), expected, rtol=1e-6)


def test_l2_projection_is_the_nearest_point():
    """Against a fine search along the segment to the origin, and inside the ball."""
    delta = jnp.array([3.0, -4.0, 12.0])
    found = projections.scale_to_l2(delta, 6.5)
    steps = np.linspace(0, 1, 10001)[:, None] * np.asarray(delta)
    inside = steps[np.linalg.norm(steps, axis=1) <= 6.5]
    np.testing.assert_allclose(found, inside[-1], atol=1e-3)
    assert (projections.scale_to_l2(delta, 14.0) == delta).all()
    assert (projections.scale_to_l2(jnp.zeros(3), 1.0) == 0).all()


def test_bad_weight_is_refused():
    with pytest.raises(ValueError, match="l2_weight=inf"):
        AWMConfig(l2_weight=float("inf"))
