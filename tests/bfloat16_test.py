"""Convolutions as products of bfloat16 matrices: right where they are exact, near elsewhere."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from awm_jax import losses, masks, metrics, models
from awm_jax.models import bfloat16, ops
from awm_jax.types import Arch

NARROW = jax.default_matmul_precision("bfloat16")


def _native(x, k, pads):
    return lax.conv_general_dilated(x, k, (1, 1), pads, dimension_numbers=("NHWC", "HWIO", "NHWC"))


def _whole_numbers(seed, shape, most, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).integers(-most, most + 1, shape), dtype)


# Fields copied whole (3 channels) and not; uneven sizes, unequal pads, pads wider than the kernel.
@pytest.mark.parametrize("shape, size, pads, c_in, c_out", [
    ((8, 8), (3, 3), ((1, 1), (1, 1)), 3, 5), ((8, 8), (3, 3), ((1, 1), (1, 1)), 6, 5),
    ((9, 7), (3, 3), ((0, 0), (0, 0)), 6, 5), ((7, 6), (3, 3), ((1, 2), (0, 2)), 6, 4),
    ((7, 6), (3, 3), ((0, 2), (2, 1)), 3, 4), ((6, 7), (5, 5), ((2, 2), (2, 2)), 6, 4),
    ((6, 7), (1, 1), ((0, 0), (0, 0)), 40, 4), ((6, 7), (3, 2), ((3, 4), (2, 3)), 8, 4),
    ((6, 7), (2, 3), ((2, 0), (3, 3)), 3, 4),
])
def test_of_small_whole_numbers_everything_is_exact(x64, shape, size, pads, c_in, c_out):
    """They fit into 8 bits, and their sums into 24: not a bit differs from the native convolution.

    That in float64: in float32 its own gradient reads past the end where a pad is wider than the
    kernel (jaxlib 0.10.2).
    """
    x = _whole_numbers(0, (2, *shape, c_in), 9)
    k = _whole_numbers(1, (*size, c_in, c_out), 7)
    y, backward = jax.vjp(lambda x, k: _native(x, k, pads), x.astype(float), k.astype(float))
    dy = _whole_numbers(2, y.shape, 5)
    dx, dk = backward(dy.astype(float))
    np.testing.assert_array_equal(bfloat16.conv(x, k, pads), y)
    np.testing.assert_array_equal(bfloat16.kernel_grad(x, dy, size, pads), dk)
    with NARROW:
        ours, backward = jax.vjp(lambda x, k: ops.conv(x, k, (1, 1), pads), x, k)
        np.testing.assert_array_equal(ours, y)
        for found, expected in zip(backward(dy), (dx, dk), strict=True):
            np.testing.assert_array_equal(found, expected)


def test_second_derivatives_are_exact_too():
    pads = ((1, 1), (1, 1))
    x, k = _whole_numbers(0, (2, 6, 6, 6), 3), _whole_numbers(1, (3, 3, 6, 4), 3)
    dy, ct = _whole_numbers(2, (2, 6, 6, 4), 3), _whole_numbers(3, (2, 6, 6, 6), 3)

    def slope_of(conv):
        def slope(x, k, dy):
            return (jax.vjp(lambda x: conv(x, k), x)[1](dy)[0] * ct).sum()

        return jax.grad(slope, argnums=(1, 2))(x, k, dy)

    expected = slope_of(lambda x, k: _native(x, k, pads))
    with NARROW:
        found = slope_of(lambda x, k: ops.conv(x, k, (1, 1), pads))
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("c_in", [3, 16])
def test_is_the_convolution_of_rounded_numbers(x64, c_in):
    """Beside float64 on operands that are rounded first: what is left are float32's own sums."""
    keys = jax.random.split(jax.random.key(0), 3)
    pads = ((1, 1), (1, 1))
    x = jax.random.normal(keys[0], (4, 16, 16, c_in), jnp.float32)
    k = jax.random.normal(keys[1], (3, 3, c_in, 8), jnp.float32)
    dy = jax.random.normal(keys[2], (4, 16, 16, 8), jnp.float32)
    wide, narrow = ([v.astype(jnp.bfloat16).astype(jnp.float64) for v in (x, k, dy)], (x, k, dy))
    y, backward = jax.vjp(lambda x, k: _native(x, k, pads), *wide[:2])
    pairs = [(bfloat16.conv(*narrow[:2], pads), y),
             (bfloat16.kernel_grad(x, dy, (3, 3), pads), backward(wide[2])[1])]
    for found, expected in pairs:
        assert found.dtype == jnp.float32
        np.testing.assert_allclose(found, expected, atol=2e-6 * float(jnp.abs(expected).max()))


