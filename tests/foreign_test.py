"""Flax modules of others in place of networks of ours."""

import pathlib
import runpy

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import awm_jax
from awm_jax import checkpoint, defences, formats, models
from awm_jax.models import foreign
from awm_jax.types import Arch, ForeignArch, Params

SHAPE = (8, 8, 3)
EXAMPLE = pathlib.Path(__file__).resolve().parents[1] / "docs" / "purify_your_flax_module.py"


def _body(x, train):
    """A convolution, BatchNorm, dropout, a dense layer."""
    x = nn.Conv(6, (3, 3), name="conv1")(x)
    x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.9, name="norm")(x))
    x = nn.Dropout(0.5, deterministic=not train)(x[:, ::2, ::2])
    return nn.Dense(3, name="head")(x.reshape(len(x), -1))


class WithTrain(nn.Module):
    @nn.compact
    def __call__(self, x, train: bool):
        return _body(x, train)


class WithTraining(nn.Module):
    @nn.compact
    def __call__(self, x, *, training: bool = True):
        return _body(x, training)


class WithDeterministic(nn.Module):
    @nn.compact
    def __call__(self, x, deterministic: bool = False):
        return _body(x, not deterministic)


class WithAverage(nn.Module):
    @nn.compact
    def __call__(self, x, use_running_average: bool):
        return _body(x, not use_running_average)


class WithNothing(nn.Module):
    widths: tuple[int, ...] = (4,)

    @nn.compact
    def __call__(self, x):
        for width in self.widths:
            x = nn.relu(nn.Conv(width, (3, 3))(x))
        return nn.Dense(3)(x.mean((1, 2)))


def test_where_all_maps_are_of_one_size_every_convolution_is_deep():
    arch = ForeignArch(name="foreign", num_classes=3, image_shape=SHAPE,
                       module=WithNothing(widths=(4, 6)))
    assert models.deep_convolutions(arch) == ("Conv_0", "Conv_1")


class Takes(nn.Module):
    """What is wrong with it is what its function returns."""

    result: object
    argument: str = ""

    @nn.compact
    def __call__(self, x, train: bool = False):
        return self.result(nn.Dense(3)(x.mean((1, 2))), x)


@pytest.fixture(scope="module")
def images():
    return jnp.asarray(np.random.default_rng(0).random((6, *SHAPE), np.float32))


def _variables(net, **mode):
    """Drawn variables whose BatchNorm statistics matter."""
    variables = net.init({"params": jax.random.key(0)}, jnp.zeros((1, *SHAPE)), **mode)
    return jax.tree.map(lambda leaf: leaf + 0.1, variables)


@pytest.mark.parametrize("net, name, in_training", [
    (WithTrain(), "train", True), (WithTraining(), "training", True),
    (WithDeterministic(), "deterministic", False), (WithAverage(), "use_running_average", False)])
def test_the_mode_is_told_by_its_own_name(net, name, in_training, images):
    variables = _variables(net, **{name: not in_training})
    params = Params.from_flax(net, variables, image_shape=SHAPE)
    assert params.arch.num_classes == 3 and params.arch.image_shape == SHAPE
    theirs = net.apply(variables, images, **{name: not in_training})
    np.testing.assert_allclose(models.apply(params, images), theirs, atol=1e-5)
    key = jax.random.key(1)
    theirs, updated = net.apply(variables, images, **{name: in_training}, mutable=["batch_stats"],
                                rngs={"dropout": key})
    ours, batch_stats = models.apply_train(params, images, key=key)
    assert np.abs(theirs - models.apply(params, images)).max() > 0.01  # the mode matters
    np.testing.assert_allclose(ours, theirs, atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), batch_stats,
                 updated["batch_stats"])


class BatchAlways(nn.Module):
    """As Flax's own bridge from NNX does, which takes any argument and hands none on."""

    @nn.compact
    def __call__(self, x, *args, **kwargs):
        self.variable("batch_stats", "mean", jnp.zeros, 3)
        return nn.Dense(3)((x - x.mean((0, 1, 2), keepdims=True)).max((1, 2)))


