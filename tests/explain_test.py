"""What happens inside networks: by hand, by loops and finite differences, by PyTorch."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from awm_jax import explain, losses, models
from awm_jax.models import layers
from awm_jax.types import Arch, Params

SHAPE = (8, 8, 3)


class Pixel(nn.Module):
    """A 1x1 convolution to two neurons, their means, and two classes."""

    num_classes: int

    @nn.compact
    def __call__(self, x, train: bool):
        x = layers.block(self, "block1", nn.Conv(2, (1, 1), use_bias=False, name="conv")(x))
        return nn.Dense(self.num_classes, name="dense")(x.mean(axis=(1, 2)))


class Unmoved(nn.Module):
    """Sows its block, but cannot be told to move it."""

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(2, (1, 1), name="conv")(x)
        self.sow("intermediates", "block1", x)
        return nn.Dense(2, name="dense")(x.mean(axis=(1, 2)))


def _pixel(monkeypatch, kernel, dense):
    """`Pixel` with these weights, for images of 8x8."""
    monkeypatch.setitem(models.MODELS, "pixel", Pixel)
    kernel = jnp.asarray(kernel, float)[None, None]
    weights = {"conv": {"kernel": kernel},
               "dense": {"kernel": jnp.asarray(dense, float), "bias": jnp.zeros(2)}}
    arch = Arch(name="pixel", num_classes=2, image_shape=(8, 8, kernel.shape[2]))
    return Params(weights, {}, arch)


def test_tac_by_hand():
    """Differences (3, 4) and (0, 0) in the first neuron, (0, 1) and (3, 0) in the second."""
    clean = jnp.array([[[[1., 0.]], [[1., 1.]]], [[[0., 0.]], [[0., 5.]]]])
    triggered = jnp.array([[[[4., 0.]], [[5., 2.]]], [[[0., 3.]], [[0., 5.]]]])
    np.testing.assert_allclose(explain.tac(clean, triggered), [2.5, 2.0])


def test_tac_is_the_loops():
    clean, triggered = np.random.default_rng(0).normal(size=(2, 5, 3, 2, 4))
    expected = [np.mean([np.linalg.norm(a[..., k] - b[..., k])
                         for a, b in zip(clean, triggered, strict=True)]) for k in range(4)]
    np.testing.assert_allclose(explain.tac(jnp.asarray(clean), jnp.asarray(triggered)), expected,
                               rtol=1e-5)


def test_a_trigger_that_changes_nothing_changes_no_neuron(tiny, small_batch):
    images = jnp.asarray(small_batch.images)
    found = explain.tac(explain.neurons(tiny, images), explain.neurons(tiny, images))
    assert found.shape == (8,) and (found == 0).all()
    darker = explain.tac(explain.neurons(tiny, images), explain.neurons(tiny, images / 2))
    assert (darker > 0).all()


def test_neurons_are_the_last_convolutions(tiny, small_batch):
    """XLA's own convolution of the first block, pooled."""
    images = jnp.asarray(small_batch.images)
    first = np.asarray(models.activations(tiny, images)[1]["block1"])
    pooled = first.reshape(6, 4, 2, 4, 2, 6).max(axis=(2, 4))
    conv = tiny.weights["conv2"]
    expected = jax.lax.conv_general_dilated(
        pooled, conv["kernel"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    found = explain.neurons(tiny, images)
    np.testing.assert_allclose(found, np.asarray(expected) + np.asarray(conv["bias"]), atol=1e-5)
    np.testing.assert_allclose(jax.jit(explain.neurons)(tiny, images), found, atol=1e-5)


def test_gradient_norms_by_hand(monkeypatch):
    """Logits of zero: (-.5, .5) @ V.T, times every pixel's x = 2."""
    params = _pixel(monkeypatch, [[0., 0.]], [[3., 1.], [0., 4.]])
    found = explain.gradient_norms(params, jnp.full((1, 8, 8, 1), 2.0), jnp.array([0]))
    np.testing.assert_allclose(found, [2.0, 4.0])


def test_gradient_norms_are_those_of_finite_differences(tiny64, small_batch):
    images, labels = jnp.asarray(small_batch.images, float), jnp.asarray(small_batch.labels)
    kernel = tiny64.weights["conv2"]["kernel"]
    count = kernel[..., 0].size

    @jax.jit
    def loss(delta, neuron):
        moved = kernel.at[..., neuron].add(delta.reshape(kernel.shape[:-1]))
        weights = {**tiny64.weights, "conv2": {**tiny64.weights["conv2"], "kernel": moved}}
        return losses.cross_entropy(
            models.apply(dataclasses.replace(tiny64, weights=weights), images), labels)

    found = explain.gradient_norms(tiny64, images, labels)
    for neuron in (0, 5):
        slopes = [(loss(step, neuron) - loss(-step, neuron)) / 2e-6
                  for step in 1e-6 * np.eye(count)]
        np.testing.assert_allclose(found[neuron], np.linalg.norm(slopes), rtol=1e-5)
    np.testing.assert_allclose(jax.jit(explain.gradient_norms)(tiny64, images, labels), found)


def test_grad_cam_by_hand(monkeypatch):
    """The maps are the image's channels: class 0 is for the first and against the second."""
    params = _pixel(monkeypatch, np.eye(2), [[1., -1.], [-1., 1.]])
    image = jnp.zeros((1, 8, 8, 2)).at[0, 0, 0].set([1., 0.]).at[0, 3, 5].set([0., 1.])
    image = image.at[0, 7, 2].set([.75, .25])
    first, second = np.zeros((2, 8, 8))
    first[0, 0], first[7, 2], second[3, 5] = 1, 0.5, 1
    np.testing.assert_allclose(explain.grad_cam(params, image)[0], first, atol=1e-6)
    both = explain.grad_cam(params, jnp.repeat(image, 2, axis=0), jnp.array([0, 1]))
    np.testing.assert_allclose(both, [first, second], atol=1e-6)


def test_grad_cam_is_pytorchs(torch, tiny64, small_batch):
    """The second half of the network with autograd, from what the last block puts out."""
    images = jnp.asarray(small_batch.images, float)
    maps = torch.tensor(np.asarray(models.activations(tiny64, images)[1]["block2"]))
    maps = maps.permute(0, 3, 1, 2).clone().requires_grad_()
    dense = {name: torch.tensor(np.asarray(leaf)) for name, leaf in tiny64.weights["dense"].items()}
    pooled = torch.nn.functional.max_pool2d(maps, 2).permute(0, 2, 3, 1)
    logits = pooled.reshape(len(images), -1) @ dense["kernel"] + dense["bias"]
    np.testing.assert_allclose(logits.detach(), models.apply(tiny64, images), rtol=1e-9)
    logits.max(dim=1).values.sum().backward()
    heat = (maps.grad.mean(dim=(2, 3), keepdim=True) * maps).sum(dim=1, keepdim=True).relu()
    heat = torch.nn.functional.interpolate(heat, SHAPE[:2], mode="bilinear")[:, 0]
    peak = heat.amax(dim=(1, 2), keepdim=True)
    expected = torch.where(peak > 0, heat / peak, 0.0).detach().numpy()
    assert expected.max() == 1
    np.testing.assert_allclose(explain.grad_cam(tiny64, images), expected, atol=1e-9)


def test_grad_cam_lies_in_0_to_1_and_is_as_large_as_the_image(tiny, small_batch):
    images = jnp.asarray(small_batch.images)
    found = explain.grad_cam(tiny, images)
    assert found.shape == images.shape[:3] and 0 <= found.min() and found.max() == 1
    np.testing.assert_allclose(jax.jit(explain.grad_cam)(tiny, images), found, atol=1e-5)
    np.testing.assert_allclose(explain.grad_cam(tiny, images[2:3])[0], found[2], atol=1e-5)
    dead = dataclasses.replace(tiny, weights=jax.tree.map(jnp.zeros_like, tiny.weights))
    assert (explain.grad_cam(dead, images) == 0).all()  # not NaN


def test_an_offset_moves_its_block_and_what_follows(tiny, small_batch):
    images = jnp.asarray(small_batch.images)
    logits, blocks, _ = models.activations(tiny, images)
    offsets = {name: jnp.zeros_like(block) for name, block in blocks.items()}
    same, _, _ = models.activations(tiny, images, offsets=offsets)
    np.testing.assert_array_equal(same, logits)
    moved = models.activations(tiny, images, offsets={**offsets, "block2": offsets["block2"] + 1})
    np.testing.assert_allclose(moved[1]["block2"], blocks["block2"] + 1, rtol=1e-6)
    # The last layer is linear, and pooling passes a constant on.
    step = np.asarray(tiny.weights["dense"]["kernel"]).sum(axis=0)
    np.testing.assert_allclose(moved[0], np.asarray(logits) + step, atol=1e-4)


@pytest.mark.parametrize("name, convolution, block", [
    ("small_vgg", "conv6", "block3"), ("resnet18", "layer4_1/conv2", "block4"),
    ("preact_resnet18", "layer4_1/conv2", "block4"), ("vgg19_bn", "conv16", "block5"),
    ("shufflenet_v2", "conv2", "block4"), ("mobilenet_v2", "conv2", "block4"),
    ("cnn", "conv2", "block2")])
def test_where_each_network_is_looked_at(name, convolution, block):
    arch = Arch(name=name, num_classes=10)
    assert explain.last_convolution(arch) == convolution
    assert explain.last_map(arch) == block


def test_networks_that_have_nothing_to_look_at():
    mlp = Arch(name="mlp", num_classes=10)
    with pytest.raises(ValueError, match="with convolutions, mlp has none"):
        explain.last_convolution(mlp)
    with pytest.raises(ValueError, match=r"more than one pixel.*mlp has none"):
        explain.last_map(mlp)
    module = Unmoved()
    variables = module.init(jax.random.key(0), jnp.zeros((1, *SHAPE)))
    params = Params.from_flax(module, {"params": variables["params"]}, image_shape=SHAPE)
    assert explain.last_convolution(params.arch) == "conv"
    with pytest.raises(ValueError, match=r"self\.perturb\('block1', x\)"):
        explain.grad_cam(params, jnp.zeros((1, *SHAPE)))
    with pytest.raises(ValueError, match=r"\(1, 1, 1, 2\) and \(1, 1, 1, 3\)"):
        explain.tac(jnp.zeros((1, 1, 1, 2)), jnp.zeros((1, 1, 1, 3)))
