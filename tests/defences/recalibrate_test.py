"""BatchNorm statistics that follow masks: by hand, against NumPy, and what must hold."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from awm_jax import masks as masking
from awm_jax import models
from awm_jax.defences import recalibrate
from awm_jax.models import norms
from awm_jax.types import Arch, Params


def _close(found, expected, rtol=1e-4, atol=1e-6):
    """Trees of equal structure and nearly equal leaves.

    A variance is a difference of moments, so processors round it otherwise: by 1.2e-5 on one.
    """
    for path, leaf in jax.tree_util.tree_leaves_with_path(expected):
        np.testing.assert_allclose(
            norms.at(found, tuple(part.key for part in path)), leaf, rtol=rtol, atol=atol)
    assert jax.tree.structure(found) == jax.tree.structure(expected)


def _network(name="small_vgg", size=8):
    """A network with uneven statistics, as after training."""
    params = models.create(jax.random.key(0), Arch(name=name, num_classes=3,
                                                   image_shape=(size, size, 3)))
    leaves, structure = jax.tree.flatten(params.batch_stats)
    rng = np.random.default_rng(1)
    uneven = [jnp.asarray(rng.uniform(0.2, 1.5, leaf.shape), leaf.dtype) for leaf in leaves]
    return Params(params.weights, jax.tree.unflatten(structure, uneven), params.arch)


def _draw(key):
    return jax.random.uniform(key, (4, 8, 8, 3))


def _random_masks(params, key):
    """Masks in [.5, 1] on all convolutions."""
    masks = masking.init(params.weights)
    leaves, structure = jax.tree.flatten(masks)
    keys = jax.random.split(key, len(leaves))
    return jax.tree.unflatten(structure, [
        jax.random.uniform(k, leaf.shape, minval=0.5) for k, leaf in zip(keys, leaves,
                                                                         strict=True)])


def test_one_channel_by_hand():
    """was: 0, 2 (mean 1, variance 1); now: 1, 7 (mean 4, variance 9); eps 1: r = 10/2 = 5."""
    was = norms.Moments(jnp.array([1.0]), jnp.array([2.0]), jnp.array(1.0))
    now = norms.Moments(jnp.array([4.0]), jnp.array([25.0]), jnp.array(1.0))
    found = norms.moved({"mean": jnp.array([3.0]), "var": jnp.array([0.6])}, was, now)
    np.testing.assert_allclose(found["mean"], [4 + 5**0.5 * 2], rtol=1e-6)
    np.testing.assert_allclose(found["var"], [5 * 1.6 - 1], rtol=1e-6)
    gone = norms.Moments(jnp.array([0.0]), jnp.array([0.0]), jnp.array(1.0))
    found = norms.moved({"mean": jnp.array([3.0]), "var": jnp.array([0.6])}, was, gone)
    assert found["var"] == 0  # not 1.6 / 2 - 1 < 0


class _TwoLayers(nn.Module):
    """Two dense layers with BatchNorm, small enough for NumPy."""

    @nn.compact
    def __call__(self, x, train: bool):
        x = x.reshape(len(x), -1)
        for index in (1, 2):
            x = nn.Dense(5, name=f"dense{index}")(x)
            x = nn.relu(nn.BatchNorm(use_running_average=not train, epsilon=1e-3,
                                     use_scale=index == 1, name=f"bn{index}")(x))
        return nn.Dense(3, name="out")(x)


def _foreign(net, image_shape):
    """`Params` of a foreign module with uneven statistics."""
    variables = net.init(jax.random.key(0), jnp.zeros((1, *image_shape)), train=False)
    params = Params.from_flax(net, variables, image_shape=image_shape)
    uneven = jax.tree.map(lambda leaf: 0.5 + jnp.arange(leaf.size).reshape(leaf.shape) / leaf.size,
                          params.batch_stats)
    return Params(params.weights, uneven, params.arch)


def test_two_layers_against_numpy():
    """Two minibatches; the second layer must see what the recalibrated first one puts out."""
    params = _foreign(_TwoLayers(), (2, 2, 1))
    masks = jax.tree.map(lambda leaf: None, params.weights)
    rng = np.random.default_rng(3)
    for name in ("dense1", "dense2"):
        shape = params.weights[name]["kernel"].shape
        masks[name]["kernel"] = jnp.asarray(rng.uniform(0.2, 1, shape), jnp.float32)
    keys = jax.random.split(jax.random.key(2), 2)

    def draw(key):
        return jax.random.uniform(key, (6, 2, 2, 1))

    found = recalibrate.batch_stats(keys, params, masks, draw)

    weights = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params.weights)
    stats = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params.batch_stats)
    eps = 1e-3
    batches = [np.asarray(draw(key), np.float64).reshape(6, 4) for key in keys]
    was, now = list(batches), list(batches)
    for index in (1, 2):
        layer, norm = weights[f"dense{index}"], weights[f"bn{index}"]
        old, mask = stats[f"bn{index}"], np.asarray(masks[f"dense{index}"]["kernel"], np.float64)
        was = [x @ layer["kernel"] + layer["bias"] for x in was]
        now = [x @ (layer["kernel"] * mask) + layer["bias"] for x in now]

        def fitted(was, now, old=old):
            ratio = (now.var(axis=0) + eps) / (was.var(axis=0) + eps)
            return (now.mean(axis=0) + np.sqrt(ratio) * (old["mean"] - was.mean(axis=0)),
                    ratio * (old["var"] + eps) - eps)

        mean, var = fitted(np.concatenate(was), np.concatenate(now))
        np.testing.assert_allclose(found[f"bn{index}"]["mean"], mean, rtol=1e-4)
        np.testing.assert_allclose(found[f"bn{index}"]["var"], var, rtol=1e-4)

        def relu_of(x, mean, var, norm=norm):
            return np.maximum((x - mean) / np.sqrt(var + eps) * norm.get("scale", 1)
                              + norm["bias"], 0)

        own = [fitted(a, b) for a, b in zip(was, now, strict=True)]  # of each minibatch
        now = [relu_of(x, *each) for x, each in zip(now, own, strict=True)]
        was = [relu_of(x, old["mean"], old["var"]) for x in was]


@pytest.mark.parametrize("name", ["small_vgg", "preact_resnet18"])
def test_without_masks_nothing_moves(name):
    params = _network(name)
    found = recalibrate.batch_stats(jax.random.split(jax.random.key(1), 2), params, None, _draw)
    _close(found, params.batch_stats)


def test_what_only_scales_a_layer_changes_no_output():
    """Half of every kernel: BatchNorm takes it back, where its statistics follow."""
    params = _network()
    weights = {name: {**layer, "bias": jnp.zeros_like(layer["bias"])} if name.startswith("conv")
               else layer for name, layer in params.weights.items()}
    params = Params(weights, params.batch_stats, params.arch)
    masks = jax.tree.map(lambda leaf: 0.5 * leaf, masking.init(params.weights))
    found = recalibrate.batch_stats(jax.random.split(jax.random.key(1), 2), params, masks, _draw)
    images = _draw(jax.random.key(9))
    expected = models.apply(params, images)
    np.testing.assert_allclose(
        models.apply(Params(params.weights, found, params.arch), images, masks=masks), expected,
        rtol=2e-3, atol=2e-3)
    assert abs(models.apply(params, images, masks=masks) - expected).max() > 0.01


def test_jit_is_eager_and_vmap_is_a_loop():
    params = _network()
    masks = jax.vmap(lambda key: _random_masks(params, key))(jax.random.split(jax.random.key(5), 2))
    keys = jax.random.split(jax.random.key(1), 2)

    def run(masks):
        return recalibrate.batch_stats(keys, params, masks, _draw)

    rows = jax.jit(jax.vmap(run))(masks)
    for row in range(2):
        one = run(jax.tree.map(lambda leaf, row=row: leaf[row], masks))
        _close(jax.tree.map(lambda leaf, row=row: leaf[row], rows), one, rtol=1e-4)
        assert abs(one["bn3"]["mean"] - params.batch_stats["bn3"]["mean"]).max() > 1e-3


class _Hidden(nn.Module):
    """BatchNorm in view, under `nn.remat`, and in layers of one `nn.scan`."""

    @nn.compact
    def __call__(self, x, train: bool):
        x = nn.BatchNorm(use_running_average=not train, name="seen")(nn.Conv(4, (3, 3))(x))
        x = nn.remat(nn.BatchNorm)(use_running_average=not train, name="saved")(
            nn.Conv(4, (3, 3))(x))

        def layer(norm, x, _):
            return norm(x), None

        scanned = nn.scan(layer, variable_axes={"params": 0, "batch_stats": 0},
                          split_rngs={"params": True}, length=2)
        x, _ = scanned(nn.BatchNorm(use_running_average=not train, name="scanned"), x, None)
        x = nn.BatchNorm(use_running_average=not train, axis=1, name="rows")(x)
        return nn.Dense(2)(x.mean(axis=(1, 2)))


def test_layers_that_cannot_be_followed_keep_their_statistics():
    params = _foreign(_Hidden(), (6, 6, 3))
    masks = _random_masks(params, jax.random.key(5))
    found = recalibrate.batch_stats(
        jax.random.split(jax.random.key(1), 2), params, masks,
        lambda key: jax.random.uniform(key, (4, 6, 6, 3)))
    for name, follows in (("seen", True), ("saved", True), ("scanned", False), ("rows", False)):
        difference = abs(found[name]["mean"] - params.batch_stats[name]["mean"]).max()
        assert (difference > 1e-3) == follows, name


def test_a_network_without_batchnorm_has_nothing_to_follow():
    params = models.create(jax.random.key(0), Arch(name="mlp", num_classes=2,
                                                   image_shape=(8, 8, 3)))
    assert recalibrate.batch_stats(jax.random.split(jax.random.key(1), 2), params, None,
                                   _draw) == params.batch_stats
