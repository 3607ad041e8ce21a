"""The last dense layer is found whatever it is called, and what works on it works there."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

from awm_jax import masks, models
from awm_jax.attacks.trojannn import connected, trojannn
from awm_jax.defences import DEFENCES, neurons
from awm_jax.types import Arch, Batch, Params

SHAPE, CLASSES = (8, 8, 3), 4


class Head(nn.Module):
    """A hidden layer as wide as there are classes, the classifier, and one beside it."""

    beside: bool = False

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(CLASSES, name="in")(x))
        logits = nn.Dense(CLASSES, name="out")(inputs=x)
        if self.beside:  # after the classifier, and of no use to it
            nn.Dense(CLASSES, name="beside")(x)
        return logits


class Net(nn.Module):
    """Its classifier is ``head/out``."""

    beside: bool = False

    @nn.compact
    def __call__(self, x, train: bool = False):
        x = nn.relu(nn.Conv(6, (3, 3), name="conv")(x)).mean((1, 2))
        return Head(self.beside, name="head")(x)


class Ends(nn.Module):
    """Its logits are what a function makes of pooled pixels."""

    end: object

    @nn.compact
    def __call__(self, x):
        return self.end(x.mean((1, 2)))


def _two(x):
    return nn.Dense(CLASSES, name="one")(x) + nn.Dense(CLASSES, name="two")(x)


def _bfloat16(x):
    return nn.Dense(CLASSES, name="out", dtype=jnp.bfloat16)(x).astype(jnp.float32)


class Renamed(nn.Module):
    """The same network by this library's names, one block sown."""

    num_classes: int

    @nn.compact
    def __call__(self, x, train: bool):
        x = nn.relu(nn.Conv(6, (3, 3), name="conv")(x)).mean((1, 2))
        x = nn.relu(nn.Dense(CLASSES, name="in")(x))
        self.sow("intermediates", "block1", x[:, None, None])
        return nn.Dense(self.num_classes, name="dense")(x)


class Perceptron(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(CLASSES, name="hidden")(x.reshape(len(x), -1)))
        return nn.Dense(CLASSES, name="out")(x)


class NNXNet(nnx.Module):
    def __init__(self, rngs):
        self.parts = nnx.List([nnx.Conv(3, 6, (3, 3), rngs=rngs),
                               nnx.Linear(6, CLASSES, rngs=rngs),
                               nnx.Linear(CLASSES, CLASSES, rngs=rngs)])

    def __call__(self, x):
        x = nnx.relu(self.parts[0](x)).mean((1, 2))
        passing = nnx.Linear(CLASSES, CLASSES, rngs=nnx.Rngs(0))  # no part of the model
        passing(self.parts[1](x))
        return self.parts[2](inputs=nnx.relu(self.parts[1](x)))


def _foreign(net):
    variables = net.init(jax.random.key(0), jnp.zeros((1, *SHAPE)))
    return Params.from_flax(net, variables, image_shape=SHAPE)


@pytest.fixture(scope="module")
def batch():
    rng = np.random.default_rng(0)
    return Batch(jnp.asarray(rng.random((12, *SHAPE)), jnp.float32),
                 jnp.asarray(np.arange(12) % CLASSES))


@pytest.fixture
def pair(monkeypatch):
    """One network twice: a module of somebody else's, and by names of ours."""
    monkeypatch.setitem(models.MODELS, "renamed", Renamed)
    foreign = _foreign(Net())
    head = foreign.weights["head"]
    weights = {"conv": foreign.weights["conv"], "in": head["in"], "dense": head["out"]}
    return foreign, Params(weights, {}, Arch(name="renamed", num_classes=CLASSES,
                                             image_shape=SHAPE))


@pytest.mark.parametrize("net, name", [
    (Net(), "head/out"), (Net(beside=True), "head/out"), (Perceptron(), "out"),
    (Ends(lambda x: nn.Dense(CLASSES, name="out")(nn.Dense(7)(x)) / 3), "out"),
    (Ends(lambda x: nn.log_softmax(nn.Dense(CLASSES, name="out")(x))), "out"),
    (Ends(_bfloat16), "out"), (Ends(_two), None),  # of two, neither alone gives them
    (nn.Sequential([lambda x: x.mean((1, 2)), nn.Dense(CLASSES)]), "layers_1"),
    (nn.Sequential([nn.Conv(CLASSES, (3, 3)), lambda x: x.mean((1, 2))]), None)])
def test_it_is_what_gives_the_logits(net, name):
    assert models.classifier(_foreign(net).arch) == name


@pytest.mark.parametrize("name", sorted(models.MODELS))
def test_ours_are_called_dense(name):
    assert models.classifier(Arch(name=name, num_classes=10)) == "dense"


