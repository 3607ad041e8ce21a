"""What `Defence` adds to every method: checks, a status, and never a NaN."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import awm_jax
from awm_jax import metrics
from awm_jax.defences import DEFENCES, Status, awm_purify
from awm_jax.defences.base import (
    CLASSIFIER,
    EVERYTHING,
    HIDDEN_KERNELS,
    NORMS,
    WEIGHTS,
    Defence,
    by_path,
)
from awm_jax.types import Arch, Batch, Params


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Config:
    factor: float = 1.0


def _scale(key, params, images, labels, config):
    """Multiplies the classifier; NaN for a NaN factor."""
    dense = jax.tree.map(lambda w: w * config.factor, params.weights["dense"])
    return dataclasses.replace(params, weights={**params.weights, "dense": dense}), {
        "sum": images.sum()}


SCALE = Defence(name="scale", method=_scale, default=_Config(), remit=EVERYTHING, paper="none")


@pytest.mark.parametrize("arch, unfit", [("mlp", {"clp", "nft", "nad"}), ("cnn", {"clp", "nft"}),
                                         ("preact_resnet18", set())])
def test_fits_says_which_networks_a_defence_cannot_work_on(arch, unfit):
    shape = Arch(name=arch, num_classes=4, image_shape=(16, 16, 3))
    refused = set()
    for name, defence in DEFENCES.items():
        try:
            defence.fits(shape)
        except ValueError as error:
            assert "Choose another defence" in str(error)
            refused.add(name)
    assert refused == unfit


def test_what_became_nan_is_the_suspect_network_again(tiny, tiny_batch):
    found = SCALE(tiny, tiny_batch, config=_Config(factor=float("nan")))
    assert found.status is Status.NONFINITE and "learning rates" in found.status.advice
    assert all((a == b).all() for a, b in zip(
        jax.tree.leaves(tiny), jax.tree.leaves(found.params), strict=True))


def test_nan_in_the_info_counts_too(tiny, tiny_batch):
    broken = dataclasses.replace(
        SCALE, method=lambda *args: (args[1], {"loss": jnp.full(2, jnp.nan)}))
    assert broken(tiny, tiny_batch).status is Status.NONFINITE


def test_status_compares_answers_on_the_given_images(tiny, tiny_batch):
    assert SCALE(tiny, tiny_batch).status is Status.OK
    assert SCALE(tiny, tiny_batch, config=_Config(factor=-1.0)).status is (
        Status.CLEAN_ACCURACY_LOST)


def test_a_data_free_method_gets_no_images(tiny, tiny_batch):
    free = dataclasses.replace(SCALE, needs="nothing")
    assert free(tiny).info["sum"] == 0 == free(tiny, tiny_batch).info["sum"]


def test_the_training_set_is_uint8(tiny, tiny_batch):
    whole = dataclasses.replace(SCALE, needs="training")
    with pytest.raises(ValueError, match="uint8"):
        whole(tiny, tiny_batch)
    images = np.full((2, 8, 8, 3), 255, np.uint8)
    assert whole(tiny, Batch(images, np.array([0, 3]))).info["sum"] == 255 * images.size
    with pytest.raises(ValueError, match="needs='all'"):
        dataclasses.replace(SCALE, needs="all")


def test_remits(tiny):
    def allowed(remit):
        return {path for path, may in by_path(remit.allows(tiny)).items() if may}

    assert allowed(HIDDEN_KERNELS) == {"conv1/kernel", "conv2/kernel"}
    assert allowed(CLASSIFIER) == {"dense/kernel", "dense/bias"}
    assert allowed(NORMS) == {"bn1/scale", "bn1/bias", "bn2/scale", "bn2/bias"}
    assert allowed(WEIGHTS) == allowed(EVERYTHING) and len(allowed(WEIGHTS)) == 10
    assert EVERYTHING.batch_stats and not WEIGHTS.batch_stats


class _Unnamed(nn.Module):
    """Its last layer has a name of its own, or no bias."""

    name_of_last: str
    bias: bool = True

    @nn.compact
    def __call__(self, x, train: bool = False):
        x = nn.relu(nn.Conv(6, (3, 3))(x))
        self.sow("intermediates", "block1", x)
        return nn.Dense(4, use_bias=self.bias, name=self.name_of_last)(x.mean((1, 2)))


def _foreign(net, batch):
    variables = net.init(jax.random.key(0), batch.images)
    return Params.from_flax(net, {"params": variables["params"]},
                            image_shape=batch.images.shape[1:])


class _Convolutional(nn.Module):
    """No dense layer gives its logits."""

    @nn.compact
    def __call__(self, x, train: bool = False):
        return nn.Conv(4, (3, 3))(nn.Dense(5)(x)).mean((1, 2))


@pytest.mark.parametrize("name", ["fst", "ngd", "fp"])
def test_what_works_on_the_last_layer_wants_a_dense_one(name, tiny_batch):
    with pytest.raises(ValueError, match="flax:_Convolutional to end in a dense layer whose "
                                         "outputs are its 4 classes"):
        DEFENCES[name](_foreign(_Convolutional(), tiny_batch), tiny_batch)


@pytest.mark.parametrize("name, short", [("fst", {"epochs": 1}), ("ngd", {"steps": 2}),
                                         ("fp", {"epochs": 1})])
def test_a_last_layer_of_another_name_and_without_a_bias_will_do(name, short, tiny_batch):
    defence, suspect = DEFENCES[name], _foreign(_Unnamed("head", bias=False), tiny_batch)
    found = defence(suspect, tiny_batch, config=dataclasses.replace(defence.default, **short))
    assert found.status is not Status.NONFINITE
    assert jax.tree.structure(found.params) == jax.tree.structure(suspect)
    assert any((a != b).any() for a, b in zip(jax.tree.leaves(found.params),
                                              jax.tree.leaves(suspect), strict=True))


@pytest.mark.parametrize("settings", [{"epochs": 1.5}, {"batch_size": 2.0}, {"crop": 0.5}])
def test_counts_are_integers(settings):
    name, value = next(iter(settings.items()))
    with pytest.raises(ValueError, match=f"Expected {name}={value} to be an integer"):
        DEFENCES["ft"].Config(**settings)


@pytest.mark.parametrize("name, settings, message", [
    ("ft", {"flip": "False"}, "flip='False' to be True or False"),
    ("ft_sam", {"adaptive": None}, "adaptive=None to be True or False"),
    ("nc", {"always": 1}, "always=1 to be True or False"),
    ("ft", {"epochs": True}, "epochs to be a number, got True"),
    ("ft", {"lr": jnp.array(0.1)}, "lr to be a number"),
    ("ft", {"lr": float("nan")}, "lr=nan > 0"),
    ("nc", {"cost_up": "2"}, "cost_up to be a number, got '2'"),
    ("nc", {"cost_down": 1.0}, "cost_down=1.0 > 1"),
    ("awm", {"tau": "1"}, "tau to be a number, got '1'"),
    ("awm", {"l2_weight": "x"}, "l2_weight to be a number, got 'x'"),
    ("awm", {"layers": 3}, "layers=3 to be a text"),
    ("swm", {"layers": (1, 2)}, r"layers=\(1, 2\) to be a text")])
def test_settings_of_another_kind_are_named(name, settings, message):
    with pytest.raises(ValueError, match=message):
        DEFENCES[name].Config(**settings)


def test_a_seed_is_a_key(tiny, tiny_batch):
    config = DEFENCES["ft"].Config(epochs=1, batch_size=4)
    by_seed, by_key = (DEFENCES["ft"](tiny, tiny_batch, key=key, config=config).params
                       for key in (7, jax.random.key(7)))
    jax.tree.map(np.testing.assert_array_equal, by_seed, by_key)
    for wrong in (True, 1.5, jax.random.split(jax.random.key(0))):
        with pytest.raises(TypeError, match="Expected key to be one PRNG key"):
            DEFENCES["ft"](tiny, tiny_batch, key=wrong, config=config)


def test_a_baseline_is_not_run_as_another_one(tiny, tiny_batch):
    official, paper = DEFENCES["awm_official"], DEFENCES["awm_paper"]
    assert official.Config(epochs=3).variant == "official"
    with pytest.raises(ValueError, match="variant='official' of awm_official, got 'paper'"):
        official(tiny, tiny_batch, config=paper.default)


def test_masks_that_still_move_are_told_by_either_way_of_calling(tiny, tiny_batch):
    settings = {"epochs": 1, "inner_steps": 1, "outer_steps": 1, "batch_size": 4}
    batch = Batch(tiny_batch.images, metrics.predict(tiny, tiny_batch.images))
    one = DEFENCES["awm_paper"](tiny, batch, config=DEFENCES["awm_paper"].Config(**settings))
    other = awm_jax.purify(tiny, batch, config=DEFENCES["awm_paper"].Config(**settings))
    assert one.status is other.status is Status.NOT_CONVERGED


def test_layers_that_no_kernel_has_are_named_before_the_survey(tiny, tiny_batch, monkeypatch):
    monkeypatch.setattr(awm_purify, "_jit_look", lambda *_: pytest.fail("work was begun"))
    for layers, message in (("convs", "layers='convs' to be"), (("Conv_0",), "got Conv_0")):
        with pytest.raises(ValueError, match=message):
            awm_jax.purify(tiny, tiny_batch, config=awm_jax.AWMConfig(layers=layers))
