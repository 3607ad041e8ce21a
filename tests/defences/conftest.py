"""What tests of defences share: two more networks, and a fully connected one."""

import jax
import pytest
from small_networks import NETWORKS

from awm_jax import models
from awm_jax.types import Arch, Batch, Params


@pytest.fixture(scope="session", autouse=True)
def _plain_networks_are_known():
    models.MODELS.update(NETWORKS)
    yield
    for name in NETWORKS:
        del models.MODELS[name]


@pytest.fixture(scope="session")
def plain_mlp() -> Params:
    """The fully connected network, random, for the same images."""
    return models.create(jax.random.key(0), Arch(name="mlp", num_classes=4, image_shape=(8, 8, 3)))


@pytest.fixture(scope="session")
def tiny_batch(small_batch) -> Batch:
    """Six images with labels, in [0, 1]."""
    return small_batch
