"""Neurons as factors: which there are, what perturbs them, which are pruned."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from awm_jax import models
from awm_jax.defences import neurons
from awm_jax.defences.base import by_path
from awm_jax.defences.neurons import Factors, PruneConfig
from awm_jax.types import Arch, Params


class LayerNormed(nn.Module):
    """A hidden layer with LayerNorm, whose scale is no BatchNorm's."""

    num_classes: int

    @nn.compact
    def __call__(self, x, train: bool):
        x = nn.LayerNorm(name="norm")(nn.Dense(5, use_bias=False, name="hidden")(
            x.reshape(x.shape[0], -1)))
        return nn.Dense(self.num_classes, name="out")(x)


@pytest.fixture(scope="module")
def layer_normed():
    models.MODELS["layer_normed"] = LayerNormed
    yield models.create(jax.random.key(0), Arch(name="layer_normed", num_classes=3,
                                                image_shape=(8, 8, 1)))
    del models.MODELS["layer_normed"]


def test_neurons_are_batch_norm_channels(tiny):
    found = neurons.ones(tiny)
    assert {layer: f.shape for layer, f in found.weight.items()} == {"bn1": (6,), "bn2": (8,)}
    assert found.bias.keys() == found.weight.keys() and neurons.has_norms(tiny)


def test_neurons_without_batch_norm_leave_the_classifier_out(layer_normed):
    found = neurons.ones(layer_normed)
    assert {layer: f.shape for layer, f in found.weight.items()} == {"hidden": (5,)}
    assert found.bias == {} and not neurons.has_norms(layer_normed)


def test_no_neurons_is_an_error(layer_normed):
    weights = {"out": layer_normed.weights["out"]}
    with pytest.raises(ValueError, match="found only: out/bias, out/kernel"):
        neurons.ones(dataclasses.replace(layer_normed, weights=weights))


def test_multiply_is_by_output_channel(tiny):
    scale, bias = tiny.weights["bn1"]["scale"], tiny.weights["bn1"]["bias"]
    out = neurons.multiply(tiny, Factors({"bn1": jnp.arange(6.)}, {"bn1": jnp.arange(6.) - 1}))
    np.testing.assert_array_equal(out.weights["bn1"]["scale"], scale * np.arange(6))
    np.testing.assert_array_equal(out.weights["bn1"]["bias"], bias * (np.arange(6) - 1))
    assert out.weights["bn2"] is not None and out.weights["conv1"]["kernel"] is tiny.weights[
        "conv1"]["kernel"]
    conv = neurons.multiply(tiny, Factors({"conv2": jnp.arange(8.)}, {}))
    np.testing.assert_allclose(conv.weights["conv2"]["kernel"], np.einsum(
        "hwio,o->hwio", tiny.weights["conv2"]["kernel"], np.arange(8.)), rtol=1e-6)


def test_a_pruned_batch_norm_neuron_is_constant(tiny, tiny_batch):
    """No input changes what it puts out; its bias stays (the published code zeroes no bias)."""
    keep = {"bn1": jnp.array([1., 0, 1, 1, 1, 1])}
    pruned = neurons.prune(tiny, keep)
    blocks = models.activations(pruned, jnp.asarray(tiny_batch.images))[1]["block1"]
    bias = float(tiny.weights["bn1"]["bias"][1])
    elu = bias if bias > 0 else np.expm1(bias)
    np.testing.assert_allclose(blocks[..., 1], elu, rtol=1e-5)
    assert float(blocks[..., 0].std()) > 0
    np.testing.assert_array_equal(pruned.weights["bn1"]["bias"], tiny.weights["bn1"]["bias"])


