"""CLB: the corners, the adversarial perturbation, and who gets which."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from awm_jax import attacks, losses, models
from awm_jax.attacks.clb import corners
from awm_jax.attacks.clb import pgd as unjitted

KEY = jax.random.key(0)
pgd = jax.jit(unjitted, static_argnames=("steps", "apply_fn"))


def _sums(weight, images):
    """Logits: the sum of the values, times a weight for each class."""
    return images.sum(axis=(1, 2)) @ weight


def test_corners_by_hand():
    out = np.asarray(corners((8, 9, 3))(jnp.full((1, 8, 9, 3), 0.5)))[0]
    board = np.array([[0, 0, 1], [0, 1, 0], [1, 0, 1]], float)
    expected = np.full((8, 9), 0.5)
    expected[5:, 6:], expected[5:, :3] = board, board[:, ::-1]
    expected[:3, 6:], expected[:3, :3] = board[::-1], board[::-1, ::-1]
    for channel in range(3):
        np.testing.assert_array_equal(out[..., channel], expected)
    assert expected[[0, 0, -1, -1], [0, -1, 0, -1]].tolist() == [1, 1, 1, 1]


def test_pgd_by_hand():
    """Class 0's logit rises with every value: down to the bound, or to zero before it."""
    weight = jnp.array([[1.0, -1.0]])
    images = jnp.array([0.5, 0.02]).reshape(1, 1, 2, 1)
    out = pgd(weight, images, jnp.array([0]), radius=0.1, steps=4, apply_fn=_sums)
    np.testing.assert_allclose(out.ravel(), [0.4, 0.0], atol=1e-7)
    once = pgd(weight, images, jnp.array([1]), radius=0.1, steps=5, apply_fn=_sums)
    np.testing.assert_allclose(once.ravel(), [0.6, 0.12], atol=1e-7)


def test_pgd_keeps_its_bound_and_raises_the_loss(small_params, small_batch):
    images, labels = jnp.asarray(small_batch.images), jnp.asarray(small_batch.labels)
    loss = jax.jit(lambda x: losses.cross_entropy(models.apply(small_params, x), labels))
    before = images
    for radius in (0.0, 4 / 255, 16 / 255):
        out = pgd(small_params, images, labels, radius=radius, steps=5)
        assert float(jnp.abs(out - images).max()) <= radius + 1e-6
        assert float(out.min()) >= 0 and float(out.max()) <= 1
        assert radius == 0 or loss(out) > loss(before)
        before = out


def test_pgd_is_pytorchs():
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    weight, images = rng.normal(size=(3, 4)), rng.random((5, 2, 2, 3))
    labels = np.array([0, 1, 2, 3, 0])
    x, start = torch.tensor(images), torch.tensor(images)
    for _ in range(6):
        x = x.detach().requires_grad_()
        logits = torch.tanh(x).sum(dim=(1, 2)) @ torch.tensor(weight)
        torch.nn.functional.cross_entropy(logits, torch.tensor(labels)).backward()
        x = x.detach() + 2.5 * 0.1 / 6 * x.grad.sign()
        x = torch.minimum(torch.maximum(x, start - 0.1), start + 0.1).clamp(0, 1)

    def network(weight, x):
        return _sums(weight, jnp.tanh(x))

    with jax.enable_x64(True):
        ours = pgd(jnp.asarray(weight), jnp.asarray(images), jnp.asarray(labels), radius=0.1,
                   steps=6, apply_fn=network)
    np.testing.assert_allclose(ours, x.numpy(), atol=1e-12)


def test_only_training_images_are_perturbed(small_params):
    attack = attacks.make("clb", KEY, (8, 8, 3), 4, params=small_params, target=1)
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (12, 8, 8, 3)).astype(np.uint8)
    labels = np.arange(12, dtype=np.int32) % 4
    found = attacks.poison(KEY, attack, images, labels, 1.0)
    np.testing.assert_array_equal(found.poisoned, labels == 1)
    np.testing.assert_array_equal(found.labels, labels)
    floats = images[labels == 1].astype(np.float32) / 255
    inside = np.asarray(attack.trigger.mask)[None] == 0
    trained, tested = found.images[labels == 1] / 255, np.asarray(attack.apply(floats))
    moved = np.abs(trained - floats) * inside
    assert 8 / 255 < moved.max() <= 16.5 / 255  # uint8 rounds by half a step
    np.testing.assert_allclose(tested * inside, floats * inside)
    np.testing.assert_allclose(trained * ~inside, tested * ~inside, atol=1 / 255)


def test_sizes_and_networks_are_checked(small_params):
    with pytest.raises(ValueError, match="6x6"):
        attacks.make("clb", KEY, (5, 8, 3), 4)
    with pytest.raises(ValueError, match="num_classes=10, got 4"):
        attacks.make("clb", KEY, (8, 8, 3), 10, params=small_params)
