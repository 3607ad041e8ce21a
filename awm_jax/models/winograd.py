"""3x3 convolution on a CPU with 16 multiplications where 36 were: Winograd's F(2x2, 3x3).

``y = A' [ (G k G') * (B' x B) ] A`` for every 4x4 square of the padded image gives 2x2 pixels of
the result; summed over input channels, each of the 16 products is a matrix product over squares.

Reference: Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks", CVPR 2016, 4.1.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

_G = np.array([[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]])
_KERNEL = np.kron(_G, _G)  # [16, 9]; as one product it compiles in a tenth of the time of 16 sums

# By CPU time on a Zen 3 it breaks even with the other forms at 16 channels (32x32 pixels, 2.1 ms
# each) and takes half to two thirds of their time with more; but it is three times as much to
# compile, which small work never earns back: 64 squares of 512 channels take 25 ms against 28.
_CHANNELS_FROM = 16
_SQUARES_FROM = 256


def applies(x_shape: Sequence[int], kernel_shape: Sequence[int], strides: tuple[int, int],
            pads: tuple[tuple[int, int], tuple[int, int]]) -> bool:
    """Whether `conv` can do this convolution, and is the fastest way."""
    batch, height, width, c_in = x_shape
    kh, kw, _, c_out = kernel_shape
    out = height + sum(pads[0]) - 2, width + sum(pads[1]) - 2
    return ((kh, kw) == (3, 3) and strides == (1, 1) and out[0] % 2 == out[1] % 2 == 0
            and min(c_in, c_out) >= _CHANNELS_FROM
            and batch * out[0] * out[1] // 4 >= _SQUARES_FROM)


def _image_rows(d):
    """``B' d``: four values to four."""
    return d[0] - d[2], d[1] + d[2], d[2] - d[1], d[1] - d[3]


def _result_rows(m):
    """``A' m``: four values to two."""
    return m[0] + m[1] + m[2], m[1] - m[2] - m[3]


def _result_rows_transposed(y):
    """``A y``: two values to four."""
    return y[0], y[0] + y[1], y[0] - y[1], -y[1]


def _squares(x, pads):
    """``B' x B`` of every 4x4 square, two pixels apart: 16 of ``[squares, C]``."""
    x = jnp.pad(x, ((0, 0), *pads, (0, 0)))
    _, height, width, channels = x.shape
    down = _image_rows([x[:, i : i + height - 3 : 2] for i in range(4)])
    return [v.reshape(-1, channels) for row in down
            for v in _image_rows([row[:, :, j : j + width - 3 : 2] for j in range(4)])]


def conv(x: jax.Array, kernel: jax.Array,
         pads: tuple[tuple[int, int], tuple[int, int]]) -> jax.Array:
    """Stride 1, 3x3, an even number of rows and columns in the result; else as `ops.conv`.

    Args:
      x: ``[B, H, W, I]``.
      kernel: ``[3, 3, I, O]``.
      pads: zeros added: ``((top, bottom), (left, right))``.

    Returns:
      ``[B, H', W', O]``, in float32 within about 1e-6 of the largest value.

    Example:
      >>> conv(jnp.ones((1, 4, 4, 3)), jnp.ones((3, 3, 3, 8)), ((1, 1), (1, 1)))[0, 1, 1, 0].item()
      27.0
    """
    _, _, c_in, c_out = kernel.shape
    transformed = jnp.asarray(_KERNEL, kernel.dtype) @ kernel.reshape(9, c_in * c_out)
    transformed = transformed.reshape(16, c_in, c_out)
    products = [v @ u for v, u in zip(_squares(x, pads), transformed, strict=True)]
    across = [_result_rows(products[4 * i : 4 * i + 4]) for i in range(4)]
    pixels = [[_result_rows([row[j] for row in across])[i] for j in range(2)] for i in range(2)]
    batch, height, width = len(x), x.shape[1] + sum(pads[0]) - 2, x.shape[2] + sum(pads[1]) - 2
    squares = (batch, height // 2, width // 2, c_out)
    result = jnp.stack([jnp.stack([p.reshape(squares) for p in row], axis=3) for row in pixels],
                       axis=2)
    return result.reshape(batch, height, width, c_out)


def kernel_grad(x: jax.Array, dy: jax.Array,
                pads: tuple[tuple[int, int], tuple[int, int]]) -> jax.Array:
    """The transpose of `conv` in its kernel: ``[3, 3, I, O]``.

    Args:
      x: ``[B, H, W, I]``, what was convolved.
      dy: ``[B, H', W', O]``, the gradient of the result.
      pads: as `conv`.

    Example:
      >>> kernel_grad(jnp.ones((1, 4, 4, 3)), jnp.ones((1, 4, 4, 8)), ((1, 1), (1, 1))).shape
      (3, 3, 3, 8)
    """
    c_in, c_out = x.shape[3], dy.shape[3]
    down = [_result_rows_transposed([dy[:, i::2, j::2] for i in range(2)]) for j in range(2)]
    spread = [z.reshape(-1, c_out) for i in range(4)
              for z in _result_rows_transposed([column[i] for column in down])]
    products = jnp.stack([v.T @ z for v, z in zip(_squares(x, pads), spread, strict=True)])
    gradient = jnp.asarray(_KERNEL.T, dy.dtype) @ products.reshape(16, c_in * c_out)
    return gradient.reshape(3, 3, c_in, c_out)
