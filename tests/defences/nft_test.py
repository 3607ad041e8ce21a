"""Neural mask fine-tuning: MixUp, the bounds, and the masks against PyTorch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_networks import Reference, network

from awm_jax import models
from awm_jax.data import mixing
from awm_jax.defences import nft
from awm_jax.defences.nft import NFTConfig, bounds, mask_loss
from awm_jax.types import Arch


def test_bounds_fall_with_depth():
    arch = Arch(name="resnet18", num_classes=2, image_shape=(8, 8, 3))
    params = jax.eval_shape(lambda key: models.create(key, arch), jax.random.key(0))
    found = bounds(params, NFTConfig())
    np.testing.assert_allclose(list(found.values())[:3], [0.8, 0.8 / np.e**0.5, 0.8 / np.e])
    assert list(found)[:3] == ["bn1", "layer1_0/bn1", "layer1_0/bn2"] and len(found) == 20


def test_without_batch_norm_is_an_error():
    with pytest.raises(ValueError, match="Expected a network with BatchNorm"):
        bounds(network("plain"), NFTConfig())


def test_drift_is_worked_out_by_hand(tiny, tiny_batch):
    """3 of 14 masks at .5, 1 and 1.5: drift .5 + .5; the loss at weight 2 is 2 higher."""
    masks = {"bn1": jnp.array([1, 0.5, 1, 1, 1, 1]), "bn2": jnp.ones(8).at[3].set(1.5)}
    images, hot = jnp.asarray(tiny_batch.images), jax.nn.one_hot(tiny_batch.labels, 4)
    plain, weighted = (float(mask_loss(tiny, masks, images, hot, w)) for w in (0.0, 2.0))
    np.testing.assert_allclose(weighted - plain, 2.0, rtol=1e-5)


@pytest.mark.parametrize("gamma", [0.5, 0.0])
def test_masks_are_pytorchs(x64, tiny_batch, monkeypatch, gamma):
    """Full batches, MixUp left out; six images of four classes are 1.5 each."""
    params = network("normed", jnp.float64)
    params.weights["bn"]["scale"] = params.weights["bn"]["scale"] * 2
    reference = Reference(params, tiny_batch)
    torch = reference.torch
    monkeypatch.setattr(mixing, "mixup", _unmixed)
    config = NFTConfig(epochs=6, crop=0, gamma=gamma, lr=0.5)
    outcome = nft._jitted(jax.random.key(0), params, jnp.asarray(tiny_batch.images, float),
                          jnp.asarray(tiny_batch.labels), config)
    mask = torch.ones(5, dtype=torch.float64, requires_grad=True)
    rule = torch.optim.SGD([mask], lr=0.5, momentum=0.9)
    for index in range(6):
        rule.zero_grad()
        loss, _ = reference.loss({"bn": mask}, {"bn": 1.0}, train=False)
        loss = loss + gamma / 1.5 * (1 - mask).abs().sum()
        np.testing.assert_allclose(outcome.info["loss"][index], float(loss.detach()), rtol=1e-7)
        loss.backward()
        rule.step()
        with torch.no_grad():
            mask.clamp_(0.8, 1)
    found = np.asarray(outcome.info["masks"]["bn"])
    np.testing.assert_allclose(found, mask.detach().numpy(), atol=1e-8)
    if not gamma:
        assert found.min() < 0.95
    np.testing.assert_allclose(outcome.params.weights["bn"]["scale"],
                               params.weights["bn"]["scale"] * found, rtol=1e-12)


def _unmixed(key, images, labels, num_classes):
    return images, jax.nn.one_hot(labels, num_classes)


def test_a_preactivation_network_has_a_bound_for_every_layer_falling_with_depth():
    arch = Arch(name="preact_resnet18", num_classes=3, image_shape=(8, 8, 3))
    params = jax.eval_shape(lambda key: models.create(key, arch), jax.random.key(0))
    found = bounds(params, NFTConfig())
    assert list(found)[:3] == ["layer1_0/bn1", "layer1_0/bn2", "layer1_1/bn1"]
    assert len(found) == 16 and list(found)[-1] == "layer4_1/bn2"
    assert sorted(found.values(), reverse=True) == list(found.values())


def test_masks_stay_in_their_bounds(tiny, tiny_batch):
    result = nft(tiny, tiny_batch, config=NFTConfig(epochs=10, lr=20.0, momentum=0.0))
    lowest = bounds(tiny, NFTConfig())
    for layer, mask in result.info["masks"].items():
        assert np.float32(lowest[layer]) <= mask.min() and mask.max() <= 1
    # Steps this long end at a bound.
    assert any(mask.min() == np.float32(lowest[k]) for k, mask in result.info["masks"].items())


@pytest.mark.parametrize("settings, word", [
    ({"epochs": 0}, "epochs"), ({"lr": 0.0}, "lr"), ({"gamma": -1.0}, "gamma"),
    ({"floor": 1.5}, "floor"), ({"decay": -0.5}, "decay"), ({"momentum": -0.1}, "momentum")])
def test_settings_are_checked(settings, word):
    with pytest.raises(ValueError, match=word):
        NFTConfig(**settings)
