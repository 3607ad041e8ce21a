"""Depthwise convolution against the platform's own."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from awm_jax.models import depthwise, ops


def _native(x, k, strides, pads):
    return lax.conv_general_dilated(x, k, strides, pads, dimension_numbers=("NHWC", "HWIO", "NHWC"),
                                    feature_group_count=x.shape[-1])


def _case(size, shape, batch=2, channels=3):
    keys = jax.random.split(jax.random.key(0), 2)
    return (jax.random.normal(keys[0], (batch, *shape, channels), jnp.float64),
            jax.random.normal(keys[1], (size, size, 1, channels), jnp.float64))


# The second with unequal pads, a last row that the stride leaves and a last column that it uses.
@pytest.mark.parametrize("size, stride, pads, shape", [
    (3, 1, ((1, 1), (1, 1)), (8, 7)), (3, 2, ((1, 0), (0, 2)), (7, 7)),
])
def test_value_and_first_and_second_derivatives_equal_the_native_ones(x64, size, stride, pads,
                                                                      shape):
    """Of a function that is curved in image and kernel."""
    x, k = _case(size, shape)

    def all_of(conv):
        def curved(x, k):
            y = conv(x, k, (stride, stride), pads)
            return jnp.sin(y).sum(), y

        def length(x, k):
            first, y = jax.grad(curved, (0, 1), has_aux=True)(x, k)
            return sum((leaf**2).sum() for leaf in first), (first, y)

        return jax.jit(jax.grad(length, (0, 1), has_aux=True))(x, k)

    chex.assert_trees_all_close(all_of(depthwise.conv), all_of(_native), rtol=1e-10, atol=1e-10)


def test_by_hand():
    """The left neighbour in the first channel, twice the pixel below in the second, stride 2."""
    x = jnp.stack([jnp.arange(16.0).reshape(4, 4), jnp.arange(16.0).reshape(4, 4)], -1)[None]
    k = jnp.zeros((3, 3, 1, 2)).at[1, 0, 0, 0].set(1.0).at[2, 1, 0, 1].set(2.0)
    y = depthwise.conv(x, k, (2, 2), ((1, 1), (1, 1)))
    np.testing.assert_array_equal(y[0, :, :, 0], [[0, 1], [0, 9]])
    np.testing.assert_array_equal(y[0, :, :, 1], [[8, 12], [24, 28]])


def test_vmap_is_a_loop(x64):
    """Over kernels and images, gradients too."""
    x, k = _case(3, (6, 6))

    def slopes(k, x):
        return jax.grad(lambda k, x: (depthwise.conv(x, k, (2, 2), ((1, 1), (1, 1)))**2).sum(),
                        (0, 1))(k, x)

    kernels, images = jnp.stack([k, -2 * k]), jnp.stack([x, x + 1])
    found = jax.jit(jax.vmap(slopes))(kernels, images)
    chex.assert_trees_all_close(jax.tree.map(lambda leaf: leaf[1], found),
                                jax.jit(slopes)(kernels[1], images[1]))


def _flax(x, kernel, groups, dilation=None):
    return ops.flax_conv(x, kernel, (1, 1), "SAME", lhs_dilation=None, rhs_dilation=dilation,
                         dimension_numbers=None, feature_group_count=groups, precision=None)


def test_flax_takes_it_where_each_channel_is_a_group():
    x, k = jnp.ones((1, 4, 4, 2)), jnp.ones((3, 3, 1, 2))
    np.testing.assert_allclose(_flax(x, k, 2), _native(x, k, (1, 1), "SAME"))


@pytest.mark.parametrize("kernel, groups, dilation", [
    ((3, 3, 1, 8), 4, None),  # two kernels a channel
    ((3, 3, 2, 4), 2, None),  # groups of two channels
    ((3, 3, 1, 4), 4, (2, 2)),
])
def test_flax_is_refused_the_rest(kernel, groups, dilation):
    with pytest.raises(ValueError, match="ungrouped or depthwise"):
        _flax(jnp.ones((1, 4, 4, 4)), jnp.ones(kernel), groups, dilation)
