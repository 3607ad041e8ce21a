"""Mode connectivity: the curve by hand and by de Casteljau, its loss, BatchNorm's statistics."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from linear_network import linear_case

from awm_jax import models
from awm_jax.defences import tuning
from awm_jax.defences.mcr import (
    MCRConfig,
    _method,
    batch_statistics,
    curve,
    curve_loss,
)
from awm_jax.types import Params


def test_curve_by_hand():
    """At .3: .49 of the start, .42 of the middle, .09 of the end."""
    points = [{"a": jnp.array([v])} for v in (100.0, 10.0, 1.0)]
    np.testing.assert_allclose(curve(*points, 0.3)["a"], [49 + 4.2 + 0.09], rtol=1e-6)
    assert curve(*points, 0.0)["a"] == 100.0 and curve(*points, 1.0)["a"] == 1.0


def test_curve_is_de_casteljaus(x64):
    """Two linear interpolations, then one between them."""
    rng = np.random.default_rng(0)
    w0, theta, w1 = rng.normal(size=(3, 5))
    for t in rng.random(4):
        left, right = w0 + t * (theta - w0), theta + t * (w1 - theta)
        found = curve(*map(jnp.asarray, (w0, theta, w1)), t)
        np.testing.assert_allclose(found, left + t * (right - left), rtol=1e-12)


def test_loss_of_the_middle(tiny64, tiny_batch):
    """2t(1-t) (grad L(w) + decay w) at the point of the curve that the key names."""
    images, labels = jnp.asarray(tiny_batch.images, jnp.float64), jnp.asarray(tiny_batch.labels)
    rng = np.random.default_rng(1)
    end, middle = (jax.tree.map(lambda w: w + 0.1 * rng.normal(size=w.shape), tiny64.weights)
                   for _ in range(2))
    key = jax.random.key(7)
    loss = curve_loss(tiny64.weights, end, 0.01)
    found, _, value = jax.jit(tuning.plain(loss))(
        key, dataclasses.replace(tiny64, weights=middle), images, labels)
    key_t, key_dropout = jax.random.split(key)
    t = float(jax.random.uniform(key_t))
    assert 0.02 < t < 0.98
    point = jax.tree.map(lambda a, b, c: (1 - t) ** 2 * a + 2 * t * (1 - t) * b + t * t * c,
                         tiny64.weights, middle, end)
    plain, _, ce = jax.jit(tuning.plain(tuning.cross_entropy))(
        key_dropout, dataclasses.replace(tiny64, weights=point), images, labels)
    squares = sum(float((w**2).sum()) for w in jax.tree.leaves(point))
    assert np.isclose(value, ce + 0.005 * squares, rtol=1e-10)
    for one, g, w in zip(*map(jax.tree.leaves, (found, plain, point)), strict=True):
        np.testing.assert_allclose(one, 2 * t * (1 - t) * (g + 0.01 * w), rtol=1e-7, atol=1e-12)


def _conv1(params, images):
    """The first convolution in NumPy."""
    x = np.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)))
    kernel = np.asarray(params.weights["conv1"]["kernel"])
    out = sum(x[:, i:i + 8, j:j + 8] @ kernel[i, j] for i in range(3) for j in range(3))
    return out + np.asarray(params.weights["conv1"]["bias"])


def test_statistics_of_a_batch_in_numpy(tiny64, tiny_batch):
    images = jnp.asarray(tiny_batch.images, jnp.float64)
    found = batch_statistics(jax.random.key(0), tiny64, images, batch_size=6)
    out = _conv1(tiny64, tiny_batch.images)
    np.testing.assert_allclose(found["bn1"]["mean"], out.mean(axis=(0, 1, 2)), rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(found["bn1"]["var"], out.var(axis=(0, 1, 2)), rtol=1e-6)


def test_statistics_of_batches_are_averaged(tiny64, tiny_batch):
    """Each image once; the variance is the mean of those within the batches."""
    images, key = jnp.asarray(tiny_batch.images, jnp.float64), jax.random.key(4)
    found = batch_statistics(key, tiny64, images, batch_size=2)
    order = np.asarray(tuning.minibatches(jax.random.split(key)[0], 6, 2, 1))
    assert sorted(order.ravel()) == list(range(6))
    outs = [_conv1(tiny64, tiny_batch.images[picks]) for picks in order]
    np.testing.assert_allclose(found["bn1"]["mean"], np.mean(
        [out.mean(axis=(0, 1, 2)) for out in outs], axis=0), rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(found["bn1"]["var"], np.mean(
        [out.var(axis=(0, 1, 2)) for out in outs], axis=0), rtol=1e-6)


def test_evaluation_with_them_is_training_on_that_batch(tiny64, tiny_batch):
    """Every block, so every BatchNorm layer."""
    images = jnp.asarray(tiny_batch.images, jnp.float64)
    stats = batch_statistics(jax.random.key(0), tiny64, images, batch_size=6)
    fitted = dataclasses.replace(tiny64, batch_stats=stats)
    evaluated = models.activations(fitted, images)[1]
    trained = models.activations(tiny64, images, key=jax.random.key(1))[1]
    for name in ("block1", "block2"):
        np.testing.assert_allclose(evaluated[name], trained[name], rtol=1e-6, atol=1e-8)


class _Foreign(nn.Module):
    """Somebody else's, whose BatchNorm layers keep other shares of their old statistics."""

    kept: float

    @nn.compact
    def __call__(self, x, train: bool = False):
        for kept in (self.kept, 0.5):
            x = nn.Conv(5, (3, 3))(x)
            x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=kept)(x))
        return nn.Dense(3)(x.mean((1, 2)))