@pytest.mark.parametrize("make", [
    lambda: _foreign(Net()), lambda: _foreign(Ends(_bfloat16)),
    lambda: Params.from_nnx(NNXNet(nnx.Rngs(0)), image_shape=SHAPE)])
def test_features_are_what_it_sees(make, batch):
    params = make()
    layer = models.layer(params.weights, models.classifier(params.arch))
    found = jax.jit(models.features)(params, batch.images)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found @ layer["kernel"] + layer["bias"][None],
                               models.apply(params, batch.images),
                               atol=0.02 if "Ends" in params.arch.name else 1e-6)


def test_a_classifier_in_a_list_of_an_nnx_model():
    params = Params.from_nnx(NNXNet(nnx.Rngs(0)), image_shape=SHAPE)
    assert models.classifier(params.arch) == "parts/2"


def test_normalised_features(batch):
    net = Net()
    variables = net.init(jax.random.key(0), jnp.zeros((1, *SHAPE)))
    plain, normalised = (Params.from_flax(net, variables, image_shape=SHAPE, mean=(m,) * 3)
                         for m in (0.0, 0.5))
    np.testing.assert_allclose(models.features(normalised, batch.images),
                               models.features(plain, batch.images - 0.5), atol=1e-6)


@pytest.mark.parametrize("name, settings", [
    ("fst", {"epochs": 2}), ("ngd", {"steps": 3}), ("fp", {"epochs": 2, "max_drop": 1.0})])
def test_another_name_is_no_other_result(name, settings, pair, batch):
    defence = DEFENCES[name]
    config = dataclasses.replace(defence.default, **settings)
    theirs, ours = (defence(params, batch, key=1, config=config).params.weights
                    for params in pair)
    head = theirs.pop("head")
    renamed = {**theirs, "in": head["in"], "dense": head["out"]}
    assert (renamed["dense"]["kernel"] != pair[1].weights["dense"]["kernel"]).any()
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), renamed, ours)
    if name == "ngd":  # nothing else moves
        np.testing.assert_array_equal(head["in"]["kernel"], pair[1].weights["in"]["kernel"])


def test_clusters_of_a_foreign_modules_features(pair, batch):
    images = (255 * np.asarray(batch.images)).astype(np.uint8)
    ac = DEFENCES["ac"]
    config = dataclasses.replace(ac.default, epochs=1, batch_size=4)
    kept = [ac(params, Batch(images, batch.labels), key=0, config=config).info["kept"]
            for params in pair]
    np.testing.assert_array_equal(*kept)


def test_a_perceptrons_classifier_has_neither_masks_nor_neurons(batch):
    """Its hidden layer is as wide as there are classes, so that no shape tells."""
    params = _foreign(Perceptron())
    assert list(neurons.ones(params).weight) == ["hidden"]
    last = models.classifier(params.arch)
    chosen = masks.init(params.weights, "conv", classifier=last)
    assert list(masks.by_layer(chosen)) == ["hidden"]
    config = dataclasses.replace(DEFENCES["swm"].default, steps=2)
    found = DEFENCES["swm"](params, batch, key=0, config=config).params.weights
    assert (found["hidden"]["kernel"] != params.weights["hidden"]["kernel"]).any()
    np.testing.assert_array_equal(found["out"]["kernel"], params.weights["out"]["kernel"])


def test_of_two_heads_neither_is_a_neuron():
    assert list(neurons.ones(_foreign(Ends(lambda x: _two(nn.Dense(7, name="in")(x))))).weight) == [
        "in"]


def test_awm_leaves_a_perceptrons_classifier(batch):
    import awm_jax

    params = _foreign(Perceptron())
    config = awm_jax.AWMConfig(epochs=2, inner_steps=2, outer_steps=2, batch_size=4)
    found = awm_jax.purify(params, batch, config=config)
    assert list(masks.by_layer(found.masks)) == ["hidden"]
    np.testing.assert_array_equal(found.params.weights["out"]["kernel"],
                                  params.weights["out"]["kernel"])


def test_trojannn_takes_any_name(pair, batch):
    theirs, ours = (connected(params, 2) for params in pair)
    np.testing.assert_array_equal(theirs, ours)
    attack = trojannn(jax.random.key(0), SHAPE, CLASSES, params=pair[0],
                               images=batch.images)
    assert np.isfinite(attack.trigger.pattern).all()


def test_one_layer_of_many():
    weights = {"head": {"in": {"kernel": 1}, "out": {"kernel": 2, "bias": 3}}}
    assert models.layer(weights, "head/out") == {"kernel": 2, "bias": 3}
    new = models.with_layer(weights, "head/out", {"kernel": 4})
    assert new == {"head": {"in": {"kernel": 1}, "out": {"kernel": 4}}}
    assert weights["head"]["out"] == {"kernel": 2, "bias": 3}
