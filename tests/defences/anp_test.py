"""Adversarial Neuron Pruning against PyTorch, with and without BatchNorm."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_networks import Reference, network

from awm_jax import models
from awm_jax.defences import anp, neurons
from awm_jax.defences.anp import ANPConfig, learn_masks, prediction_proportions

_proportions = jax.jit(prediction_proportions, static_argnames=("eps", "steps"))


@pytest.fixture
def fixed_start(monkeypatch):
    """Every perturbation starts from these numbers; returns them, shaped, for PyTorch."""
    def make(params):
        factors = neurons.ones(params)
        flat, shaped = jax.flatten_util.ravel_pytree(factors)
        noise = jnp.asarray(np.random.default_rng(5).uniform(-0.4, 0.4, flat.size), flat.dtype)
        monkeypatch.setattr(neurons, "uniform", lambda key, tree, eps: (noise, shaped))
        return shaped(noise)

    return make


def _torch_masks(reference, start, config):
    """ANP as PyTorch would run it: full batches, no augmentation."""
    torch = reference.torch
    masks = {k: torch.ones(len(v), dtype=torch.float64, requires_grad=True)
             for k, v in start["weight"].items()}
    rule = torch.optim.SGD(masks.values(), lr=config.lr, momentum=config.momentum)
    values = []
    for _ in range(config.steps):
        frozen = {k: v.detach() for k, v in masks.items()}
        noise = reference.ascend(frozen, start, config.eps,
                                 config.eps if config.variant == "paper" else None)
        rule.zero_grad()
        clean, _ = reference.loss(masks, {k: 1.0 for k in masks})
        total = config.alpha * clean + (1 - config.alpha) * reference.perturbed(masks, noise)[0]
        total.backward()
        rule.step()
        with torch.no_grad():
            for mask in masks.values():
                mask.clamp_(0, 1)
        values.append(float(total.detach()))
    return {k: v.detach().numpy() for k, v in masks.items()}, values


@pytest.mark.parametrize("name", ["normed", "plain"])
@pytest.mark.parametrize("variant", ["paper", "official"])
def test_masks_are_pytorchs(x64, tiny_batch, fixed_start, name, variant):
    params = network(name, jnp.float64)
    reference = Reference(params, tiny_batch)
    start = fixed_start(params)
    config = ANPConfig(variant=variant, steps=5, crop=0)
    masks, values = jax.jit(learn_masks, static_argnums=4)(
        jax.random.key(0), params, jnp.asarray(tiny_batch.images, float),
        jnp.asarray(tiny_batch.labels), config)
    tensors = {kind: {k: reference.tensor(v) for k, v in tree.items()}
               for kind, tree in start._asdict().items()}
    expected, expected_values = _torch_masks(reference, tensors, config)
    assert masks.keys() == expected.keys() == (
        {"bn"} if name == "normed" else {"conv", "hidden"})
    for layer in masks:
        np.testing.assert_allclose(masks[layer], expected[layer], atol=1e-7)
    np.testing.assert_allclose(values, expected_values, rtol=1e-6)
    flat = np.concatenate(list(expected.values()))
    assert flat.min() < 0.9 and flat.max() <= 1  # they moved


@pytest.mark.parametrize("name, steps", [("normed", 3), ("plain", 1)])
def test_proportions_are_pytorchs(x64, tiny_batch, fixed_start, name, steps):
    params = network(name, jnp.float64)
    reference = Reference(params, tiny_batch)
    reference.train = False
    start = fixed_start(params)
    noise = {kind: {k: reference.tensor(v) for k, v in tree.items()}
             for kind, tree in start._asdict().items()}
    ones = {k: 1.0 for k in noise["weight"]}
    for _ in range(steps):
        noise = reference.ascend(ones, noise, 0.4 / steps, 0.4)
    predicted = reference.perturbed(ones, noise)[1].numpy()
    found = _proportions(jax.random.key(0), params, jnp.asarray(tiny_batch.images, float),
                         jnp.asarray(tiny_batch.labels), eps=0.4, steps=steps)
    np.testing.assert_allclose(found.shares, np.bincount(predicted, minlength=4) / 6, rtol=1e-12)
    np.testing.assert_allclose(found.error_rate, (predicted != tiny_batch.labels).mean())


def test_proportions_of_a_tiny_perturbation_are_the_networks_own(tiny):
    images = jax.random.uniform(jax.random.key(3), (20, 8, 8, 3))
    own = models.apply(tiny, images).argmax(axis=1)
    found = _proportions(jax.random.key(0), tiny, images, own, eps=1e-6, steps=1)
    np.testing.assert_allclose(found.shares, np.bincount(own, minlength=4) / 20, rtol=1e-6)
    assert float(found.error_rate) == 0
    harmed = _proportions(jax.random.key(0), tiny, images, own, eps=0.8, steps=1)
    assert float(harmed.error_rate) > 0 and np.isclose(harmed.shares.sum(), 1)
    with pytest.raises(ValueError, match="eps"):
        prediction_proportions(jax.random.key(0), tiny, images, own, eps=0.0)
    with pytest.raises(ValueError, match="steps"):
        prediction_proportions(jax.random.key(0), tiny, images, own, steps=0)


def test_scales_only_are_pruned(tiny, tiny_batch):
    config = ANPConfig(steps=4, batch_size=4, prune="number", number=5, lr=1.0)
    result = anp._jitted(jax.random.key(0), tiny, *map(jnp.asarray, tiny_batch), config)
    zeros = 0
    for layer, leaves in tiny.weights.items():
        for leaf, before in leaves.items():
            after = np.asarray(result.params.weights[layer][leaf])
            if leaf == "scale":
                zeros += (after == 0).sum()
                assert ((after == 0) | (after == before)).all()
            else:
                np.testing.assert_array_equal(after, before)
    assert zeros == 5 == int(result.info["pruned"])
    masks = np.concatenate(list(result.info["masks"].values()))
    assert 0 <= masks.min() <= masks.max() <= 1 and masks.std() > 0
    # Six images in batches of four are two steps a pass.
    assert result.info["loss"].shape == (4,)
    # The five smallest masks are those that went.
    gone = np.concatenate([np.asarray(result.params.weights[k]["scale"]) == 0
                           for k in sorted(result.info["masks"])])
    assert masks[gone].max() <= masks[~gone].min()


def test_without_batch_norm_kernels_and_biases_are_pruned(tiny_batch):
    params = network("plain")
    config = ANPConfig(steps=3, prune="number", number=4, lr=1.0)
    result = anp._jitted(jax.random.key(0), params, *map(jnp.asarray, tiny_batch), config)
    gone = 0
    for layer in ("conv", "hidden"):
        kernel = np.asarray(result.params.weights[layer]["kernel"])
        empty = (kernel.reshape(-1, kernel.shape[-1]) == 0).all(axis=0)
        np.testing.assert_array_equal(np.asarray(result.params.weights[layer]["bias"]) == 0, empty)
        np.testing.assert_array_equal(kernel[..., ~empty],
                                      params.weights[layer]["kernel"][..., ~empty])
        gone += empty.sum()
    assert gone == 4
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), params.weights["out"],
                                     result.params.weights["out"]))


def test_held_out_images_are_not_learnt_from(tiny, tiny_batch):
    """Masks come from five of the six images: to blacken the sixth changes its accuracy only."""
    config = ANPConfig(steps=2, crop=0, prune="held_out", candidates=4)
    images, labels = jnp.asarray(tiny_batch.images), jnp.asarray(tiny_batch.labels)
    first = anp._jitted(jax.random.key(0), tiny, images, labels, config)
    assert first.info["accuracies"].shape == (5,)
    right = models.apply(tiny, images).argmax(axis=1) == labels
    unseen = []
    for index in range(6):
        other = anp._jitted(jax.random.key(0), tiny, images.at[index].set(0.0), labels, config)
        if (other.info["loss"] == first.info["loss"]).all():
            unseen.append(index)
            assert float(first.info["accuracies"][0]) == float(right[index])
    assert len(unseen) == 1


@pytest.mark.parametrize("settings, word", [
    ({"variant": "pepper"}, "official"), ({"steps": 0}, "steps"), ({"batch_size": 0}, "batch_size"),
    ({"lr": 0.0}, "lr"), ({"eps": -0.1}, "eps"), ({"alpha": 1.5}, "alpha"),
    ({"momentum": 2.0}, "momentum"), ({"crop": -1}, "crop"), ({"threshold": 2.0}, "threshold")])
def test_settings_are_checked(settings, word):
    with pytest.raises(ValueError, match=word):
        dataclasses.replace(ANPConfig(), **settings)
