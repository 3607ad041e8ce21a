"""Shared fixtures: strict shapes, small networks, real data where it is."""

import dataclasses
import os
import pathlib

# Compiling is most of the suite's time: optimise less, set before JAX starts. Level 0 is faster
# still, but with jaxlib 0.10.2 some of its code gives NaN where levels 1 to 3 do not.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_backend_optimization_level=1").strip()

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from awm_jax import data, models
from awm_jax.types import Arch, Batch

jax.config.update("jax_numpy_rank_promotion", "raise")

SHARED = pathlib.Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(scope="session")
def shared_data() -> pathlib.Path:
    """The development data, or a skip where they are absent."""
    if not SHARED.is_dir():
        pytest.skip(f"{SHARED} is absent")
    return SHARED


@pytest.fixture(scope="session")
def small_params():
    """A random small VGG of 8x8 images and four classes: every layer, little work."""
    arch = Arch(name="small_vgg", num_classes=4, image_shape=(8, 8, 3))
    return models.create(jax.random.key(0), arch)


@pytest.fixture(scope="session")
def small_batch():
    """Six images with labels, in [0, 1]."""
    rng = np.random.default_rng(0)
    return Batch(rng.random((6, 8, 8, 3), np.float32), np.array([0, 1, 2, 3, 0, 1], np.int32))


@pytest.fixture
def x64():
    """64-bit arithmetic for the length of one test."""
    with jax.enable_x64(True):
        yield


@pytest.fixture
def small_params64(x64, small_params):
    """`small_params` in float64."""
    def wide(tree):
        return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), tree)

    return dataclasses.replace(small_params, weights=wide(small_params.weights),
                               batch_stats=wide(small_params.batch_stats))


@pytest.fixture
def tiny_dataset(monkeypatch, tmp_path):
    """The commands' data set: dark and bright 8x8 images, and an empty cache; gives a folder."""
    monkeypatch.setenv("AWM_CACHE_DIR", str(tmp_path / "cache"))
    rng = np.random.default_rng(0)

    def images(count):
        labels = (np.arange(count) % 10).astype(np.int32)
        pixels = rng.integers(0, 30, (count, 8, 8, 3)) + 20 * labels[:, None, None, None]
        return pixels.astype(np.uint8), labels

    dataset = data.Dataset("digits", *images(200), *images(90), 10, False)
    monkeypatch.setattr(data, "load", lambda name, data_dir=None, **options: dataset)
    return tmp_path
