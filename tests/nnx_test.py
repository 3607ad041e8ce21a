"""Flax NNX models of others in place of networks of ours."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import awm_jax
from awm_jax import defences, models
from awm_jax.types import Arch, Batch, Params

SHAPE = (8, 8, 3)


class Net(nnx.Module):
    """Convolutions in a list, BatchNorm behind the first, dropout, a dense layer."""

    def __init__(self, *, rngs, width=6, rate=0.5):
        self.convs = nnx.List([nnx.Conv(3, width, (3, 3), rngs=rngs),
                               nnx.Conv(width, 4, (3, 3), rngs=rngs)])
        self.norm = nnx.BatchNorm(width, momentum=0.9, rngs=rngs)
        self.dropout = nnx.Dropout(rate, rngs=rngs)
        self.head = nnx.Linear(4, 3, rngs=rngs)

    def __call__(self, x):
        x = nnx.max_pool(nnx.relu(self.norm(self.convs[0](x))), (2, 2), (2, 2))
        x = nnx.relu(self.convs[1](x)).mean((1, 2))
        return self.head(self.dropout(x))


@pytest.fixture(scope="module")
def images():
    return jnp.asarray(np.random.default_rng(0).random((6, *SHAPE), np.float32))


def _model(**options):
    """A model whose statistics matter."""
    model = Net(rngs=nnx.Rngs(0), **options)
    model.norm.mean[...] += 0.3
    model.norm.var[...] += 0.5
    return model


def test_it_says_what_the_model_says(images):
    model = _model()
    params = Params.from_nnx(model, image_shape=SHAPE)
    assert params.arch.name == "nnx:Net" and params.arch.num_classes == 3
    model.eval()
    np.testing.assert_allclose(models.apply(params, images), model(images), atol=1e-5)
    assert set(params.weights["convs"]) == {"0", "1"}
    assert models.norm_inputs(params.arch) == {"norm": "convs/0"}
    assert models.deep_convolutions(params.arch) == ("convs/1",)
    drawn = models.create(jax.random.key(0), params.arch)
    assert jax.tree.map(jnp.shape, drawn.to_flax()) == jax.tree.map(jnp.shape, params.to_flax())


def test_convolutions_are_lowered_as_ours(images):
    """XLA's own are many times as slow in a loop on a CPU (docs/performance.md)."""
    params = Params.from_nnx(_model(), image_shape=SHAPE)
    traced = str(jax.make_jaxpr(models.apply)(params, images))
    assert traced.count("custom_vjp_call") == 2  # both convolutions
    strided = nnx.Conv(3, 4, (3, 3), kernel_dilation=2, rngs=nnx.Rngs(0))  # XLA's own does it
    net = nnx.Sequential(strided, lambda x: x.mean((1, 2)))
    net.eval()
    params = Params.from_nnx(net, image_shape=SHAPE)
    np.testing.assert_allclose(models.apply(params, images), net(images), atol=1e-5)


def test_normalised(images):
    model = _model()
    params = Params.from_nnx(model, image_shape=SHAPE, mean=(0.5,) * 3, std=(0.25,) * 3)
    model.eval()
    np.testing.assert_allclose(models.apply(params, images), model((images - 0.5) / 0.25),
                               atol=1e-5)


def test_training_mode_is_the_models_own(images):
    model = _model(rate=0.0)
    params = Params.from_nnx(model, image_shape=SHAPE)
    model.train()
    theirs = model(images)
    ours, stats = models.apply_train(params, images, key=jax.random.key(0))
    np.testing.assert_allclose(ours, theirs, atol=1e-5)
    np.testing.assert_allclose(stats["norm"]["mean"], model.norm.mean[...], atol=1e-6)
    np.testing.assert_allclose(stats["norm"]["var"], model.norm.var[...], atol=1e-6)
    assert np.abs(stats["norm"]["mean"] - params.batch_stats["norm"]["mean"]).max() > 1e-3


def test_dropout_follows_the_key(images):
    params = Params.from_nnx(_model(), image_shape=SHAPE)
    one, again, other = (models.apply_train(params, images, key=jax.random.key(seed))[0]
                         for seed in (0, 0, 1))
    np.testing.assert_array_equal(one, again)
    assert np.abs(one - other).max() > 1e-3


def test_the_model_is_not_changed_until_told(images):
    model = _model()
    model.eval()
    before = model(images)
    params = Params.from_nnx(model, image_shape=SHAPE)
    models.apply_train(params, images, key=jax.random.key(0))
    np.testing.assert_array_equal(model(images), before)  # still in evaluation, too
    labels = jnp.asarray(models.apply(params, images).argmax(axis=1))
    config = awm_jax.AWMConfig(variant="paper", epochs=1, inner_steps=1, outer_steps=2)
    purified = awm_jax.purify(params, Batch(images, labels), config=config)
    purified.params.to_nnx(model)
    np.testing.assert_allclose(model(images), models.apply(purified.params, images), atol=1e-5)
    np.testing.assert_allclose(model(images), models.apply(params, images, masks=purified.masks),
                               atol=1e-5)
    assert np.abs(model(images) - before).max() > 1e-4


@pytest.mark.parametrize("name, settings", [
    ("awm", {"epochs": 1, "inner_steps": 1, "outer_steps": 1}), ("ft", {"epochs": 1}),
    ("anp", {"steps": 1, "prune": "number", "number": 2}), ("clp", {"u": 0.0}),
    ("nft", {"epochs": 1}),
    ("mcr", {"epochs": 1, "end_epochs": 1})])
def test_defences_work_on_it(name, settings, images):
    params = Params.from_nnx(_model(), image_shape=SHAPE)
    labels = models.apply(params, images).argmax(axis=1)
    defence = getattr(defences, name)
    found = defence(params, Batch(images, labels), config=defence.Config(**settings))
    changed = [bool((a != b).any()) for a, b in zip(
        jax.tree.leaves(params), jax.tree.leaves(found.params), strict=True)]
    assert any(changed) and found.params.arch == params.arch


class Takes(nnx.Module):
    """What is wrong with it is its function."""

    def __init__(self, call, extra=None):
        self.call = call
        self.norm = nnx.BatchNorm(3, rngs=nnx.Rngs(0))
        if extra is not None:
            self.extra = extra

    def __call__(self, x):
        return self.call(self, x)


@pytest.mark.parametrize("model, error, message", [
    (object(), TypeError, "Params.from_flax takes Linen"),
    (Takes(lambda self, x: x), ValueError, r"return logits \[B, c\]"),
    (Takes(lambda self, x: self.nothing), ValueError, "AttributeError"),
    (Takes(lambda self, x: self.norm(x).mean((1, 2)), nnx.Cache(jnp.zeros(2))), ValueError,
     "got also Cache"),
    (Takes(lambda self, x: self.norm(x, use_running_average=False).mean((1, 2))), ValueError,
     "normalises by the batch")])
def test_what_cannot_be_used_is_refused(model, error, message):
    with pytest.raises(error, match=message):
        Params.from_nnx(model, image_shape=SHAPE)


def test_another_model_is_not_written_to(images):
    params = Params.from_nnx(_model(), image_shape=SHAPE)
    with pytest.raises(ValueError, match="other names or shapes"):
        params.to_nnx(_model(width=7))
    ours = models.create(jax.random.key(0), Arch(name="small_vgg", num_classes=3,
                                                 image_shape=SHAPE))
    for model, network in ((object(), params), (_model(), ours)):
        with pytest.raises(TypeError, match="Expected an NNX model"):
            network.to_nnx(model)
