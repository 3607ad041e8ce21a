"""The gradient of a 3x3 kernel on a CPU, with 16 multiplications where 36 were.

Winograd's F(2x2, 3x3): ``y = A' [ (G k G') * (B' x B) ] A`` for every 4x4 square of the padded
image gives 2x2 pixels of a convolution. So ``dk = G' [ (B' x B) * (A dy A') ] G``, summed over
squares: each of the 16 products is a matrix product.

Reference: Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks", CVPR 2016, 4.1.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

_G = np.array([[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]])
# The four rows of each transform as two pairs, each of them one operation on both rows: 0 and 3,
# then 1 and 2. An operation for each of the 16 squares takes twice as long to compile.
_PAIRS = ((0, 3), (1, 2))
_ORDER = [4 * i + j for rows in _PAIRS for columns in _PAIRS for i in rows for j in columns]
_KERNEL = np.kron(_G, _G)[_ORDER]  # [16, 9]

# By CPU time on a Zen 3 it breaks even with im2col at 16 channels (32x32 pixels, 2.1 ms
# each) and takes half to two thirds of their time with more; but it is more to compile, which small
# work never earns back: 64 squares of 512 channels take 25 ms against 28.
_CHANNELS_FROM = 16
_SQUARES_FROM = 256


def applies(x_shape: Sequence[int], kernel_shape: Sequence[int], strides: tuple[int, int],
            pads: tuple[tuple[int, int], tuple[int, int]]) -> bool:
    """Whether `kernel_grad` can do this convolution, and is the fastest way.

    Args:
      x_shape: ``(B, H, W, I)``.
      kernel_shape: ``(kh, kw, I, O)``.
      strides: ``(down, right)``.
      pads: ``((top, bottom), (left, right))``.

    Example:
      >>> applies((16, 16, 16, 64), (3, 3, 64, 64), (1, 1), ((1, 1), (1, 1)))
      True
    """
    batch, height, width, c_in = x_shape
    kh, kw, _, c_out = kernel_shape
    out = height + sum(pads[0]) - 2, width + sum(pads[1]) - 2
    return ((kh, kw) == (3, 3) and strides == (1, 1) and out[0] % 2 == out[1] % 2 == 0
            and min(c_in, c_out) >= _CHANNELS_FROM
            and batch * out[0] * out[1] // 4 >= _SQUARES_FROM)


def _signs(like, axis):
    """(1, -1) along an axis."""
    return jnp.array([1, -1], like.dtype).reshape([2 if i == axis else 1 for i in range(like.ndim)])


def _half(x, axis, which):
    """The even (0) or odd (1) pixels, as an axis of length 1."""
    return jax.lax.slice_in_dim(x, which, which + 1, axis=axis)


def _phases(x):
    """Even and odd rows and columns apart: ``[2, 2, B, H / 2, W / 2, C]``."""
    batch, height, width, channels = x.shape
    return x.reshape(batch, height // 2, 2, width // 2, 2, channels).transpose(2, 4, 0, 1, 3, 5)


def _image_pairs(p, axis):
    """``B' d`` of phases: ``(d0 - d2, d1 - d3)`` and ``(d2 + d1, d2 - d1)``."""
    size = p.shape[axis + 3]
    here = jax.lax.slice_in_dim(p, 0, size - 1, axis=axis + 3)
    after = jax.lax.slice_in_dim(p, 1, size, axis=axis + 3)
    return here - after, _half(after, axis, 0) + _signs(p, axis) * _half(here, axis, 1)


def _result_transposed(p, axis):
    """``A y`` of phases: ``(y0, -y1)`` and ``(y0 + y1, y0 - y1)``."""
    sign = _signs(p, axis)
    return sign * p, _half(p, axis, 0) + sign * _half(p, axis, 1)


def _both(transform, phases):
    """A transform down, then across: four of ``[4, squares, C]``, in the order of `_ORDER`."""
    return [v.reshape(4, -1, v.shape[-1]) for u in transform(phases, 0) for v in transform(u, 1)]


def _squares(x, pads):
    """``B' x B`` of every 4x4 square, two pixels apart."""
    x = jnp.pad(x, ((0, 0), *pads, (0, 0)))
    return _both(_image_pairs, _phases(x))


def kernel_grad(x: jax.Array, dy: jax.Array,
                pads: tuple[tuple[int, int], tuple[int, int]]) -> jax.Array:
    """The kernel's gradient of a convolution of stride 1 with an even number of rows and columns.

    Args:
      x: ``[B, H, W, I]``, what was convolved.
      dy: ``[B, H', W', O]``, the gradient of the result.
      pads: zeros added: ``((top, bottom), (left, right))``.

    Returns:
      ``[3, 3, I, O]``, in float32 within about 3e-6 of the largest value.

    Example:
      >>> kernel_grad(jnp.ones((1, 4, 4, 3)), jnp.ones((1, 4, 4, 8)), ((1, 1), (1, 1))).shape
      (3, 3, 3, 8)
    """
    c_in, c_out = x.shape[3], dy.shape[3]
    spread = _both(_result_transposed, _phases(dy))
    products = jnp.stack([v.swapaxes(1, 2) @ z
                          for v, z in zip(_squares(x, pads), spread, strict=True)])
    gradient = jnp.asarray(_KERNEL.T, dy.dtype) @ products.reshape(16, c_in * c_out)
    return gradient.reshape(3, 3, c_in, c_out)