def test_only_where_asked_and_in_steps_of_one():
    x = jax.random.normal(jax.random.key(0), (2, 8, 8, 8))
    k = jax.random.normal(jax.random.key(1), (3, 3, 8, 8))
    pads = ((1, 1), (1, 1))
    strided, plain = ops.conv(x, k, (2, 2), pads), ops.conv(x, k, (1, 1), pads)
    with NARROW:
        np.testing.assert_array_equal(ops.conv(x, k, (2, 2), pads), strided)
        off = jnp.abs(ops.conv(x, k, (1, 1), pads) - plain).max() / jnp.abs(plain).max()
    assert 1e-4 < off < 5e-3
    np.testing.assert_array_equal(ops.conv(x, k, (1, 1), pads), plain)


@pytest.mark.parametrize("axes", [(0, 0), (0, None), (None, 0)])
def test_under_vmap_equals_the_loop(axes):
    pads = ((1, 1), (1, 1))
    x, k = _whole_numbers(0, (3, 2, 6, 6, 6), 9), _whole_numbers(1, (3, 3, 3, 6, 4), 7)
    given = [v if axis == 0 else v[0] for v, axis in zip((x, k), axes, strict=True)]

    def work(x, k):
        return jax.value_and_grad(lambda x, k: (ops.conv(x, k, (1, 1), pads)**2).sum(),
                                  argnums=(0, 1))(x, k)

    with NARROW:
        found = jax.jit(jax.vmap(work, in_axes=axes))(*given)
        loop = [work(*(v[i] if axis == 0 else v for v, axis in zip(given, axes, strict=True)))
                for i in range(3)]
    for a, b in zip(jax.tree.leaves(found),
                    jax.tree.leaves(jax.tree.map(lambda *v: jnp.stack(v), *loop)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-2)


def test_gradients_of_masks_are_near_float32s():
    """Of every convolution of a small VGG: within a fifth of their length, and not the same.

    Off by a tenth, most of it where rounding changes which pixel of a pool is the largest.
    """
    params = models.create(jax.random.key(0), Arch(name="small_vgg", num_classes=4,
                                                   image_shape=(16, 16, 3)))
    images = jax.random.uniform(jax.random.key(1), (8, 16, 16, 3))

    def loss(m):
        return losses.cross_entropy(models.apply(params, images, masks=m), jnp.arange(8) % 4)

    ones = masks.init(params.weights, "conv")
    wide = jax.jit(jax.grad(loss))(ones)
    with NARROW:
        narrow = jax.jit(jax.grad(loss))(ones)
    for a, b in zip(jax.tree.leaves(narrow), jax.tree.leaves(wide), strict=True):
        assert 0 < jnp.linalg.norm((a - b).ravel()) < 0.2 * jnp.linalg.norm(b.ravel())


def test_scores_are_of_the_network_in_float32(small_params):
    """What others will run is scored, whatever precision a defence had."""
    images = jnp.zeros((1, 8, 8, 3))
    with NARROW:
        scoring = str(jax.make_jaxpr(metrics._predict.__wrapped__)(small_params, images))
        defending = str(jax.make_jaxpr(models.apply)(small_params, images))
    assert "bf16" not in scoring and "bf16" in defending
