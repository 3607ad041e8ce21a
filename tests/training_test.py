"""Training: it learns, resumes exactly and compiles once."""

import jax
import numpy as np
import pytest

from awm_jax import metrics, training
from awm_jax.types import Arch

ARCH = Arch(name="tiny_cnn", num_classes=2, image_shape=(8, 8, 3))
CONFIG = training.TrainConfig(epochs=6, batch_size=16, augment=False)


def _data():
    """Dark and bright images."""
    rng = np.random.default_rng(0)
    labels = np.arange(64, dtype=np.int32) % 2
    images = rng.integers(0, 100, (64, 8, 8, 3)) + 150 * labels[:, None, None, None]
    return images.astype(np.uint8), labels


def test_learns_and_reports_every_epoch():
    images, labels = _data()
    seen = []
    params = training.train(jax.random.key(0), images, labels, ARCH, CONFIG,
                            on_epoch=lambda done, total, state, loss: seen.append((done, loss)))
    assert [done for done, _ in seen] == [1, 2, 3, 4, 5, 6]
    assert seen[-1][1] < seen[0][1]
    assert (metrics.predict(params, images, batch_size=64) == labels).mean() > 0.95


def test_interrupted_training_ends_where_the_uninterrupted_one_does():
    images, labels = _data()
    kept = {}

    def keep(done, total, state, loss):
        kept[done] = jax.device_get(state)

    whole = training.train(jax.random.key(1), images, labels, ARCH, CONFIG, on_epoch=keep)
    resumed = training.train(jax.random.key(1), images, labels, ARCH, CONFIG, state=kept[2])
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(resumed), strict=True):
        np.testing.assert_array_equal(a, b)


def test_bad_data_is_named():
    images, labels = _data()
    with pytest.raises(ValueError, match="uint8"):
        training.train(jax.random.key(0), images / 255.0, labels, ARCH, CONFIG)
    with pytest.raises(ValueError, match=r"labels in 0\.\.1"):
        training.train(jax.random.key(0), images, labels + 1, ARCH, CONFIG)
    with pytest.raises(ValueError, match="num_images=8"):
        training.train(jax.random.key(0), images[:8], labels[:8], ARCH, CONFIG)
    with pytest.raises(ValueError, match="peak_lr"):
        training.TrainConfig(peak_lr=0.0)


def test_divergence_is_reported():
    images, labels = _data()
    config = training.TrainConfig(epochs=2, batch_size=16, peak_lr=1e30, augment=False)
    with pytest.raises(FloatingPointError, match="peak_lr"):
        training.train(jax.random.key(0), images, labels, ARCH, config)


def test_a_state_can_be_gone_on_from_twice():
    """It is the caller's: the run copies it before its first epoch takes the memory."""
    images, labels = _data()
    kept = []

    def keep(done, total, state, loss):
        if done == 1:
            kept.append(jax.tree.map(jax.numpy.copy, state))

    config = training.TrainConfig(epochs=2, batch_size=16, augment=False)
    whole = training.train(jax.random.key(1), images, labels, ARCH, config, on_epoch=keep)
    for _ in range(2):
        again = training.train(jax.random.key(1), images, labels, ARCH, config, state=kept[0])
        jax.tree.map(np.testing.assert_array_equal, again, whole)
