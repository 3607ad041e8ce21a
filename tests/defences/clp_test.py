"""CLP: bounds by hand and by SVD, and which convolution feeds which BatchNorm."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from awm_jax import defences, models
from awm_jax.defences.base import NORMS, map_weights
from awm_jax.defences.clp import CLPConfig, channel_lipschitz, outliers
from awm_jax.types import Arch, Params


class PreActivation(nn.Module):
    """One pre-activation residual block: the last norm sees a sum, which no convolution makes."""

    num_classes: int

    @staticmethod
    def norm_inputs():
        return {"block_norm1": "stem", "block_norm2": "block_conv1"}

    @nn.compact
    def __call__(self, x, train: bool):
        def norm(name):
            return nn.BatchNorm(use_running_average=not train, epsilon=1e-5, name=name)

        x = nn.Conv(16, (3, 3), padding=1, name="stem")(x)
        y = nn.Conv(16, (3, 3), padding=1, name="block_conv1")(nn.relu(norm("block_norm1")(x)))
        y = nn.Conv(16, (3, 3), padding=1, name="block_conv2")(nn.relu(norm("block_norm2")(y)))
        x = nn.relu(norm("last_norm")(x + y)).mean(axis=(1, 2))
        return nn.Dense(self.num_classes, name="dense")(x)


@pytest.fixture
def pre_activation(monkeypatch):
    monkeypatch.setitem(models.MODELS, "pre_activation", PreActivation)
    arch = Arch(name="pre_activation", num_classes=3, image_shape=(8, 8, 3))
    return models.create(jax.random.key(0), arch)


def _moved(params):
    """The network with BatchNorm statistics and scales that differ from channel to channel."""
    keys = iter(jax.random.split(jax.random.key(7), 400))

    def move(leaf):
        return leaf + jax.random.uniform(next(keys), leaf.shape, minval=0.5, maxval=1.5)

    weights = map_weights(lambda path, leaf: move(leaf) if NORMS.weights(path, leaf) else leaf,
                          params.weights)
    return Params(weights, jax.tree.map(move, params.batch_stats), params.arch)


def test_bound_by_hand():
    kernel = np.zeros((1, 2, 2, 2), np.float32)
    kernel[0, :, :, 0] = np.diag([3.0, 4.0])  # sigma 4, times |-2| / 2
    kernel[0, :, :, 1] = 1.0  # sigma 2, times 0.5 / 1
    found = channel_lipschitz(jnp.asarray(kernel), jnp.array([-2.0, 0.5]),
                              jnp.array([4 - 1e-5, 1 - 1e-5]))
    np.testing.assert_allclose(found, [4.0, 1.0], rtol=1e-5)


def test_outliers_use_the_unbiased_deviation():
    """Mean 2, deviation 2 (biased: 1.73), so 5 lies 1.5 deviations above."""
    values = jnp.array([1.0, 1.0, 1.0, 5.0])
    assert outliers(values, 1.49).tolist() == [False, False, False, True]
    assert not outliers(values, 1.51).any()
    assert not outliers(jnp.ones(1), 0.0).any()


@pytest.mark.parametrize("shape", [(3, 3, 5, 4), (1, 1, 6, 3), (3, 3, 3, 2), (5, 3, 40, 2)])
def test_bound_is_numpys_svd(x64, shape):
    rng = np.random.default_rng(0)
    kernel, scale = rng.normal(size=shape), rng.normal(size=shape[3])
    variance = rng.uniform(0.1, 2, shape[3])
    oihw = kernel.transpose(3, 2, 0, 1)
    wanted = [np.linalg.svd(w.reshape(shape[2], -1) * abs(g) / np.sqrt(v + 1e-5))[1][0]
              for w, g, v in zip(oihw, scale, variance, strict=True)]
    np.testing.assert_allclose(channel_lipschitz(*map(jnp.asarray, (kernel, scale, variance))),
                               wanted, rtol=1e-10)


@pytest.mark.parametrize("name", ["small_vgg", "preact_resnet18", "pre_activation"])
def test_norm_inputs_name_the_convolution_that_feeds_each(name, pre_activation):
    """BatchNorm's formula applied to what the named convolution puts out is BatchNorm's output."""
    arch = Arch(name=name, num_classes=3, image_shape=(8, 8, 3))
    params = _moved(models.create(jax.random.key(1), arch))
    images = jax.random.uniform(jax.random.key(2), (2, 8, 8, 3))

    @jax.jit
    def layers(params):
        variables = {"params": params.weights, "batch_stats": params.batch_stats}
        return models.module(arch).apply(variables, images, train=False, capture_intermediates=True,
                                         mutable=["intermediates"])[1]["intermediates"]

    found = layers(params)

    def at(tree, path):
        for part in path.split("/"):
            tree = tree[part]
        return tree

    pairs = models.norm_inputs(arch)
    for norm, conv in pairs.items():
        x, weights, stats = at(found, conv)["__call__"][0], at(params.weights, norm), at(
            params.batch_stats, norm)
        shape = (1, 1, 1, -1)
        wanted = (x - stats["mean"].reshape(shape)) / jnp.sqrt(stats["var"].reshape(shape) + 1e-5)
        wanted = wanted * weights["scale"].reshape(shape) + weights["bias"].reshape(shape)
        np.testing.assert_allclose(at(found, norm)["__call__"][0], wanted, rtol=1e-3, atol=1e-4)
    norms = sum("var" in path for path in jax.tree.leaves(
        map_weights(lambda path, leaf: path, params.batch_stats)))
    after_sums = {"preact_resnet18": 7, "pre_activation": 1}.get(name, 0)
    assert len(pairs) == norms - after_sums
    assert len(set(pairs.values())) == len(pairs)


def test_a_planted_channel_is_pruned_where_it_is_read(pre_activation):
    """Channel 3 of the block's first convolution; the second, which no norm reads alone, is left.

    In module order the last norm would be taken to follow the second convolution.
    """
    def plant(path, leaf):
        if path == "block_conv1/kernel":
            return leaf.at[..., 3].multiply(50)
        if path.endswith("bias"):
            return leaf + 0.5
        return leaf.at[..., 5].multiply(50) if path == "block_conv2/kernel" else leaf

    planted = dataclasses.replace(pre_activation,
                                  weights=map_weights(plant, pre_activation.weights))
    found = defences.clp(planted)
    assert {name: np.flatnonzero(v).tolist() for name, v in found.info["pruned"].items()} == {
        "block_norm1": [], "block_norm2": [3]}
    for name in ("block_norm1", "block_norm2", "last_norm"):
        was, now = planted.weights[name], found.params.weights[name]
        kept = np.arange(16) != (3 if name == "block_norm2" else -1)
        for part in ("scale", "bias"):
            np.testing.assert_array_equal(now[part], np.where(kept, was[part], 0))


def test_without_batch_norm_it_is_refused(plain_mlp):
    with pytest.raises(ValueError, match=r"Expected a network with BatchNorm.*mlp has none"):
        defences.clp(plain_mlp)


def test_a_depthwise_kernel_is_a_matrix_of_one_row():
    """Its norm is that of its nine numbers: 3 for ones, times scale 2 over a deviation of 4."""
    found = channel_lipschitz(jnp.ones((3, 3, 1, 2)).at[..., 1].multiply(2.0), jnp.full(2, 2.0),
                              jnp.full(2, 16.0))
    np.testing.assert_allclose(found, [1.5, 3.0], rtol=1e-5)


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2"])
def test_all_layers_share_one_decomposition(name):
    """Two at once can wait for each other for ever on two cores."""
    arch = Arch(name=name, num_classes=3, image_shape=(8, 8, 3))
    params = jax.eval_shape(lambda k: models.create(k, arch), jax.random.key(0))
    method, config = defences.clp.method, CLPConfig()
    program = jax.make_jaxpr(lambda p: method(None, p, None, None, config))(params)
    assert str(program).count("eigh[") == 1


def test_milder_prunes_less_and_the_key_is_not_used(tiny):
    moved = _moved(tiny)
    counts = [sum(int(v.sum()) for v in defences.clp(moved, config=CLPConfig(u=u)).info[
        "pruned"].values()) for u in (0.0, 1.0, 100.0)]
    assert counts[0] > counts[1] > counts[2] == 0
    one, other = (defences.clp(moved, key=jax.random.key(k), config=CLPConfig(u=0.0)).params
                  for k in range(2))
    assert all((a == b).all() for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other),
                                              strict=True))


@pytest.mark.parametrize("path, inside", [
    ("bn1/bias", True), ("layer1_0/shortcut_bn/bias", True), ("norm2/bias", True),
    ("BatchNorm_0/bias", True), ("bn1/scale", True), ("conv1/bias", False), ("bias", False),
    ("dense/kernel", False), ("bn_block/conv1/bias", False)])
def test_remit_of_norms(path, inside):
    assert NORMS.weights(path, jnp.zeros(1)) is inside


def test_refuses_bad_settings():
    with pytest.raises(ValueError, match="u=-1"):
        CLPConfig(u=-1)


def test_epsilon_is_the_modules_own():
    """A variance of 3 and an epsilon of 1: a deviation of 2, not of sqrt(3)."""

    class Foreign(nn.Module):
        def norm_inputs(self):
            return {"norm": "conv"}

        @nn.compact
        def __call__(self, x, train: bool = False):
            x = nn.Conv(4, (3, 3), name="conv")(x)
            x = nn.BatchNorm(use_running_average=not train, epsilon=1.0, name="norm")(x)
            return nn.Dense(2)(x.mean((1, 2)))

    net = Foreign()
    variables = net.init(jax.random.key(0), jnp.zeros((1, 8, 8, 3)))
    variables["batch_stats"]["norm"]["var"] = jnp.full(4, 3.0)
    params = Params.from_flax(net, variables, image_shape=(8, 8, 3))
    kernel = np.asarray(params.weights["conv"]["kernel"], np.float64).reshape(9, 3, 4)
    largest = np.linalg.svd(kernel.transpose(2, 0, 1), compute_uv=False)[:, 0]
    found = defences.clp(params).info["lipschitz"]["norm"]
    np.testing.assert_allclose(found, largest / 2, rtol=1e-4)
