"""Networks and the convolution they stand on."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax import lax

from awm_jax import masks, models
from awm_jax.models import ops, winograd
from awm_jax.types import Arch


def _native(x, k, strides, pads):
    return lax.conv_general_dilated(x, k, strides, pads, dimension_numbers=("NHWC", "HWIO", "NHWC"))


def _with_gradients(conv, x, k, key):
    """A convolution and both gradients for a random one of the result, by one program."""
    dy = jax.random.normal(key, jax.eval_shape(conv, x, k).shape, x.dtype)

    @jax.jit
    def work(x, k, dy):
        y, backward = jax.vjp(conv, x, k)
        return y, *backward(dy)

    return work(x, k, dy)


# Kernels of every kind that the networks have, uneven sizes, both of the kernel's gradients.
@pytest.mark.parametrize("size, stride, pad, channels, shape", [
    *((size, stride, pad, 3, shape) for size, stride, pad in [(3, 1, 1), (3, 2, 1), (1, 2, 0),
                                                              (5, 2, 2)]
      for shape in [(8, 8), (9, 8), (17, 16)]),
    (3, 1, 1, 16, (32, 33)), (5, 1, 2, 16, (33, 32)), (3, 1, 0, 3, (32, 33)),
    (1, 1, 0, 16, (32, 32)),
])
def test_conv_and_both_gradients_equal_the_native_ones(x64, size, stride, pad, channels, shape):
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (2, *shape, channels), jnp.float64)
    k = jax.random.normal(keys[1], (size, size, channels, 4), jnp.float64)
    strides, pads = (stride, stride), ((pad, pad), (pad, pad))
    ours = _with_gradients(lambda x, k: ops.conv(x, k, strides, pads), x, k, keys[2])
    theirs = _with_gradients(lambda x, k: _native(x, k, strides, pads), x, k, keys[2])
    np.testing.assert_allclose(ours[0], theirs[0], rtol=1e-10, atol=1e-12)
    for a, b in zip(ours[1:], theirs[1:], strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-9)


# Sides of a result that differ, pads of each size and unequal ones, more channels in or out.
@pytest.mark.parametrize("shape, pads, c_in, c_out", [
    ((8, 8), ((1, 1), (1, 1)), 16, 18), ((6, 12), ((1, 1), (1, 1)), 18, 16),
    ((10, 8), ((0, 0), (0, 0)), 16, 16), ((8, 10), ((2, 2), (2, 2)), 16, 16),
    ((7, 8), ((1, 2), (0, 2)), 16, 16),
])
def test_winograd_equals_the_native_gradient(x64, shape, pads, c_in, c_out):
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (24, *shape, c_in), jnp.float64)
    k = jax.random.normal(keys[1], (3, 3, c_in, c_out), jnp.float64)
    assert winograd.applies(x.shape, k.shape, (1, 1), pads)
    theirs = _with_gradients(lambda x, k: _native(x, k, (1, 1), pads), x, k, keys[2])
    dy = jax.random.normal(keys[2], theirs[0].shape, jnp.float64)
    direct = jax.jit(winograd.kernel_grad, static_argnums=2)(x, dy, pads)
    np.testing.assert_allclose(direct, theirs[2], rtol=1e-10, atol=1e-9)
    ours = _with_gradients(lambda x, k: ops.conv(x, k, (1, 1), pads), x, k, keys[2])
    # That it is Winograd's: the native one agrees to rounding only.
    np.testing.assert_allclose(ours[2], direct, rtol=1e-14, atol=1e-14)
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-9)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("axes", [(0, 0), (0, None), (None, 0)])
def test_conv_under_vmap_equals_the_loop(x64, axes, stride):
    """Of images, of kernels, of both; on a CPU never as a grouped convolution, which is slow."""
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (3, 2, 8, 8, 4), jnp.float64)
    k = jax.random.normal(keys[1], (3, 3, 3, 4, 5), jnp.float64)
    x, k = (v if axis == 0 else v[0] for v, axis in zip((x, k), axes, strict=True))
    pads, dy = ((1, 1), (1, 1)), jax.random.normal(keys[2], (2, 8 // stride, 8 // stride, 5))

    def work(x, k):
        y, backward = jax.vjp(lambda x, k: ops.conv(x, k, (stride, stride), pads), x, k)
        return y, *backward(dy)

    wide = jax.jit(jax.vmap(work, in_axes=axes))
    one = jax.jit(work)
    for i in range(3):
        alone = one(*(v[i] if axis == 0 else v for v, axis in zip((x, k), axes, strict=True)))
        for a, b in zip(jax.tree.map(lambda v, i=i: v[i], wide(x, k)), alone, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12)
    text = wide.lower(x, k).as_text()
    assert "convolution" in text and "feature_group_count = 1 " in text
    assert "feature_group_count = 3" not in text and "batch_group_count = 3" not in text


def test_conv_under_two_vmaps_equals_the_loops(x64):
    """As a survey of every class in a sweep over seeds has it."""
    keys = jax.random.split(jax.random.key(0), 2)
    x = jax.random.normal(keys[0], (2, 3, 2, 6, 6, 4), jnp.float64)
    k = jax.random.normal(keys[1], (2, 3, 3, 4, 5), jnp.float64)
    conv = lambda x, k: ops.conv(x, k, (1, 1), ((1, 1), (1, 1)))  # noqa: E731
    wide = jax.jit(jax.vmap(jax.vmap(conv, in_axes=(0, None))))(x, k)
    for i in range(2):
        for j in range(3):
            np.testing.assert_allclose(wide[i, j], conv(x[i, j], k[i]), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("size, stride, pad, shape, batch, channels", [
    (3, 1, 1, (8, 8), 2, 3), (3, 2, 1, (9, 8), 2, 3), (1, 2, 0, (8, 8), 2, 3),
    (3, 1, 1, (8, 8), 24, 16),  # Winograd
])
def test_second_derivatives_equal_the_native_ones(x64, size, stride, pad, shape, batch, channels):
    """Of a function that is curved in image and kernel, both ways round."""
    keys = jax.random.split(jax.random.key(0), 2)
    x = jax.random.normal(keys[0], (batch, *shape, channels), jnp.float64)
    k = jax.random.normal(keys[1], (size, size, channels, 16), jnp.float64)
    strides, pads = (stride, stride), ((pad, pad), (pad, pad))

    def slopes(conv):
        def length(x, k):
            first = jax.grad(lambda x, k: jnp.sin(conv(x, k, strides, pads)).sum(), (0, 1))(x, k)
            return sum((leaf**2).sum() for leaf in first)

        return jax.jit(jax.grad(length, (0, 1)))(x, k)

    for ours, theirs in zip(slopes(ops.conv), slopes(_native), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-9, atol=1e-9)


def test_winograd_by_hand():
    """A square of 1 to 16; of its result the first pixel has slope 1, the last one 2."""
    x = jnp.arange(1.0, 17.0).reshape(1, 4, 4, 1)
    dy = jnp.array([[1.0, 0.0], [0.0, 2.0]]).reshape(1, 2, 2, 1)
    # dk[i, j] = x[i, j] + 2 x[i + 1, j + 1]
    np.testing.assert_allclose(winograd.kernel_grad(x, dy, ((0, 0), (0, 0)))[:, :, 0, 0],
                               [[13, 16, 19], [25, 28, 31], [37, 40, 43]], rtol=1e-6)


def test_winograd_in_float32_is_near_float64(x64):
    keys = jax.random.split(jax.random.key(0), 2)
    x = jax.random.normal(keys[0], (4, 8, 8, 128))
    dy = jax.random.normal(keys[1], (4, 8, 8, 64))
    pads = ((1, 1), (1, 1))
    x, dy = x.astype(jnp.float32), dy.astype(jnp.float32)
    narrow = winograd.kernel_grad(x, dy, pads)
    assert narrow.dtype == jnp.float32
    wide = _with_gradients(lambda x, k: _native(x, k, (1, 1), pads), x.astype(jnp.float64),
                           jnp.zeros((3, 3, 128, 64)), keys[1])[2]
    np.testing.assert_allclose(narrow, wide, rtol=0, atol=3e-6 * float(abs(wide).max()))


@pytest.mark.parametrize("x, k, strides, pads", [
    ((32, 8, 8, 3), (3, 3, 3, 32), (1, 1), (1, 1)),      # too few channels
    ((64, 8, 8, 16), (3, 3, 16, 16), (2, 2), (1, 1)),    # a stride
    ((32, 8, 8, 16), (5, 5, 16, 16), (1, 1), (2, 2)),    # another kernel
    ((32, 9, 8, 16), (3, 3, 16, 16), (1, 1), (1, 1)),    # an odd side
    ((16, 4, 4, 512), (3, 3, 512, 512), (1, 1), (1, 1)),  # too few squares
])
def test_winograd_leaves_the_rest_alone(x, k, strides, pads):
    assert not winograd.applies(x, k, strides, (pads, pads))


# Counted by hand from Table 6 (convolutions with bias, BatchNorm scale and shift, dense 2048 -> c)
# and from the CIFAR ResNet-18 with its three shortcuts; the other two are what the CIFAR
# repositories report. Those of torch_networks_test.py follow there.
@pytest.mark.parametrize("name, classes, count", [
    ("small_vgg", 10, 308_394), ("small_vgg", 43, 376_011), ("resnet18", 10, 11_173_962),
    ("preact_resnet18", 10, 11_171_146), ("vgg19_bn", 10, 20_040_522)])
def test_parameter_counts(name, classes, count):
    arch = Arch(name=name, num_classes=classes)
    shapes = jax.eval_shape(lambda k: models.create(k, arch), jax.random.key(0))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes.weights)) == count


@pytest.mark.parametrize("name", models.MODELS)
def test_norm_inputs_are_read_off_the_network(name):
    """In its order; a BatchNorm that no convolution feeds is left out."""
    arch = Arch(name=name, num_classes=3)
    convolved, normed = [], {}

    def watch(call, args, kwargs, context):
        out, path = call(*args, **kwargs), "/".join(context.module.path)
        if isinstance(context.module, nn.Conv):
            convolved.append((path, out))
        elif isinstance(context.module, nn.BatchNorm):
            normed[path] = args[0]
        return out

    with nn.intercept_methods(watch):
        jax.eval_shape(lambda k: models.module(arch).init(k, jnp.zeros((1, 32, 32, 3)), False),
                       jax.random.key(0))
    fed = [(norm, conv) for norm, x in normed.items() for conv, y in convolved if x is y]
    assert list(models.norm_inputs(arch).items()) == fed


@pytest.mark.parametrize("name", models.MODELS)
def test_the_last_block_is_what_the_classifier_sees(name):
    """Blocks of four axes, numbered from one; the last has the last layer's channels."""
    arch = Arch(name=name, num_classes=3)

    def both(key):
        params = models.create(key, arch)
        return params, models.activations(params, jnp.zeros((2, 32, 32, 3)))[1]

    params, blocks = jax.eval_shape(both, jax.random.key(0))
    assert list(blocks) == [f"block{i}" for i in range(1, len(blocks) + 1)]
    assert {block.ndim for block in blocks.values()} == {4}
    sides = [block.shape[1] for block in blocks.values()]
    assert sides == sorted(sides, reverse=True)
    channels = blocks[f"block{len(blocks)}"].shape[3]
    assert params.weights["dense"]["kernel"].shape[0] % channels == 0