def test_a_layer_that_is_never_in_training_keeps_its_statistics(tiny_batch):
    class Frozen(nn.Module):
        @nn.compact
        def __call__(self, x, train: bool = False):
            x = nn.BatchNorm(use_running_average=True)(nn.Conv(5, (3, 3))(x))
            x = nn.BatchNorm(use_running_average=not train)(nn.Conv(5, (3, 3))(x))
            return nn.Dense(3)(x.mean((1, 2)))

    images = jnp.asarray(tiny_batch.images)
    params = Params.from_flax(Frozen(), Frozen().init(jax.random.key(0), images),
                              image_shape=images.shape[1:])
    stats = batch_statistics(jax.random.key(1), params, images, batch_size=len(images))
    np.testing.assert_array_equal(stats["BatchNorm_0"]["mean"], np.zeros(5))
    np.testing.assert_array_equal(stats["BatchNorm_0"]["var"], np.ones(5))
    assert np.isfinite(stats["BatchNorm_1"]["var"]).all()
    assert np.abs(stats["BatchNorm_1"]["mean"]).max() > 0


@pytest.mark.parametrize("kept", [0.0, 0.9, 0.99])
def test_how_much_a_layer_keeps_is_its_own(kept, tiny_batch):
    """Mean and variance of what the first convolution puts out, taken without the library."""
    images = jnp.asarray(tiny_batch.images)
    net = _Foreign(kept)
    params = Params.from_flax(net, net.init(jax.random.key(0), images),
                              image_shape=images.shape[1:])
    stats = batch_statistics(jax.random.key(1), params, images, batch_size=len(images))
    out = np.asarray(nn.Conv(5, (3, 3)).apply({"params": params.weights["Conv_0"]}, images))
    np.testing.assert_allclose(stats["BatchNorm_0"]["mean"], out.mean((0, 1, 2)), atol=1e-5)
    np.testing.assert_allclose(stats["BatchNorm_0"]["var"], out.var((0, 1, 2)), rtol=1e-3)
    fitted = dataclasses.replace(params, batch_stats=stats)
    trained, _ = models.apply_train(params, images, key=jax.random.key(2))
    np.testing.assert_allclose(models.apply(fitted, images), trained, atol=1e-3)


@pytest.mark.parametrize("t", [0.0, 1.0])
def test_the_ends_of_the_curve(x64, monkeypatch, t):
    """At 0 the suspect weights, at 1 plain fine-tuning."""
    params, images, labels = linear_case(monkeypatch)
    key = jax.random.key(3)
    config = MCRConfig(epochs=2, end_epochs=3, batch_size=4, crop=0, t=t)
    found, info = _method(key, params, images, labels, config)
    assert info["loss"].shape == (4,) and info["end_loss"].shape == (6,)
    expected = params
    if t == 1.0:
        tune = tuning.TuneConfig(epochs=3, batch_size=4, crop=0)
        expected, _ = tuning.descend(jax.random.split(key, 3)[0], params, images, labels, tune)
        assert (expected.weights["dense"]["kernel"] != params.weights["dense"]["kernel"]).all()
    for one, other in zip(*map(jax.tree.leaves, (found.weights, expected.weights)), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-9)


def test_training_lowers_the_loss_along_the_curve(x64, monkeypatch):
    """Of the linear network, whose loss on the curve is a known function of its middle."""
    params, images, labels = linear_case(monkeypatch)
    config = MCRConfig(epochs=200, end_epochs=5, crop=0, lr=0.1, weight_decay=0.0, t=0.5)
    key = jax.random.key(2)
    found, info = _method(key, params, images, labels, config)
    end, _ = tuning.descend(jax.random.split(key, 3)[0], params, images, labels,
                            dataclasses.replace(config, epochs=5))
    mean = jax.tree.map(lambda a, b: (a + b) / 2, params.weights, end.weights)
    straight = dataclasses.replace(params, weights=mean)
    before, after = (tuning.cross_entropy(key, p, images, labels)[0] for p in (straight, found))
    assert after < 0.5 * before
    assert info["loss"][-20:].mean() < info["loss"][:20].mean()


def test_settings():
    for wrong in ({"t": -0.1}, {"t": 1.1}, {"end_epochs": 0}, {"momentum": 2.0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            MCRConfig(**wrong)
