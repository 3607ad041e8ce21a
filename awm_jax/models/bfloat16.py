"""Convolutions in steps of one pixel as products of bfloat16 matrices, summed in float32.

For CPUs with a unit for such products (Intel's AMX). Fields of ``kh * kw`` pixels need not be
copied whole: ``kw`` copies of the images side by side, times the ``kh`` rows of the kernel side by
side, give each row's share of the result, and shares are added one row apart. So images are copied
three times for a 3x3 kernel, not nine. Where a field fits into a row of the unit's registers, as
with three channels, copying it whole is as little.

A number keeps 8 of its 24 significant bits, so results are within about .5% of the largest.
"""

import contextlib

import jax
import jax.numpy as jnp
from jax import lax

from awm_jax.models import lowering
from awm_jax.models.lowering import Pads

_OPTION = "jax_default_matmul_precision"
_ROW = 32  # bfloat16 numbers in a row of the unit's registers


def asked() -> bool:
    """Whether JAX was told to, by ``jax.default_matmul_precision('bfloat16')`` or the option."""
    return getattr(jax.config, _OPTION) == "bfloat16"


def refused() -> contextlib.AbstractContextManager:
    """Within it nobody asks."""
    return jax.default_matmul_precision(None) if asked() else contextlib.nullcontext()


def _bits(x: jax.Array, pads: Pads = ((0, 0), (0, 0))) -> jax.Array:
    """Rounded to bfloat16, as whole numbers: XLA:CPU would pad and copy bfloat16 as float32.

    Barriers make ``x`` and the result values of their own: XLA would compute what makes either
    anew for each of their copies, and copies and pads by one slow loop.

    Args:
      x: ``[B, H, W, C]``.
      pads: zeros added (or, where negative, pixels cut off).
    """
    bits = lax.bitcast_convert_type(
        lax.optimization_barrier(x).astype(jnp.bfloat16), jnp.uint16)
    widths = [(low, high, 0) for low, high in ((0, 0), *pads, (0, 0))]
    return lax.optimization_barrier(lax.pad(bits, jnp.zeros((), bits.dtype), widths))


def _product(a: jax.Array, b: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """The product of two matrices given by `_bits`."""
    a, b = (lax.bitcast_convert_type(v, jnp.bfloat16) for v in (a, b))
    return jnp.dot(a, b, preferred_element_type=dtype)


def _whole(kh: int, kw: int, c_in: int) -> bool:
    """Whether to copy whole fields: where they fit into one row."""
    return kh * kw * c_in <= _ROW


def _side_by_side(bits: jax.Array, kh: int, kw: int) -> jax.Array:
    """What each place of a kernel sees, as channels."""
    return jnp.concatenate(lowering.shifted(bits, kh, kw, (1, 1), ((0, 0), (0, 0))), axis=-1)


def conv(x: jax.Array, kernel: jax.Array, pads: Pads) -> jax.Array:
    """Convolves NHWC images with an HWIO kernel.

    Args:
      x: ``[B, H, W, I]``.
      kernel: ``[kh, kw, I, O]``.
      pads: zeros added: ``((top, bottom), (left, right))``.

    Returns:
      ``[B, H', W', O]``.

    Example:
      >>> conv(jnp.ones((1, 4, 4, 3)), jnp.ones((3, 3, 3, 8)), ((1, 1), (1, 1))).shape
      (1, 4, 4, 8)
    """
    kh, kw, c_in, c_out = kernel.shape
    bits, kernel = _bits(x, pads), _bits(kernel)
    if _whole(kh, kw, c_in):
        fields = _side_by_side(bits, kh, kw)
        y = _product(fields.reshape(-1, kh * kw * c_in), kernel.reshape(-1, c_out), x.dtype)
        return y.reshape(*fields.shape[:3], c_out)
    beside = _side_by_side(bits, 1, kw)
    rows = kernel.reshape(kh, kw * c_in, c_out).swapaxes(0, 1)
    shares = _product(beside.reshape(-1, kw * c_in), rows.reshape(-1, kh * c_out), x.dtype)
    shares = shares.reshape(*beside.shape[:3], kh, c_out)
    height = beside.shape[1] - kh + 1
    y = shares[:, :height, :, 0]
    for i in range(1, kh):
        y = y + shares[:, i : i + height, :, i]
    return y


def kernel_grad(x: jax.Array, dy: jax.Array, size: tuple[int, int], pads: Pads) -> jax.Array:
    """The kernel's gradient of `conv`: of ``x`` copies side by side, of ``dy`` a row apart.

    Args:
      x: ``[B, H, W, I]``, what was convolved.
      dy: ``[B, H', W', O]``, the gradient of the result.
      size: ``(kh, kw)`` of the kernel.
      pads: as for `conv`.

    Returns:
      ``[kh, kw, I, O]``.

    Example:
      >>> x, dy = jnp.ones((1, 4, 4, 3)), jnp.ones((1, 4, 4, 8))
      >>> kernel_grad(x, dy, (3, 3), ((1, 1), (1, 1))).shape
      (3, 3, 3, 8)
    """
    (kh, kw), (top, _), c_in = size, pads[0], x.shape[3]
    _, height, width, c_out = dy.shape
    whole = _whole(kh, kw, c_in)
    # The product sums over pixels, so they come last. Turned and padded at once, before there are
    # copies: turning is what takes time.
    around = (pads if whole else ((0, 0), pads[1]))
    turned = lax.optimization_barrier(jnp.pad(_bits(x).transpose(3, 0, 1, 2),
                                              ((0, 0), (0, 0), *around)))
    if whole:
        fields = jnp.stack([turned[:, :, i : i + height, j : j + width]
                            for i in range(kh) for j in range(kw)])
        products = _product(fields.reshape(kh * kw * c_in, -1), _bits(dy).reshape(-1, c_out),
                            x.dtype)
        return products.reshape(kh, kw, c_in, c_out)
    beside = jnp.stack([turned[..., j : j + width] for j in range(kw)])
    # Row r of x meets row r - i + top of dy, where there is one.
    bits = _bits(dy, ((kh - 1 - top, x.shape[1] + top - height), (0, 0)))
    apart = jnp.concatenate([bits[:, kh - 1 - i : kh - 1 - i + x.shape[1]] for i in range(kh)],
                            axis=-1)
    products = _product(beside.reshape(kw * c_in, -1), apart.reshape(-1, kh * c_out), x.dtype)
    return products.reshape(kw, c_in, kh, c_out).transpose(2, 0, 1, 3)