def test_masks_of_ones_change_nothing_and_zeros_silence(small_params, small_batch):
    plain = models.apply(small_params, small_batch.images)
    ones = masks.init(small_params.weights)
    np.testing.assert_array_equal(models.apply(small_params, small_batch.images, masks=ones), plain)
    zeros = jax.tree.map(jnp.zeros_like, ones)
    silent = models.apply(small_params, small_batch.images, masks=zeros)
    np.testing.assert_allclose(silent, jnp.broadcast_to(silent[:1], silent.shape), atol=1e-6)


def test_normalisation_is_part_of_the_network(small_params, small_batch):
    import dataclasses

    mean, std = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
    arch = dataclasses.replace(small_params.arch, mean=mean, std=std)
    inside = models.apply(dataclasses.replace(small_params, arch=arch), small_batch.images)
    outside = models.apply(small_params, (small_batch.images - np.float32(mean).reshape(1, 1, 1, 3))
                           / np.float32(std).reshape(1, 1, 1, 3))
    np.testing.assert_allclose(inside, outside, rtol=1e-5, atol=1e-5)


def test_unknown_architecture_lists_the_known_ones():
    with pytest.raises(ValueError, match="resnet18"):
        models.create(jax.random.key(0), Arch(name="vgg99", num_classes=10))