class RunningAlways(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(3)(nn.BatchNorm(use_running_average=True)(x).mean((1, 2)))


def test_a_mode_that_cannot_be_told_is_refused_or_warned_of(images):
    variables = BatchAlways().init(jax.random.key(0), images)
    with pytest.raises(ValueError, match=r"normalises by the batch.*train, training"):
        Params.from_flax(BatchAlways(), variables, image_shape=SHAPE)
    variables = RunningAlways().init(jax.random.key(0), images)
    with pytest.warns(UserWarning, match="will keep these statistics") as caught:
        Params.from_flax(RunningAlways(), variables, image_shape=SHAPE)
    assert caught[0].filename == __file__


def test_what_feeds_a_batchnorm_is_found_by_a_call(images):
    """A pre-activation block's sum is no convolution's."""
    class Foreign(nn.Module):
        @nn.compact
        def __call__(self, x, train: bool):
            for _ in range(2):
                y = nn.BatchNorm(use_running_average=not train)(nn.Conv(3, (3, 3))(x))
                x = x + nn.relu(y)
            x = nn.BatchNorm(use_running_average=not train)(x)
            return nn.Dense(3)(x.mean((1, 2)))

    net = Foreign()
    params = Params.from_flax(net, _variables(net, train=False), image_shape=SHAPE)
    assert models.norm_inputs(params.arch) == {"BatchNorm_0": "Conv_0", "BatchNorm_1": "Conv_1"}
    pruned = defences.clp(params, config=defences.clp.Config(u=0.0)).info["pruned"]
    assert set(pruned) == {"BatchNorm_0", "BatchNorm_1"}


def test_variables_there_and_back(images):
    net = WithTrain()
    variables = _variables(net, train=False)
    params = Params.from_flax(net, variables, image_shape=SHAPE, mean=(0.5, 0.4, 0.3),
                              std=(0.2, 0.2, 0.1))
    jax.tree.map(np.testing.assert_array_equal, params.to_flax(), dict(variables))
    normalised = (images - jnp.array([0.5, 0.4, 0.3]).reshape(1, 1, 1, 3)) / jnp.array(
        [0.2, 0.2, 0.1]).reshape(1, 1, 1, 3)
    np.testing.assert_allclose(models.apply(params, images),
                               net.apply(params.to_flax(), normalised, train=False), atol=1e-5)
    halves = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), variables)
    params = Params.from_flax(net, halves, image_shape=SHAPE)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype("float32")}
    plain = Params.from_flax(WithNothing(), _variables(WithNothing()), image_shape=SHAPE)
    assert plain.batch_stats == {} and plain.to_flax()["batch_stats"] == {}
    assert models.apply_train(plain, images, key=jax.random.key(0))[1] == {}


CONVOLUTIONS = [
    # What it is, and whether ours does it.
    ({"padding": "SAME"}, True), ({"padding": "VALID", "strides": 2}, True),
    ({"padding": ((0, 2), (1, 0)), "strides": (2, 1)}, True), ({"use_bias": False}, True),
    ({"padding": "CIRCULAR"}, True), ({"feature_group_count": 4}, True),
    ({"feature_group_count": 2}, False), ({"kernel_dilation": 2}, False),
    ({"input_dilation": 2, "padding": 1}, False), ({"padding": ((-1, 0), (0, 0))}, False),
    ({"precision": "highest"}, False), ({"dtype": jnp.bfloat16}, False),
]


def _primitives(fun, *args):
    return str(jax.make_jaxpr(fun)(*args)).count("custom_vjp_call")


@pytest.mark.parametrize("options, ours", CONVOLUTIONS, ids=[str(c[0]) for c in CONVOLUTIONS])
def test_convolutions_are_the_same_lowered_as_ours(options, ours, images):
    net = nn.Conv(4, (3, 3), **options)
    x = jnp.concatenate([images, images[..., :1]], axis=-1)
    variables = net.init(jax.random.key(0), x)

    def native(variables, x):
        return net.apply(variables, x)

    def lowered(variables, x):
        return foreign.apply(net, variables, x, train=False)

    assert _primitives(native, variables, x) == 0
    assert _primitives(lowered, variables, x) == ours
    np.testing.assert_allclose(lowered(variables, x), native(variables, x), atol=1e-5, rtol=1e-5)

    def slopes(fun):
        return jax.grad(lambda v, x: jnp.square(fun(v, x)).sum(), argnums=(0, 1))(variables, x)

    if ours:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4, rtol=1e-4),
                     slopes(lowered), slopes(native))


