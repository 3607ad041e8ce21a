"""FT-SAM: the perturbation by hand, whole runs against PyTorch, BatchNorm of the first pass."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from linear_network import linear_case

from awm_jax.defences import tuning
from awm_jax.defences.ft_sam import (
    FTSAMConfig,
    _method,
    perturbation,
    sharpness_aware,
)


@pytest.fixture
def linear(x64, monkeypatch):
    """A linear network in float64 with seven images."""
    return linear_case(monkeypatch)


def test_perturbation_by_hand():
    """|w| g = (3, -4) over both leaves, of norm 5; times |w| again, times rho / 5."""
    weights = {"a": jnp.array([-2.0]), "b": jnp.array([[1.0]])}
    gradients = {"a": jnp.array([1.5]), "b": jnp.array([[-4.0]])}
    found = perturbation(weights, gradients, rho=10.0, adaptive=True)
    np.testing.assert_allclose(found["a"], [12.0], rtol=1e-6)
    np.testing.assert_allclose(found["b"], [[-8.0]], rtol=1e-6)
    flat = perturbation(weights, {"a": jnp.array([3.0]), "b": jnp.array([[-4.0]])}, rho=0.5,
                        adaptive=False)
    np.testing.assert_allclose([flat["a"][0], flat["b"][0, 0]], [0.3, -0.4], rtol=1e-6)


@pytest.mark.parametrize("adaptive", [True, False])
def test_a_zero_gradient_moves_nothing(adaptive):
    zeros = {"a": jnp.zeros(3)}
    found = perturbation({"a": jnp.arange(3.0)}, zeros, rho=2.0, adaptive=adaptive)
    assert (found["a"] == 0).all()


@pytest.mark.parametrize("adaptive", [True, False])
def test_no_other_step_of_that_length_climbs_more(x64, adaptive):
    rng = np.random.default_rng(0)
    w, g = rng.normal(size=20), rng.normal(size=20)
    scale = np.abs(w) if adaptive else np.ones(20)
    found = np.asarray(perturbation(jnp.asarray(w), jnp.asarray(g), rho=3.0, adaptive=adaptive))
    assert np.isclose(np.linalg.norm(found / scale), 3.0)
    others = rng.normal(size=(1000, 20))
    others *= 3.0 / np.linalg.norm(others, axis=1, keepdims=True)
    assert ((others * scale) @ g).max() < found @ g


def _torch_run(params, images, labels, config):
    """Two backward passes a step, written with PyTorch's autograd and SGD."""
    torch = pytest.importorskip("torch")
    x = torch.tensor(np.asarray(images)).reshape(len(images), -1)
    y = torch.tensor(np.asarray(labels))
    w = [torch.tensor(np.asarray(params.weights["dense"][name]), requires_grad=True)
         for name in ("kernel", "bias")]
    rule = torch.optim.SGD(w, config.lr, config.momentum, weight_decay=config.weight_decay)

    def loss():
        return torch.nn.functional.cross_entropy(x @ w[0] + w[1], y,
                                                 label_smoothing=config.label_smoothing)

    values = []
    for step in range(config.epochs):
        for group in rule.param_groups:
            group["lr"] = config.lr * (1 + np.cos(np.pi * step / config.epochs)) / 2
        rule.zero_grad()
        value = loss()
        value.backward()
        values.append(value.item())
        with torch.no_grad():
            scales = [p.abs() if config.adaptive else torch.ones_like(p) for p in w]
            flat = torch.cat([(s * p.grad).ravel() for s, p in zip(scales, w, strict=True)])
            moves = [config.radius * s**2 * p.grad / flat.norm()
                     for s, p in zip(scales, w, strict=True)]
            for p, move in zip(w, moves, strict=True):
                p += move
        rule.zero_grad()
        loss().backward()
        with torch.no_grad():
            for p, move in zip(w, moves, strict=True):
                p -= move
        rule.step()
    return [p.detach().numpy() for p in w], values


@pytest.mark.parametrize("settings", [
    {"rho": 1.5}, {"adaptive": False}, {"rho": 0.7, "label_smoothing": 0.1}])
def test_whole_runs_are_pytorchs(linear, settings):
    params, images, labels = linear
    config = FTSAMConfig(epochs=5, lr=0.1, weight_decay=0.01, crop=0, **settings)
    tuned, info = _method(jax.random.key(0), params, images, labels, config)
    (kernel, bias), values = _torch_run(params, images, labels, config)
    np.testing.assert_allclose(info["loss"], values, rtol=1e-10)
    np.testing.assert_allclose(tuned.weights["dense"]["kernel"], kernel, rtol=1e-9, atol=1e-11)
    np.testing.assert_allclose(tuned.weights["dense"]["bias"], bias, rtol=1e-9, atol=1e-11)


def test_statistics_of_the_first_pass_gradient_of_the_second(tiny64, tiny_batch):
    """The gradient is checked by finite differences of the loss around w + eps."""
    images, labels = jnp.asarray(tiny_batch.images, jnp.float64), jnp.asarray(tiny_batch.labels)
    key = jax.random.key(5)
    gradient = sharpness_aware(tuning.cross_entropy, rho=2.0, adaptive=True)
    found, batch_stats, value = jax.jit(gradient)(key, tiny64, images, labels)
    at = jax.jit(tuning.plain(tuning.cross_entropy))
    plain, plain_stats, plain_value = at(key, tiny64, images, labels)
    assert np.isclose(value, plain_value, rtol=1e-12)
    for one, other in zip(jax.tree.leaves(batch_stats), jax.tree.leaves(plain_stats), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-12)

    squares = sum(float((np.abs(w) * g * np.abs(w) * g).sum()) for w, g in zip(
        jax.tree.leaves(tiny64.weights), jax.tree.leaves(plain), strict=True))
    there = jax.tree.map(lambda w, g: w + 2.0 * w**2 * g / np.sqrt(squares), tiny64.weights, plain)

    def loss(weights):
        return at(key, dataclasses.replace(tiny64, weights=weights), images, labels)[2]

    rng = np.random.default_rng(2)
    for _ in range(3):
        way = jax.tree.map(lambda w: jnp.asarray(rng.normal(size=w.shape)), tiny64.weights)
        ahead, back = (loss(jax.tree.map(lambda w, d: w + s * d, there, way))  # noqa: B023
                       for s in (1e-6, -1e-6))
        along = sum(float((g * d).sum()) for g, d in zip(
            jax.tree.leaves(found), jax.tree.leaves(way), strict=True))
        assert np.isclose((ahead - back) / 2e-6, along, rtol=1e-5, atol=1e-7)


def test_settings():
    assert (FTSAMConfig().radius, FTSAMConfig(adaptive=False).radius) == (2.0, 0.5)
    assert FTSAMConfig(adaptive=False, rho=8.0).radius == 8.0
    for wrong in ({"rho": 0.0}, {"rho": -1.0}, {"label_smoothing": 1.5}, {"epochs": 0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            FTSAMConfig(**wrong)