@pytest.mark.parametrize("project", [True, False])
def test_perturbed_gradient_of_half_a_square(x64, project):
    """``L = |p|^2 / 2``: L' = p, so d ends at d0 + eps sign(p), whose start d0 this recovers."""
    def gradient(project, alpha):
        return neurons.perturbed_gradient(
            jax.random.key(0), lambda key, p: sum((v**2).sum() for v in jax.tree.leaves(p)) / 2,
            {"a": point, "b": None}, eps=0.4, alpha=alpha, project=project)

    point = jnp.asarray([1.0, -1.0] * 20)
    sign = np.tile([1, -1], 20)
    start = np.asarray(gradient(False, 0.0)[0]["a"]) - np.asarray(point) - 0.4 * sign
    assert (np.abs(start) <= 0.4).all() and start.std() > 0.15  # uniform: .23
    delta = start + 0.4 * sign
    delta = np.clip(delta, -0.4, 0.4) if project else delta
    assert np.abs(delta).max() <= 0.8 and (project or np.abs(delta).max() > 0.4)
    found, value = gradient(project, 0.2)
    np.testing.assert_allclose(found["a"], 0.2 * point + 0.8 * (point + delta), rtol=1e-12)
    np.testing.assert_allclose(value, 0.2 * 20 + 0.8 * ((point + delta)**2).sum() / 2, rtol=1e-12)
    assert found["b"] is None


def _masks(bn1):
    return {"bn1": jnp.asarray(bn1), "bn2": jnp.ones(8)}


def _changed_scales(tiny, pruned):
    """Which scales differ, after seeing that nothing else does and that those are zero."""
    before, after = by_path(tiny.weights), by_path(pruned.weights)
    moved = {}
    for path in before:
        differs = np.asarray(before[path] != after[path])
        if differs.any():
            assert (np.asarray(after[path])[differs] == 0).all()
            moved[path] = np.flatnonzero(differs).tolist()
    return moved


def _choose(tiny, masks, **settings):
    images, labels = jnp.zeros((10, 8, 8, 3)), jnp.zeros(10, jnp.int32)
    return neurons.choose(tiny, masks, images, labels, PruneConfig(**settings))


def test_threshold_is_inclusive(tiny):
    pruned, info = _choose(tiny, _masks([0.5, 0.2, 0.21, 0.0, 1, 1]), prune="threshold",
                           threshold=0.2)
    assert _changed_scales(tiny, pruned) == {"bn1/scale": [1, 3]}
    assert int(info["pruned"]) == 2 and float(info["threshold"]) == np.float32(0.2)


@pytest.mark.parametrize("number, scales, threshold", [
    (3, {"bn1/scale": [1, 2, 3]}, 0.25), (0, {}, -1.0),
    (6, {"bn1/scale": [0, 1, 2, 3, 4, 5]}, 1.0),
    (14, {"bn1/scale": list(range(6)), "bn2/scale": list(range(8))}, 1.0)])
def test_number_takes_the_smallest(tiny, number, scales, threshold):
    pruned, info = _choose(tiny, _masks([0.5, 0.125, 0.25, 0.0, 1, 1]), prune="number",
                           number=number)
    assert _changed_scales(tiny, pruned) == scales
    assert int(info["pruned"]) == number and float(info["threshold"]) == threshold


def test_more_than_all_neurons_is_an_error(tiny):
    with pytest.raises(ValueError, match=r"number=15 in \[0, 14\]"):
        _choose(tiny, _masks(jnp.ones(6)), prune="number", number=15)


@pytest.mark.parametrize("right, pruned, threshold", [
    # Right answers out of ten, by how many neurons are gone. The tolerance is one image.
    ([10, 10, 9, 8, 10, 10], 2, 0.2),  # that it later passes again does not count
    ([10, 8, 10, 10, 10, 10], 0, -1.0),
    ([5, 6, 7, 4, 4, 4], 5, 0.8)])
def test_held_out_stops_at_the_first_loss(tiny, monkeypatch, right, pruned, threshold):
    def apply(params, images):
        gone = (params.weights["bn1"]["scale"] == 0).sum()
        wrong = jnp.arange(10) >= jnp.asarray(right)[gone]
        return jax.nn.one_hot(wrong.astype(int), 4)

    monkeypatch.setattr(neurons.models, "apply", apply)
    found, info = _choose(tiny, _masks([0.0, 0.1, 0.3, 0.5, 0.7, 0.9]), prune="held_out",
                          tolerance=0.1, candidates=5)
    assert int(info["pruned"]) == pruned and np.isclose(info["threshold"], threshold)
    np.testing.assert_allclose(info["thresholds"], [-1, 0, 0.2, 0.4, 0.6, 0.8], rtol=1e-6)
    np.testing.assert_allclose(info["accuracies"], np.array(right) / 10, rtol=1e-6)
    assert sum(map(len, _changed_scales(tiny, found).values())) == pruned


