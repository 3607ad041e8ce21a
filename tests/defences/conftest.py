"""A network small enough to compile in a second, and clean data of its size."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from small_networks import NETWORKS

from awm_jax import models
from awm_jax.models import ops
from awm_jax.types import Arch, Batch, Params


class TinyCNN(nn.Module):
    """Two convolutions with BatchNorm, sown as two blocks, and one dense layer."""

    num_classes: int
    features: tuple[int, ...] = (6, 8)

    @staticmethod
    def norm_inputs():
        return {"bn1": "conv1", "bn2": "conv2"}

    @nn.compact
    def __call__(self, x, train: bool):
        for i, features in enumerate(self.features, start=1):
            x = nn.Conv(features, (3, 3), padding=1, name=f"conv{i}",
                        conv_general_dilated=ops.flax_conv)(x)
            x = nn.BatchNorm(use_running_average=not train, momentum=0.9, name=f"bn{i}")(x)
            x = ops.elu(x)
            self.sow("intermediates", f"block{i}", x)
            x = ops.max_pool_2x2(x)
        x = nn.Dropout(0.2, deterministic=not train)(x)
        return nn.Dense(self.num_classes, name="dense")(x.reshape(x.shape[0], -1))


class OneBlockCNN(TinyCNN):
    """The first of the two alone: less to compile, where many programs are compiled."""

    features: tuple[int, ...] = (6,)

    @staticmethod
    def norm_inputs():
        return {"bn1": "conv1"}


@pytest.fixture(scope="session", autouse=True)
def _tiny_is_known():
    ours = {"tiny_cnn": TinyCNN, "one_block_cnn": OneBlockCNN, **NETWORKS}
    models.MODELS.update(ours)
    yield
    for name in ours:
        del models.MODELS[name]


@pytest.fixture(scope="session")
def tiny(_tiny_is_known) -> Params:
    """A random tiny network with BatchNorm statistics that are not the initial ones."""
    return _random("tiny_cnn")


@pytest.fixture(scope="session")
def one_block(_tiny_is_known) -> Params:
    """The same with one block."""
    return _random("one_block_cnn")


def _random(name: str) -> Params:
    """A network whose numbers are not the initial ones."""
    params = models.create(jax.random.key(0), Arch(name=name, num_classes=4,
                                                   image_shape=(8, 8, 3)))
    keys = iter(jax.random.split(jax.random.key(1), 20))

    def move(leaf):
        return leaf * jax.random.uniform(next(keys), leaf.shape, minval=0.5, maxval=1.5)

    weights = jax.tree.map(lambda w: w + 0.1 * jax.random.normal(next(keys), w.shape),
                           params.weights)
    return Params(weights, jax.tree.map(move, params.batch_stats), params.arch)


@pytest.fixture(scope="session")
def plain_mlp() -> Params:
    """The fully connected network, random, for the same images."""
    return models.create(jax.random.key(0), Arch(name="mlp", num_classes=4, image_shape=(8, 8, 3)))


@pytest.fixture(scope="session")
def tiny_batch() -> Batch:
    """Six images with labels, in [0, 1]."""
    rng = np.random.default_rng(0)
    return Batch(rng.random((6, 8, 8, 3), np.float32), np.array([0, 1, 2, 3, 0, 1], np.int32))


@pytest.fixture
def tiny64(x64, tiny) -> Params:
    """`tiny` in float64."""
    def wide(tree):
        return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), tree)

    return Params(wide(tiny.weights), wide(tiny.batch_stats), tiny.arch)
