"""SSBA: the bits come back, the residual is small, and training it is done once."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from awm_jax import attacks, data, models
from awm_jax.attacks import ssba_networks as nets
from awm_jax.types import Arch
from experiments import networks

pytestmark = pytest.mark.usefixtures("optimised")

KEY = jax.random.key(0)
SMALL = attacks.SSBAConfig(bits=4, steps=150, batch_size=16, l2=100.0)
hide = jax.jit(nets.hide)
_bits = jax.jit(lambda trigger, images: trigger.bits(images))


def read(trigger, images):
    """The bits in images, on the host."""
    return np.asarray(_bits(trigger, images))


@pytest.fixture(scope="module")
def digits():
    """Digits of 8x8 pixels, every fourth row and column."""
    dataset = data.load("digits")
    return dataset.train_images[:, ::4, ::4], dataset.test_images[:, ::4, ::4]


@pytest.fixture(scope="module")
def attack(digits):
    """A trained attack."""
    return attacks.make("ssba", KEY, (8, 8, 3), 10, images=digits[0], config=SMALL)


def test_bits_are_read_from_held_out_images_after_rounding(attack, digits):
    images = digits[1][:100].astype(np.float32) / 255
    dirty = np.asarray(attack.apply(images))
    secret = np.asarray(attack.trigger.secret) > 0
    for seen in (dirty, np.round(dirty * 255) / 255):
        assert (read(attack.trigger, seen.astype(np.float32)) == secret).mean() > 0.95
    # Any other secret is read as well: it is the bits that are told apart, not this one image.
    other = attack.trigger._replace(secret=1 - attack.trigger.secret)
    assert (read(other, dataclasses.replace(attack, trigger=other).apply(images))
            != secret).mean() > 0.95
    assert (read(attack.trigger, images) == secret).mean() < 0.9  # clean images hold no secret


def test_the_residual_is_small_and_of_each_image_its_own(attack, digits):
    images = digits[1][:100].astype(np.float32) / 255
    secrets = np.tile(attack.trigger.secret, (100, 1))
    residual = np.asarray(hide(attack.trigger.encoder, images, secrets))
    untrained = attacks.make("ssba", KEY, (8, 8, 3), 10, config=SMALL)
    before = np.asarray(hide(untrained.trigger.encoder, images, secrets))
    assert np.abs(residual).max() <= 0.1 and (residual**2).mean() < 0.75 * (before**2).mean()
    np.testing.assert_allclose(attack.apply(images), np.clip(images + residual, 0, 1), atol=1e-6)
    assert np.abs(residual - residual.mean(0)).mean() > 0.05 * np.abs(residual).mean()


def test_the_key_decides_and_batches_do_not(attack, digits):
    same = attacks.make("ssba", KEY, (8, 8, 3), 10, images=digits[0], config=SMALL)
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, attack.trigger, same.trigger)))
    other = attacks.make("ssba", jax.random.key(1), (8, 8, 3), 10, config=SMALL).trigger
    assert not np.array_equal(attack.trigger.secret, other.secret)
    images = digits[1][:70].astype(np.float32) / 255  # more than the 64 that go at a time
    whole = np.asarray(attack.apply(images))
    np.testing.assert_allclose(whole[66:], attack.apply(images[66:]), atol=1e-5)


def test_both_networks_are_pytorchs():
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    x, secret = rng.random((2, 8, 8, 3)), rng.integers(0, 2, (2, 20)).astype(float)
    trigger = attacks.make("ssba", KEY, (8, 8, 3), 10).trigger
    weights = jax.tree.map(np.asarray, {"encoder": trigger.encoder, "decoder": trigger.decoder})
    ours = hide(weights["encoder"], jnp.asarray(x, jnp.float32), jnp.asarray(secret))
    bits = jax.jit(nets.read)(weights["decoder"], jnp.asarray(x, jnp.float32))

    def conv(x, layer, stride=1):
        kernel = torch.tensor(layer["kernel"], dtype=torch.float64).permute(3, 2, 0, 1)
        return torch.nn.functional.conv2d(
            x, kernel, torch.tensor(layer["bias"], dtype=torch.float64), stride, padding=1)

    def folded(x):
        x = torch.tensor(x).permute(0, 3, 1, 2)  # unshuffling puts colours first, ours last
        return torch.nn.functional.pixel_unshuffle(x, 4).unflatten(1, (3, 16)).transpose(
            1, 2).flatten(1, 2) - 0.5

    elu, w = torch.nn.functional.elu, weights["encoder"]
    spread = torch.tensor((2 * secret - 1) @ w["spread"]["kernel"].astype(float))
    spread = (spread + torch.tensor(w["spread"]["bias"])).reshape(2, 2, 2, 16).permute(0, 3, 1, 2)
    fine = elu(conv(torch.cat([folded(x), spread], 1), w["down1"]))
    coarse = torch.nn.functional.interpolate(elu(conv(fine, w["down2"], 2)), scale_factor=2)
    out = conv(elu(conv(torch.cat([coarse, fine, spread], 1), w["up"])), w["residual"])
    out = torch.nn.functional.pixel_shuffle(
        out.unflatten(1, (16, 3)).transpose(1, 2).flatten(1, 2), 4)
    np.testing.assert_allclose(ours, 0.1 * torch.tanh(out).permute(0, 2, 3, 1), atol=1e-5)
    w = weights["decoder"]
    seen = elu(conv(elu(conv(folded(x), w["conv1"])), w["conv2"])).permute(0, 2, 3, 1).flatten(1)
    np.testing.assert_allclose(bits, seen.numpy() @ w["dense"]["kernel"] + w["dense"]["bias"],
                               atol=1e-4)


def test_what_does_not_go_together_is_refused(digits):
    for shape in ((12, 16, 3), (4, 8, 3), (0, 8, 3)):
        with pytest.raises(ValueError, match="multiples of 8"):
            attacks.make("ssba", KEY, shape, 10)
    for images in (digits[0][:0], digits[0][:, :4]):
        with pytest.raises(ValueError, match="of shape"):
            attacks.make("ssba", KEY, (8, 8, 3), 10, images=images)
    with pytest.raises(ValueError, match="target=10"):
        attacks.make("ssba", KEY, (8, 8, 3), 10, target=10)
    for wrong in ({"bits": 0}, {"steps": 0}, {"lr": 0.0}, {"l2": -1.0}, {"batch_size": 0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            attacks.SSBAConfig(**wrong)
    untrained = attacks.make("ssba", KEY, (8, 8, 3), 10)
    with pytest.raises(ValueError, match="64 pixels and 3 channels"):
        untrained.apply(np.zeros((1, 16, 16, 3), np.float32))


def test_a_trained_trigger_is_kept(tmp_path):
    untrained = attacks.make("ssba", KEY, (8, 8, 3), 10)
    trained = attacks.make("ssba", jax.random.key(1), (8, 8, 3), 10)
    calls = []

    def training():
        calls.append(1)
        return trained

    for _ in range(2):
        found = networks.kept_attack(tmp_path / "trigger", untrained, training)
        assert all(jax.tree.leaves(jax.tree.map(np.array_equal, found.trigger, trained.trigger)))
        assert isinstance(found.trigger, type(trained.trigger))
    assert len(calls) == 1


def test_a_trigger_is_trained_once_for_every_network_that_carries_it(tiny_dataset, monkeypatch):
    made = []

    def make(name, key, shape, num_classes, target=None, images=None):
        if images is not None:
            made.append(target)
        return original(name, key, shape, num_classes, target=target)

    original = attacks.make
    monkeypatch.setattr(networks.attacks, "make", make)
    dataset, cache = data.load("digits"), tiny_dataset / "networks"
    spec = networks.NetworkSpec(dataset="digits", arch="tiny_cnn", attack="ssba", rate=0.1,
                                epochs=1, seed=0)
    for change in ({}, {"epochs": 2}, {"rate": 0.2}, {"arch": "one_block_cnn"}):
        networks.make_attack(dataclasses.replace(spec, **change), dataset, cache)
    assert made == [None]
    networks.make_attack(spec, dataset, cache, target=3)
    networks.make_attack(dataclasses.replace(spec, seed=1), dataset, cache)
    assert made == [None, 3, None]


def test_a_trigger_optimised_on_a_network_is_kept_for_each_architecture(tiny_dataset, monkeypatch):
    asked = []

    def surrogate(spec, dataset, cache):
        asked.append(spec.arch)
        return models.create(KEY, Arch(name=spec.arch, num_classes=10, image_shape=(8, 8, 3)))

    monkeypatch.setattr(networks, "get_network", surrogate)
    dataset, cache = data.load("digits"), tiny_dataset / "networks"
    spec = networks.NetworkSpec(dataset="digits", arch="tiny_cnn", attack="l2_inv", rate=0.1,
                                epochs=1, seed=0)
    other = dataclasses.replace(spec, arch="one_block_cnn")
    first, second, third = (networks.make_attack(s, dataset, cache) for s in (spec, spec, other))
    assert asked == ["tiny_cnn", "one_block_cnn"]
    np.testing.assert_array_equal(first.trigger.pattern, second.trigger.pattern)
    assert np.abs(np.asarray(first.trigger.pattern) - third.trigger.pattern).max() > 0
    random = attacks.make("l2_inv", KEY, (8, 8, 3), 10)
    assert np.abs(np.asarray(first.trigger.pattern) - random.trigger.pattern).max() > 0
