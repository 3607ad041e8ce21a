"""Mask trees."""

import jax
import jax.numpy as jnp
import pytest

from awm_jax import masks

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


def test_nothing_to_mask_is_an_error():
    with pytest.raises(ValueError, match="dense"):
        masks.init({"dense": WEIGHTS["dense"]}, "conv")