def test_images_that_would_be_pooled_away_are_refused():
    with pytest.raises(ValueError, match="32x32 or more for vgg19_bn, got 16x32"):
        models.create(jax.random.key(0), Arch(name="vgg19_bn", num_classes=2,
                                              image_shape=(16, 32, 3)))


def test_training_mode_moves_statistics_and_drops_out(small_params, small_batch):
    first, stats = models.apply_train(small_params, small_batch.images, key=jax.random.key(1))
    other, _ = models.apply_train(small_params, small_batch.images, key=jax.random.key(2))
    assert not np.allclose(first, other)
    assert not np.allclose(stats["bn1"]["mean"], small_params.batch_stats["bn1"]["mean"])


@pytest.mark.parametrize("shape", [(8, 8), (9, 7)])
def test_pool_and_its_gradient_equal_the_reduction(x64, shape):
    keys = jax.random.split(jax.random.key(0), 2)
    x = jax.random.normal(keys[0], (2, *shape, 3), jnp.float64)
    ours, ours_vjp = jax.vjp(ops.max_pool_2x2, x)
    theirs, theirs_vjp = jax.vjp(lambda x: lax.reduce_window(
        x, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID"), x)
    np.testing.assert_array_equal(ours, theirs)
    dy = jax.random.normal(keys[1], ours.shape, jnp.float64)
    np.testing.assert_array_equal(ours_vjp(dy)[0], theirs_vjp(dy)[0])


def test_pool_shares_the_gradient_among_equals():
    x = jnp.array([[1.0, 1.0], [0.0, 1.0]]).reshape(1, 2, 2, 1)
    gradient = jax.grad(lambda x: 3 * ops.max_pool_2x2(x).sum())(x)
    np.testing.assert_allclose(gradient.reshape(2, 2), [[1.0, 1.0], [0.0, 1.0]])


def test_elu_and_its_gradient_equal_the_library_one(x64):
    x = jnp.linspace(-30.0, 5.0, 71)
    np.testing.assert_allclose(ops.elu(x), jax.nn.elu(x), rtol=0, atol=3e-16)
    np.testing.assert_allclose(jax.vmap(jax.grad(ops.elu))(x), jax.vmap(jax.grad(jax.nn.elu))(x),
                               rtol=1e-2, atol=1e-15)
    np.testing.assert_allclose(jax.vmap(jax.grad(ops.elu))(x)[40:],
                               jax.vmap(jax.grad(jax.nn.elu))(x)[40:], rtol=1e-12)


def test_drawing_weights_inside_a_larger_program_gives_the_same(small_params):
    """`create` compiles with options of its own, which a program around it would refuse."""
    inside = jax.jit(lambda key: models.create(key, small_params.arch).weights)(jax.random.key(0))
    chex.assert_trees_all_close(inside, small_params.weights, rtol=1e-6)
    both = jax.vmap(lambda key: models.create(key, small_params.arch).weights)(
        jax.random.split(jax.random.key(0), 2))
    assert both["conv1"]["kernel"].shape == (2, *small_params.weights["conv1"]["kernel"].shape)


@pytest.mark.parametrize("name, shallow", [
    ("small_vgg", {"conv1", "conv2"}), ("cnn", {"conv1"}),
    ("resnet18", {"conv1", *(f"layer1_{i}/conv{j}" for i in (0, 1) for j in (1, 2))})])
def test_deep_convolutions_are_all_but_those_at_the_first_resolution(name, shallow):
    arch = Arch(name=name, num_classes=3, image_shape=(32, 32, 3))
    weights = jax.eval_shape(lambda k: models.create(k, arch), jax.random.key(0)).weights
    convolutions = set(masks.layer_names(jax.eval_shape(masks.init, weights)))
    deep = models.deep_convolutions(arch)
    assert len(deep) == len(set(deep)) and set(deep) == convolutions - shallow
    assert shallow < convolutions


def test_a_network_without_convolutions_has_no_deep_ones():
    assert models.deep_convolutions(Arch(name="mlp", num_classes=3, image_shape=(8, 8, 1))) == ()


@pytest.mark.parametrize("given", [{"mean": (0.25,)}, {"std": (0.5,)}])
def test_a_mean_alone_or_a_scale_alone_is_enough(given):
    """For images of one channel, too, whose other default has three."""
    arch = Arch(name="mlp", num_classes=3, image_shape=(8, 8, 1))
    plain = models.create(jax.random.key(0), arch)
    params = dataclasses.replace(plain, arch=dataclasses.replace(arch, **given))
    images = jax.random.uniform(jax.random.key(1), (2, 8, 8, 1))
    by_hand = (images - given.get("mean", (0.0,))[0]) / given.get("std", (1.0,))[0]
    np.testing.assert_allclose(models.apply(params, images), models.apply(plain, by_hand),
                               rtol=1e-5)


@pytest.mark.parametrize("given, match", [
    ({"mean": (0.5,) * 3}, r"mean=\(0\.5, 0\.5, 0\.5\) to be 1 numbers, one a channel"),
    ({"std": (-1.0,)}, r"std=\(-1\.0,\) to be 1 numbers > 0"),
    ({"std": (float("nan"),)}, "numbers > 0"), ({"mean": ("a",)}, "to be a number, got 'a'")])
def test_a_normalisation_that_does_not_fit_is_refused(given, match):
    arch = Arch(name="mlp", num_classes=3, image_shape=(8, 8, 1), **given)
    with pytest.raises(ValueError, match=match):
        models.check(arch)