def test_other_convolutions_are_left_alone(images):
    class Mixed(nn.Module):
        @nn.compact
        def __call__(self, x):
            shared = nn.Conv(3, (3, 3))
            x = shared(shared(x))
            x = nn.remat(nn.Conv)(3, (3, 3))(x)
            x = nn.ConvTranspose(3, (3, 3))(x)
            y = nn.Conv(3, (3,))(x.reshape(len(x), -1, 3))
            own = nn.Conv(3, (3, 3), conv_general_dilated=jax.lax.conv_general_dilated)
            return nn.Dense(3)(own(x).mean((1, 2)) + y.mean(1))

    net = Mixed()
    variables = net.init(jax.random.key(0), images)
    params = Params.from_flax(net, variables, image_shape=SHAPE)
    np.testing.assert_allclose(models.apply(params, images), net.apply(variables, images),
                               atol=1e-5)
    assert _primitives(models.apply, params, images) >= 2
    assert _primitives(net.apply, variables, images) == 0  # the module itself is as it was


@pytest.mark.parametrize("net, options, kind, match", [
    (WithNothing, {}, TypeError, r"an instance.*got the class WithNothing\. Give WithNothing\("),
    (print, {}, TypeError, r"a Flax Linen module.*got builtin_function"),
    (WithNothing(widths=np.array([4])), {}, TypeError, r"fields are all hashable, WithNothing has"),
    (WithNothing(), {"variables": {}}, ValueError, r"collection 'params', got collections \(none"),
    (WithNothing(), {"variables": [1]}, ValueError, r"collection 'params', got list"),
    (WithNothing(), {"variables": {"params": {}}}, ValueError, r"Expected flax:WithNothing to ta"),
    (WithNothing(), {"variables": {"params": {}, "cache": {}}}, ValueError, r"got also cache"),
    (WithNothing(), {"variables": {"params": {"a": np.arange(3)}}}, ValueError,
     r"floats.*params/a is int64"),
    (WithNothing(), {"variables": {"params": {"a": "b"}}}, ValueError, r"params/a is str"),
    (WithNothing(), {"image_shape": (8, 8)}, ValueError, r"Expected image_shape=\(8, 8\)"),
    (WithNothing(), {"image_shape": (8, 8, 1)}, ValueError, r"images of 8x8x1, in evaluation"),
    (WithNothing(), {"mean": (0.5,), "std": (0.5,)}, ValueError, r"3 numbers, one a channel"),
    (WithNothing(), {"std": (0.0, 1.0, 1.0)}, ValueError, r"1\.0\) to be 3 numbers > 0"),
    (Takes(lambda y, x: y[:, :1]), {}, ValueError, r"c >= 2, .*got \[2, 1\] for two images"),
    (Takes(lambda y, x: y.sum()), {}, ValueError, r"got \[\] for two images"),
    (Takes(lambda y, x: y.T), {}, ValueError, r"got \[3, 2\] for two images"),
    (Takes(lambda y, x: (y, x)), {}, ValueError, r"got tuple"),
    (nn.Dropout(0.5), {"variables": {"params": {}}}, ValueError, r"got \[2, 8, 8, 3\]"),
])
def test_what_does_not_fit_is_refused(net, options, kind, match):
    options = {"image_shape": SHAPE, **options}
    if "variables" not in options:
        fits = net if isinstance(net, Takes) else WithNothing()
        options["variables"] = fits.init(jax.random.key(0), jnp.zeros((1, *SHAPE)))
    with pytest.raises(kind, match=match):
        Params.from_flax(net, options.pop("variables"), **options)


def test_lists_become_tuples_and_equal_modules_compile_once(images):
    shared = nn.Conv(3, (3, 3), padding="SAME")
    net = nn.Sequential([shared, nn.relu, shared, lambda x: x.mean((1, 2)), nn.Dense(2)])
    variables = net.init(jax.random.key(0), images)
    params = Params.from_flax(net, variables, image_shape=SHAPE)
    assert len(params.weights) == 2  # a layer that is used twice has stayed one
    np.testing.assert_allclose(models.apply(params, images), net.apply(variables, images),
                               atol=1e-5)
    drawn = _variables(WithNothing(widths=[4, 5]))
    one, two = (Params.from_flax(WithNothing(widths=[4, 5]), drawn, image_shape=SHAPE).arch
                for _ in range(2))
    assert one == two and hash(one) == hash(two)
    assert one != Params.from_flax(WithNothing(), _variables(WithNothing()), image_shape=SHAPE).arch


