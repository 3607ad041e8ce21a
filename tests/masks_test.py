"""Mask trees."""

import jax
import jax.numpy as jnp
import pytest

from awm_jax import masks, models
from awm_jax.types import Arch

WEIGHTS = {"conv1": {"kernel": jnp.full((3, 3, 1, 2), 2.0), "bias": jnp.ones(2)},
           "block": {"conv1": {"kernel": jnp.ones((1, 1, 2, 2))}},
           "dense": {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}}


@pytest.mark.parametrize("layers, size", [
    ("conv", 18 + 4), ("all", 18 + 4 + 6), (("conv1",), 18), (("block/conv1", "dense"), 4 + 6)])
def test_selection(layers, size):
    chosen = masks.init(WEIGHTS, layers)
    assert masks.size(chosen) == size
    assert float(masks.l1(chosen)) == size
    assert chosen["dense"]["bias"] is None


def test_apply_touches_only_masked_leaves():
    chosen = jax.tree.map(lambda m: m * 0.25, masks.init(WEIGHTS, ("conv1",)))
    out = masks.apply(WEIGHTS, chosen)
    assert float(out["conv1"]["kernel"].min()) == float(out["conv1"]["kernel"].max()) == 0.5
    assert out["dense"]["kernel"] is WEIGHTS["dense"]["kernel"]
    assert jax.tree.structure(out) == jax.tree.structure(WEIGHTS)


@pytest.mark.parametrize("layers", [("conv9",), "convs"])
def test_unknown_layers_are_named(layers):
    with pytest.raises(ValueError, match="conv"):
        masks.init(WEIGHTS, layers)


@pytest.mark.parametrize("name, shape, layers", [
    ("mlp", (8, 8, 1), {"fc1", "fc2", "fc3", "fc4"}), ("cnn", (16, 16, 1), {"conv1", "conv2"})])
def test_the_mnist_networks(name, shape, layers):
    """The hidden layers stand in for convolutions only where there are none."""
    arch = Arch(name=name, num_classes=3, image_shape=shape)
    weights = jax.eval_shape(lambda k: models.create(k, arch), jax.random.key(0)).weights
    found = jax.eval_shape(masks.init, weights)
    assert set(masks.layer_names(found)) == layers


def test_nothing_to_mask_is_an_error():
    with pytest.raises(ValueError, match="dense"):
        masks.init({"dense": WEIGHTS["dense"]}, "conv")
