"""Fine-Pruning: channels removed by another way, accuracies by running the network again."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from awm_jax import defences, models
from awm_jax.defences.base import map_weights
from awm_jax.defences.fine_prune import (
    FinePruneConfig,
    _accuracies,
    _candidates,
    choose,
    head,
    prune,
)
from awm_jax.types import Batch

CONFIG = FinePruneConfig(epochs=2, batch_size=4, crop=1)


def _without(weights, pruned):
    """A network's weights without those channels."""
    dense = weights["dense"]
    return {**weights, "dense": {**dense, "kernel": prune(dense["kernel"], pruned)}}


@pytest.fixture(scope="module")
def data(tiny):
    """Twenty images, most of them with the label that the network gives."""
    images = np.random.default_rng(0).random((20, 8, 8, 3), np.float32)
    labels = np.array(models.apply(tiny, jnp.asarray(images)).argmax(axis=1), np.int32)
    labels[::7] = (labels[::7] + 1) % 4
    return jnp.asarray(images), jnp.asarray(labels)


@pytest.fixture(scope="module")
def purify():
    """One compilation for each setting of these tests."""
    return jax.jit(defences.fp.run, static_argnames="config")


@pytest.mark.parametrize("accuracies, drop, index", [
    ([0.8, 0.78, 0.6, 0.8], 0.1, 1),
    ([0.5, 0.5, 0.5], 0.0, 2),
    ([0.5, 0.4, 0.3], 0.0, 0),
    ([1.0, 0.9, 0.8999], 0.1, 1),  # a tenth exactly is still allowed
    ([0.8, 0.1, 0.0], 1.0, 2),
    ([0.0, 0.0, 0.0], 0.1, 0),
])
def test_choose_by_hand(accuracies, drop, index):
    assert int(choose(jnp.array(accuracies), drop)) == index


def test_candidates_by_hand():
    assert _candidates(8).tolist() == list(range(8))
    assert _candidates(128).tolist()[:3] == [0, 1, 2] and _candidates(128).tolist()[-1] == 126
    assert _candidates(512).tolist()[1:3] == [5, 10] and len(_candidates(512)) == 100


def test_pruned_rows_are_a_silent_channel(tiny, data):
    """Without scale and bias a channel is zero before and after ELU and pooling."""
    pruned = jnp.arange(8) % 3 == 1

    def silence(path, leaf):
        return jnp.where(pruned, 0.0, leaf) if path.startswith("bn2/") else leaf

    silent = dataclasses.replace(tiny, weights=map_weights(silence, tiny.weights))
    cut = dataclasses.replace(tiny, weights=_without(tiny.weights, pruned))
    np.testing.assert_allclose(models.apply(cut, data[0]), models.apply(silent, data[0]), atol=1e-5)
    assert not np.allclose(models.apply(cut, data[0]), models.apply(tiny, data[0]), atol=1e-2)


@pytest.mark.parametrize("name", ["tiny_cnn", "pooled"])
def test_accuracies_are_those_of_the_pruned_network(name, tiny, data, monkeypatch):
    """Each candidate by running the whole network; flattened and pooled classifiers."""
    params = tiny
    if name == "pooled":
        monkeypatch.setitem(models.MODELS, name, _Pooled)
        params = models.create(jax.random.key(5), dataclasses.replace(tiny.arch, name=name))
    images, labels = data
    found = head(params, images)
    ranks = jnp.asarray(np.random.default_rng(1).permutation(8))
    counts = _candidates(8)
    dense = params.weights["dense"]
    wanted = []
    for count in counts:
        cut = dataclasses.replace(params, weights=_without(params.weights, ranks < count))
        wanted.append(float((models.apply(cut, images).argmax(axis=1) == labels).mean()))
    np.testing.assert_allclose(_accuracies(found.inputs, labels, dense, ranks, counts), wanted)
    assert len(set(wanted)) > 2
    logits = found.inputs @ dense["kernel"] + dense["bias"][None]
    np.testing.assert_allclose(logits, models.apply(params, images), atol=1e-5)
    block = models.activations(params, images)[1]["block2"]
    np.testing.assert_allclose(found.activity, np.asarray(block).mean(axis=(1, 2)), atol=1e-5)


class _Pooled(nn.Module):
    """A classifier behind an average pool."""

    num_classes: int

    @nn.compact
    def __call__(self, x, train: bool):
        for i in (1, 2):
            x = nn.Conv(8, (3, 3), name=f"conv{i}")(x)
            x = nn.BatchNorm(use_running_average=not train, name=f"bn{i}")(x)
            x = nn.relu(x)
            self.sow("intermediates", f"block{i}", x)
        return nn.Dense(self.num_classes, name="dense")(x.mean(axis=(1, 2)))


def test_the_least_active_go_first_and_stay_zero(tiny, data, purify):
    """Channel 2 is put to sleep: ELU's lowest value everywhere."""
    def sleep(path, leaf):
        if path == "bn2/scale":
            return leaf.at[2].set(0.0)
        return leaf.at[2].set(-20.0) if path == "bn2/bias" else leaf

    params = dataclasses.replace(tiny, weights=map_weights(sleep, tiny.weights))
    found = purify(jax.random.key(0), params, *data, config=dataclasses.replace(
        CONFIG, max_drop=0.4))
    info = found.info
    number = int(info["number"])
    assert 1 <= number < 8 and int(info["activity"].argmin()) == 2
    assert set(np.flatnonzero(info["pruned"])) == set(np.argsort(info["activity"])[:number])
    assert (info["accuracies"][:number + 1] >= 0.6 * info["accuracies"][0] - 1e-6).all()
    rows = np.asarray(found.params.weights["dense"]["kernel"]).reshape(-1, 8, 4)
    assert (rows[:, info["pruned"]] == 0).all() and (rows[:, ~info["pruned"]] != 0).all()
    # Ten images are held out, so accuracies are tenths.
    tenths = np.asarray(info["accuracies"]) * 10
    np.testing.assert_allclose(tenths, tenths.round(), atol=1e-4)


def test_nothing_is_pruned_where_the_network_is_always_wrong(tiny, data, purify):
    wrong = (models.apply(tiny, data[0]).argmax(axis=1) + 1) % 4
    found = purify(jax.random.key(0), tiny, data[0], wrong.astype(jnp.int32),
                   config=dataclasses.replace(CONFIG, max_drop=0.4))
    assert int(found.info["number"]) == 0 and not found.info["pruned"].any()
    assert float(found.info["accuracies"][0]) == 0.0


def test_one_image_is_both_held_out_and_ranked(tiny, data):
    """The second image, which the network gets right."""
    batch = Batch(*(np.asarray(part[1:2]) for part in data))
    found = defences.fp(tiny, batch, config=dataclasses.replace(CONFIG, epochs=1))
    assert float(found.info["accuracies"][0]) == 1.0
    assert found.status is not defences.Status.NONFINITE


@pytest.mark.parametrize("bad", [{"max_drop": 1.1}, {"held_out": 0.0}, {"lr": 0.0}])
def test_refuses_bad_settings(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        FinePruneConfig(**bad)