def test_held_out_accuracies_are_those_of_the_pruned_networks(tiny):
    images = jax.random.uniform(jax.random.key(2), (40, 8, 8, 3))
    labels = models.apply(tiny, images).argmax(axis=1).at[:4].set(0)
    masks = {"bn1": jnp.linspace(0, 1, 6), "bn2": jnp.linspace(0.05, 0.95, 8)}
    config = PruneConfig(prune="held_out", tolerance=0.3, candidates=10)
    pruned, info = jax.jit(lambda: neurons.choose(tiny, masks, images, labels, config))()
    expected = []
    for threshold in [-1, *np.arange(10) / 10]:
        weights = jax.tree.map(np.array, tiny.weights)
        for layer, mask in masks.items():
            weights[layer]["scale"][np.asarray(mask) <= np.float32(threshold)] = 0
        logits = models.apply(dataclasses.replace(tiny, weights=weights), images)
        expected.append(float((logits.argmax(axis=1) == labels).mean()))
    np.testing.assert_allclose(info["accuracies"], expected, atol=1e-6)
    assert len(set(expected)) > 3
    used = expected[1:][round(float(info["threshold"]) * 10)]
    after = models.apply(pruned, images).argmax(axis=1) == labels
    np.testing.assert_allclose(after.mean(), used, atol=1e-6)


@pytest.mark.parametrize("count, share, kept", [(9, 0.2, 1), (10, 0.2, 2), (2, 0.1, 1),
                                                (2, 0.9, 1), (100, 0.5, 50)])
def test_hold_out_shares_out(count, share, kept):
    config = PruneConfig(prune="held_out", held_out=share)
    learnt, held = neurons.hold_out(jax.random.key(0), count, config)
    assert len(held) == kept and sorted([*learnt.tolist(), *held.tolist()]) == list(range(count))


def test_hold_out_only_where_asked():
    learnt, held = neurons.hold_out(jax.random.key(0), 5, PruneConfig())
    assert learnt.tolist() == list(range(5)) and len(held) == 0
    with pytest.raises(ValueError, match="at least 2 images"):
        neurons.hold_out(jax.random.key(0), 1, PruneConfig(prune="held_out"))


@pytest.mark.parametrize("settings, word", [
    ({"prune": "oracle"}, "held_out"), ({"threshold": 1.1}, "threshold"), ({"number": -1}, "-1"),
    ({"held_out": 0.0}, "strictly"), ({"held_out": 1.0}, "strictly"), ({"candidates": 0}, "0"),
    ({"tolerance": float("nan")}, "tolerance")])
def test_settings_are_checked(settings, word):
    with pytest.raises(ValueError, match=word):
        PruneConfig(**settings)


class _Attends(nn.Module):
    """Attention, whose biases have an axis for the heads."""

    @nn.compact
    def __call__(self, x, train: bool = False):
        x = nn.Conv(8, (3, 3), name="conv")(x).reshape(len(x), -1, 8)
        x = nn.MultiHeadDotProductAttention(num_heads=2, name="attend")(x)
        return nn.Dense(3, name="out")(x.mean(1))


def test_a_bias_of_two_axes_has_a_factor_for_each_channel():
    net = _Attends()
    variables = net.init(jax.random.key(0), jnp.zeros((1, 4, 4, 3)))
    params = Params.from_flax(net, variables, image_shape=(4, 4, 3))
    found = neurons.ones(params)
    assert found.bias["attend/query"].shape == found.weight["attend/query"].shape == (4,)
    twice = neurons.multiply(params, jax.tree.map(lambda f: 2 * f, found))
    np.testing.assert_array_equal(twice.weights["attend"]["query"]["bias"],
                                  2 * params.weights["attend"]["query"]["bias"])


@pytest.mark.parametrize("name, classes, layers", [
    ("mlp", 500, {"fc1", "fc2", "fc3", "fc4"}), ("cnn", 512, {"conv1", "conv2", "fc1"})])
def test_hidden_layers_as_wide_as_there_are_classes_are_neurons(name, classes, layers):
    arch = Arch(name=name, num_classes=classes, image_shape=(16, 16, 1))
    drawn = jax.eval_shape(lambda k: models.create(k, arch), jax.random.key(0))
    assert jax.eval_shape(neurons.ones, drawn).weight.keys() == layers
