"""Gradients where maps have an odd side: compiled as for users, they are finite and right."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from awm_jax import losses, models
from awm_jax.types import Arch


@pytest.mark.usefixtures("optimised")
@pytest.mark.parametrize("side", [12, 20])  # 12, 6, 3 and 20, 10, 5
def test_a_training_gradient_in_odd_maps(side):
    """XLA, optimising, once divided by zero in the row that pooling leaves out."""
    params = models.create(jax.random.key(0), Arch(name="small_vgg", num_classes=5,
                                                   image_shape=(side, side, 3)))
    images = jax.random.uniform(jax.random.key(2), (16, side, side, 3))
    labels = jnp.arange(16) % 5

    def loss(weights):
        network = dataclasses.replace(params, weights=weights)
        return losses.cross_entropy(
            models.apply_train(network, images, key=jax.random.key(1))[0], labels)

    compiled, eager = jax.jit(jax.grad(loss))(params.weights), jax.grad(loss)(params.weights)
    for (path, found), wanted in zip(jax.tree_util.tree_leaves_with_path(compiled),
                                     jax.tree.leaves(eager), strict=True):
        largest = float(jnp.abs(wanted).max())
        assert np.isfinite(found).all(), path
        np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-4 * largest + 1e-6)