@pytest.fixture(scope="module")
def foreign_params():
    net = WithTrain()
    return Params.from_flax(net, _variables(net, train=False), image_shape=SHAPE)


def test_files_of_ours_refuse_it(tmp_path, foreign_params, small_params):
    match = r"got flax:WithTrain, whose code.*params\.to_flax\(\).*Params\.from_flax"
    with pytest.raises(ValueError, match=match):
        checkpoint.save(tmp_path / "net", foreign_params)
    checkpoint.save(tmp_path / "ours", small_params)
    source = formats.read(tmp_path / "ours")[1]
    for name in ("net", "net.safetensors", "net.pth"):
        with pytest.raises(ValueError, match=match):
            formats.write(tmp_path / name, foreign_params, source)
    assert [p.name for p in tmp_path.iterdir()] == ["ours"]


def test_what_models_tells_of_it(foreign_params, images):
    arch = foreign_params.arch
    assert isinstance(arch, ForeignArch) and models.module(arch) == WithTrain()
    models.check(arch)
    assert models.norm_inputs(arch) == {"norm": "conv1"}
    drawn = models.create(jax.random.key(0), arch)
    assert jax.tree.map(jnp.shape, drawn.to_flax()) == jax.tree.map(
        jnp.shape, foreign_params.to_flax())
    with pytest.raises(ValueError, match=r"flax:WithTrain to sow.*self\.sow\('intermediates'"):
        models.activations(foreign_params, images)
    assert models.classifier(arch) == "head"
    assert models.features(foreign_params, images).shape == (len(images), 4 * 4 * 6)


def test_a_module_that_tells_more_can_be_used_for_more(tiny, images):
    net = models.module(tiny.arch)  # it sows, and says what feeds its BatchNorm
    params = Params.from_flax(net, tiny.to_flax(), image_shape=SHAPE)
    np.testing.assert_array_equal(models.apply(params, images), models.apply(tiny, images))
    assert models.norm_inputs(params.arch) == {"bn1": "conv1", "bn2": "conv2"}
    jax.tree.map(np.testing.assert_array_equal, models.activations(params, images)[1],
                 models.activations(tiny, images)[1])
    np.testing.assert_array_equal(models.features(params, images), models.features(tiny, images))
    pruned = defences.clp(params, config=defences.clp.Config(u=0.0))
    assert isinstance(pruned.params.arch, ForeignArch)
    jax.tree.map(np.testing.assert_array_equal, pruned.params.to_flax(), defences.clp(
        tiny, config=defences.clp.Config(u=0.0)).params.to_flax())


def test_purified_it_is_still_the_module(foreign_params, small_batch):
    config = awm_jax.AWMConfig(variant="paper", epochs=1, inner_steps=1, outer_steps=2,
                               batch_size=4)
    batch = small_batch._replace(labels=small_batch.labels % 3)
    found = awm_jax.purify(foreign_params, batch, config=config)
    assert found.params.arch == foreign_params.arch
    variables = found.params.to_flax()
    np.testing.assert_allclose(
        WithTrain().apply(variables, batch.images, train=False),
        models.apply(foreign_params, batch.images, masks=found.masks), atol=1e-5)
    before = foreign_params.to_flax()["params"]
    assert np.abs(variables["params"]["conv1"]["kernel"] - before["conv1"]["kernel"]).max() > 1e-3
    np.testing.assert_array_equal(variables["params"]["head"]["kernel"], before["head"]["kernel"])


def test_our_own_architectures_are_no_foreign_ones():
    arch = Arch(name="small_vgg", num_classes=4, image_shape=SHAPE)
    assert foreign.mode(models.module(arch), train=False) == {"train": False}
    assert foreign.mode(WithNothing(), train=True) == {}


def test_the_example_runs(monkeypatch, capsys):
    monkeypatch.setenv("AWM_EXAMPLE_FAST", "1")
    found = runpy.run_path(str(EXAMPLE))
    said = capsys.readouterr().out
    assert "before: ACC" in said and "after:  ACC" in said and "the module says" in said
    assert found["purified"].params.arch == found["suspect"].arch
    logits = found["net"].apply(found["new_variables"], found["images"][:3], train=False)
    assert logits.shape == (3, 10)
    assert found["train_labels"][found["poisoned"]].tolist() == [found["TARGET"]] * 120
