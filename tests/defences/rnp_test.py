"""Reconstructive Neuron Pruning: each half against PyTorch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_networks import Reference, network

from awm_jax.defences import rnp
from awm_jax.defences.rnp import RNPConfig, recover, unlearn


def _data(batch):
    return jnp.asarray(batch.images, float), jnp.asarray(batch.labels)


def _one(key, params, batch, config):
    return jax.jit(unlearn, static_argnums=4)(key, params, *_data(batch), config)


def _own(reference):
    """The classes that the network gives: all right, so that there is accuracy to lose."""
    return reference.loss({"bn": 1.0}, {"bn": 1.0})[1].numpy()


@pytest.mark.parametrize("clip", [1e9, 0.5])
def test_unlearning_is_pytorchs(x64, tiny_batch, clip):
    """Ascent on all weights, the gradient clipped to its norm over all of them."""
    params = network("normed", jnp.float64)
    reference = Reference(params, tiny_batch)
    torch = reference.torch
    config = RNPConfig(unlearn_steps=4, floor=0.0, crop=0, clip_norm=clip, unlearn_lr=0.02)
    own = _own(reference)
    batch = tiny_batch._replace(labels=own)
    reference.labels = torch.tensor(own)
    leaves = [leaf.requires_grad_() for leaf in jax.tree.leaves(reference.weights)]
    expected = []
    for _ in range(4):
        loss, predicted = reference.loss({"bn": 1.0}, {"bn": 1.0})
        expected.append((predicted.numpy() == own).mean())
        gradients = torch.autograd.grad(loss, leaves)
        norm = torch.sqrt(sum((g**2).sum() for g in gradients))
        with torch.no_grad():
            for leaf, gradient in zip(leaves, gradients, strict=True):
                leaf += 0.02 * gradient * min(1.0, clip / float(norm))
    found, accuracies = _one(jax.random.key(0), params, batch, config)
    np.testing.assert_allclose(accuracies, expected, atol=1e-9)
    assert expected[0] == 1.0 and expected[-1] > 0
    for leaf, other in zip(jax.tree.leaves(found.weights), leaves, strict=True):
        np.testing.assert_allclose(leaf, other.detach().numpy(), atol=1e-8)


def test_unlearning_stops_at_the_floor(x64, tiny_batch):
    """Long steps reach it; from then on nothing moves, statistics included."""
    params = network("normed", jnp.float64)
    tiny_batch = tiny_batch._replace(labels=_own(Reference(params, tiny_batch)))
    found = {steps: _one(jax.random.key(0), params, tiny_batch, RNPConfig(
        unlearn_steps=steps, unlearn_lr=0.2, crop=0, floor=0.2)) for steps in (30, 40)}
    accuracies = np.asarray(found[30][1])
    assert accuracies[0] > 0.2 >= accuracies[-1]
    first = int(np.argmax(accuracies <= 0.2))
    assert (accuracies[first:] == accuracies[first]).all()
    for one, other in zip(*(jax.tree.leaves(found[k][0]) for k in (30, 40)), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-12)


def test_recovering_is_pytorchs(x64, tiny_batch):
    params = network("normed", jnp.float64)
    reference = Reference(params, tiny_batch)
    torch = reference.torch
    config = RNPConfig(recover_steps=5, crop=0)
    masks, values = jax.jit(recover, static_argnums=4)(
        jax.random.key(0), params, *_data(tiny_batch), config)
    mask = torch.ones(5, dtype=torch.float64, requires_grad=True)
    rule = torch.optim.SGD([mask], lr=0.2, momentum=0.9)
    for index in range(5):
        rule.zero_grad()
        loss, _ = reference.loss({"bn": mask}, {"bn": 1.0})
        np.testing.assert_allclose(values[index], float(loss.detach()), rtol=1e-7)
        loss.backward()
        rule.step()
        with torch.no_grad():
            mask.clamp_(0, 1)
    assert masks.keys() == {"bn"} and float(mask.detach().min()) < 0.95
    np.testing.assert_allclose(masks["bn"], mask.detach().numpy(), atol=1e-8)


def test_the_original_network_is_pruned(tiny, tiny_batch):
    """Not the unlearnt one: but for zeroed scales nothing changes, statistics least of all."""
    config = RNPConfig(unlearn_steps=2, recover_steps=2, batch_size=4, prune="number", number=3)
    outcome = rnp._jitted(jax.random.key(0), tiny, *map(jnp.asarray, tiny_batch), config)
    masks = np.concatenate(list(outcome.info["masks"].values()))
    assert 0 <= masks.min() < masks.max() <= 1
    zeros = 0
    for layer, leaves in tiny.weights.items():
        for leaf, before in leaves.items():
            after = np.asarray(outcome.params.weights[layer][leaf])
            if leaf == "scale":
                zeros += (after == 0).sum()
                before = np.where(after == 0, 0, before)
            np.testing.assert_array_equal(after, before)
    assert zeros == 3
    jax.tree.map(np.testing.assert_array_equal, tiny.batch_stats, outcome.params.batch_stats)


@pytest.mark.parametrize("settings, word", [
    ({"unlearn_steps": 0}, "unlearn_steps"), ({"recover_lr": 0.0}, "recover_lr"),
    ({"floor": 1.5}, "floor"), ({"clip_norm": 0.0}, "clip_norm"), ({"prune": "x"}, "held_out")])
def test_settings_are_checked(settings, word):
    with pytest.raises(ValueError, match=word):
        RNPConfig(**settings)
