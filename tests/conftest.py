"""Shared fixtures: strict shapes, small networks, real data where it is."""

import gc
import os
import pathlib
from importlib import metadata

# Compiling is most of the suite's time: optimise less, set before JAX starts. The older way to
# compile fusions takes less time too; XLA stops at flags that it does not know, so it is asked of
# the version alone that was tried.
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
if metadata.version("jaxlib").startswith("0.10."):
    os.environ["XLA_FLAGS"] = (  # the second as `awm_jax.programs.tune` has it
        os.environ.get("XLA_FLAGS", "") + " --xla_cpu_use_fusion_emitters=false"
        " --xla_cpu_experimental_ynn_fusion_type=reduce").strip()

# Commands convolve in bfloat16 on a processor that has a unit for it; tests of that ask for it.
os.environ["JAX_DEFAULT_MATMUL_PRECISION"] = "float32"

# What the workers of a run, and the next run, need not compile again.
os.environ["JAX_COMPILATION_CACHE_DIR"] = os.environ.get("JAX_COMPILATION_CACHE_DIR") or str(
    pathlib.Path(__file__).resolve().parents[1] / ".pytest_cache" / "programs")
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.3"

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from awm_jax import data, models, torch_compat
from awm_jax.models import layers, ops
from awm_jax.types import Arch, Batch, Params

jax.config.update("jax_numpy_rank_promotion", "raise")

# Programs that tests start, not modules to look for doctests in: there are two conftest.py.
collect_ignore = ["sweep_devices.py", "sweep_host.py"]

SHARED = pathlib.Path(__file__).resolve().parents[2] / "shared" / "data"


class TinyCNN(nn.Module):
    """Two convolutions with BatchNorm, sown as two blocks, and one dense layer."""

    num_classes: int
    features: tuple[int, ...] = (6, 8)

    @staticmethod
    def norm_inputs():
        return {"bn1": "conv1", "bn2": "conv2"}

    @nn.compact
    def __call__(self, x, train: bool):
        for i, features in enumerate(self.features, start=1):
            x = nn.Conv(features, (3, 3), padding=1, name=f"conv{i}",
                        conv_general_dilated=ops.flax_conv)(x)
            x = nn.BatchNorm(use_running_average=not train, momentum=0.9, name=f"bn{i}")(x)
            x = ops.elu(x)
            x = ops.max_pool_2x2(layers.block(self, f"block{i}", x))
        x = nn.Dropout(0.2, deterministic=not train)(x)
        return nn.Dense(self.num_classes, name="dense")(x.reshape(x.shape[0], -1))


class OneBlockCNN(TinyCNN):
    """The first of the two alone: less to compile, where many programs are compiled."""

    features: tuple[int, ...] = (6,)

    @staticmethod
    def norm_inputs():
        return {"bn1": "conv1"}


def _maps() -> int:
    """Memory maps of this process; every compiled program has several. 0 where none can tell."""
    maps = pathlib.Path("/proc/self/maps")
    return maps.read_bytes().count(b"\n") if maps.exists() else 0


@pytest.fixture(scope="module", autouse=True)
def few_programs():
    """Drops programs well before the kernel's limit on maps, past which compiling crashes."""
    yield
    if _maps() > 30_000:  # of 65,530
        jax.clear_caches()
        gc.collect()


@pytest.fixture(scope="module")
def optimised():
    """Compiles as for users: for tests that run for longer than their programs take to compile."""
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture(scope="session", autouse=True)
def _tiny_is_known():
    ours = {"tiny_cnn": TinyCNN, "one_block_cnn": OneBlockCNN}
    models.MODELS.update(ours)
    yield
    for name in ours:
        del models.MODELS[name]


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
def arrays(small_params):
    """Its tensors, by PyTorch's names."""
    return torch_compat.arrays_from_params(small_params)


@pytest.fixture(scope="session")
def torch():
    """PyTorch, or a skip where it is absent."""
    return pytest.importorskip("torch")


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


@pytest.fixture(scope="session")
def tiny(_tiny_is_known) -> Params:
    """A random tiny network with BatchNorm statistics that are not the initial ones."""
    return _random("tiny_cnn")


@pytest.fixture(scope="session")
def one_block(_tiny_is_known) -> Params:
    """The same with one block."""
    return _random("one_block_cnn")


def _random(name: str) -> Params:
    """A network whose numbers are not the initial ones."""
    params = models.create(jax.random.key(0), Arch(name=name, num_classes=4,
                                                   image_shape=(8, 8, 3)))
    keys = iter(jax.random.split(jax.random.key(1), 20))

    def move(leaf):
        return leaf * jax.random.uniform(next(keys), leaf.shape, minval=0.5, maxval=1.5)

    weights = jax.tree.map(lambda w: w + 0.1 * jax.random.normal(next(keys), w.shape),
                           params.weights)
    return Params(weights, jax.tree.map(move, params.batch_stats), params.arch)


@pytest.fixture
def tiny64(x64, tiny) -> Params:
    """`tiny` in float64."""
    def wide(tree):
        return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), tree)

    return Params(wide(tiny.weights), wide(tiny.batch_stats), tiny.arch)


def tiny_images(count):
    """Dark and bright 8x8 images of ten classes, and their labels."""
    labels = (np.arange(count) % 10).astype(np.int32)
    noise = np.random.default_rng(count).integers(0, 30, (count, 8, 8, 3))
    return (noise + 20 * labels[:, None, None, None]).astype(np.uint8), labels


@pytest.fixture
def tiny_dataset(monkeypatch, tmp_path):
    """The commands' data set: dark and bright 8x8 images, and an empty cache; gives a folder."""
    monkeypatch.setenv("AWM_CACHE_DIR", str(tmp_path / "cache"))
    dataset = data.Dataset("digits", *tiny_images(200), *tiny_images(90), 10, False)
    monkeypatch.setattr(data, "load", lambda name, data_dir=None, **options: dataset)
    return tmp_path
