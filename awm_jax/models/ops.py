"""Convolution and pooling, lowered in the form that is fast on the platform at hand.

On an accelerator a convolution and its gradients are the native operation. On a CPU the forward
pass and the image's gradient are too, the latter as a plain convolution of the gradient with the
flipped kernel: XLA:CPU does those that JAX derives up to 16 times as slowly. The kernel's gradient,
which it does 70 and more times as slowly, is matrix products: *Winograd*
(`awm_jax.models.winograd`) where it applies, which is in most layers, else *im2col*, every
receptive field copied as a row. Where JAX is told to multiply in bfloat16, which
`awm_jax.programs.tune` tells it on CPUs that have a unit for that, all three are products of
bfloat16 matrices (`awm_jax.models.bfloat16`) if the stride is 1.
`jax.lax.platform_dependent` chooses while lowering, so one trace serves all.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from awm_jax.models import bfloat16, depthwise, lowering, winograd
from awm_jax.models.lowering import Pads

_DIMS = ("NHWC", "HWIO", "NHWC")


def _native_conv(x, kernel, strides, pads):
    """The platform's own convolution."""
    return lax.conv_general_dilated(x, kernel, strides, pads, dimension_numbers=_DIMS)


def _one_kernel_at_a_time(form):
    """A convolution ``(x, kernel) -> y`` that `vmap` does for one kernel after the other.

    JAX would make kernels of several networks one grouped convolution, which XLA:CPU does 4 to 12
    times as slowly as one after the other, each of them on all cores.
    """

    @jax.custom_batching.custom_vmap
    def conv(x, kernel):
        return form(x, kernel)

    @conv.def_vmap
    def rule(axis_size, in_batched, x, kernel):
        x_batched, kernel_batched = in_batched
        if kernel_batched and x_batched:
            return lax.map(lambda each: conv(*each), (x, kernel)), True
        if kernel_batched:
            return lax.map(lambda each: conv(x, each), kernel), True
        y = conv(x.reshape(-1, *x.shape[2:]), kernel)
        return y.reshape(axis_size, -1, *y.shape[1:]), True

    return conv


@functools.cache
def _on_cpu(strides, pads):
    """The native convolution."""
    return _one_kernel_at_a_time(lambda x, kernel: _native_conv(x, kernel, strides, pads))


def _cpu_conv(x, kernel, strides, pads):
    """Convolution on a CPU."""
    return _on_cpu(strides, pads)(x, kernel)


def _cpu_input_grad(x, kernel, dy, strides, pads):
    """d loss / d input: the stride-dilated gradient convolved with the flipped kernel."""
    dy = lowering.dilated(dy, x.shape, kernel.shape[:2], strides, pads)
    flipped = kernel[::-1, ::-1].swapaxes(2, 3)
    return _cpu_conv(dy, flipped, (1, 1), ((0, 0), (0, 0)))


def _cpu_kernel_grad(x, kernel, dy, strides, pads):
    """d loss / d kernel: the columns, transposed, times the output's gradient."""
    kh, kw, c_in, c_out = kernel.shape
    if winograd.applies(x.shape, kernel.shape, strides, pads):
        return winograd.kernel_grad(x, dy, pads)
    columns = jnp.concatenate(lowering.shifted(x, kh, kw, strides, pads), axis=-1)
    return (columns.reshape(-1, kh * kw * c_in).T @ dy.reshape(-1, c_out)).reshape(kernel.shape)


@functools.cache
def _in_bfloat16(pads):
    """`bfloat16.conv`, as a convolution on a CPU."""
    return _one_kernel_at_a_time(lambda x, kernel: bfloat16.conv(x, kernel, pads))


@functools.cache
def _kernel_grad_in_bfloat16(size, pads):
    """`bfloat16.kernel_grad`, under `vmap` one after the other: products of several are slow."""

    @jax.custom_batching.custom_vmap
    def grad(x, dy):
        return bfloat16.kernel_grad(x, dy, size, pads)

    @grad.def_vmap
    def rule(axis_size, in_batched, x, dy):
        x, dy = (v if batched else jnp.broadcast_to(v, (axis_size, *v.shape))
                 for v, batched in zip((x, dy), in_batched, strict=True))
        return lax.map(lambda each: grad(*each), (x, dy)), True

    return grad


def _bfloat16_conv(x, kernel, strides, pads):
    """In bfloat16 where the stride is 1, else as `_cpu_conv`; the gradients likewise."""
    return _in_bfloat16(pads)(x, kernel) if strides == (1, 1) else _cpu_conv(
        x, kernel, strides, pads)


def _bfloat16_input_grad(x, kernel, dy, strides, pads):
    """d loss / d input: the gradient convolved with the flipped kernel."""
    if strides != (1, 1):
        return _cpu_input_grad(x, kernel, dy, strides, pads)
    reach = tuple((n - 1 - low, n - 1 - high)
                  for n, (low, high) in zip(kernel.shape[:2], pads, strict=True))
    return _in_bfloat16(reach)(dy, kernel[::-1, ::-1].swapaxes(2, 3))


def _bfloat16_kernel_grad(x, kernel, dy, strides, pads):
    """d loss / d kernel."""
    if strides != (1, 1):
        return _cpu_kernel_grad(x, kernel, dy, strides, pads)
    return _kernel_grad_in_bfloat16(kernel.shape[:2], pads)(x, dy)


_conv = lowering.convolution(_native_conv, _cpu_conv, _cpu_input_grad, _cpu_kernel_grad)
_narrow_conv = lowering.convolution(_native_conv, _bfloat16_conv, _bfloat16_input_grad,
                                    _bfloat16_kernel_grad)


def conv(x: jax.Array, kernel: jax.Array, strides: tuple[int, int], pads: Pads) -> jax.Array:
    """Convolves NHWC images with an HWIO kernel (cross-correlation, as in deep learning).

    Args:
      x: ``[B, H, W, I]``.
      kernel: ``[kh, kw, I, O]``.
      strides: positive steps ``(down, right)``.
      pads: zeros added: ``((top, bottom), (left, right))``.

    Returns:
      ``[B, H', W', O]``.

    Example:
      >>> conv(jnp.ones((1, 4, 4, 3)), jnp.ones((3, 3, 3, 8)), (1, 1), ((1, 1), (1, 1))).shape
      (1, 4, 4, 8)
    """
    if bfloat16.asked():
        return _narrow_conv(x, kernel, strides, pads)
    return _conv(x, kernel, strides, pads)


def flax_conv(x, kernel, strides, padding, *, lhs_dilation, rhs_dilation, dimension_numbers,
              feature_group_count, precision):
    """`conv` or `depthwise.conv`, as `flax.linen.Conv(conv_general_dilated=...)` calls them."""
    del dimension_numbers, precision
    channels = x.shape[-1]
    by_channel = feature_group_count == channels > 1 and kernel.shape[2:] == (1, channels)
    undilated = set(lhs_dilation or (1,)) | set(rhs_dilation or (1,)) == {1}
    if not undilated or not (by_channel or feature_group_count == 1):
        raise ValueError(
            "Expected an undilated convolution, ungrouped or depthwise (one kernel a channel), got "
            f"{feature_group_count=} and a kernel {list(kernel.shape)} for {channels} channels, "
            f"{lhs_dilation=}, {rhs_dilation=}."
        )
    pads = tuple(lax.padtype_to_pads(x.shape[1:3], kernel.shape[:2], strides, padding)
                 if isinstance(padding, str) else padding)
    chosen = depthwise.conv if by_channel else conv
    return chosen(x, kernel, tuple(strides), pads)


@jax.custom_vjp
def elu(x: jax.Array) -> jax.Array:
    """``x`` where positive, ``exp(x) - 1`` elsewhere; its gradient is read off the result.

    As ``max(x, exp(min(x, 0)) - 1)``, within one rounding of 1: ``expm1`` and a choice between the
    two take two thirds longer on a CPU.

    Example:
      >>> elu(jnp.array([2.0, 0.0, -jnp.inf])).tolist()
      [2.0, 0.0, -1.0]
    """
    return jnp.maximum(x, jnp.exp(jnp.minimum(x, 0)) - 1)


def _elu_fwd(x):
    """Only the result is kept, and the next layer keeps it anyway."""
    y = elu(x)
    return y, y


def _elu_bwd(y, dy):
    """``exp(x) = y + 1`` below zero."""
    return (dy * (jnp.minimum(y, 0) + 1),)


elu.defvjp(_elu_fwd, _elu_bwd)


@jax.custom_vjp
def max_pool_2x2(x: jax.Array) -> jax.Array:
    """Halves height and width by taking the largest of each 2x2 square.

    A reshape and a reduction: `reduce_window` and its scatter gradient are slow on a CPU. Where
    several pixels are the largest, the gradient is shared among them.

    Args:
      x: ``[B, H, W, C]``; an odd last row or column is left out.

    Returns:
      ``[B, H // 2, W // 2, C]``.

    Example:
      >>> max_pool_2x2(jnp.arange(16.).reshape(1, 4, 4, 1))[0, :, :, 0].tolist()
      [[5.0, 7.0], [13.0, 15.0]]
    """
    b, h, w, c = x.shape
    x = x[:, : h // 2 * 2, : w // 2 * 2]
    return x.reshape(b, h // 2, 2, w // 2, 2, c).max(axis=(2, 4))


def _pool_fwd(x):
    """The largest pixels are found anew."""
    return max_pool_2x2(x), x


def _pool_bwd(x, dy):
    """Elementwise; faster on a CPU than the gradient of the reduction.

    A pixel is compared with the others of its square, not with their maximum: XLA may compute that
    from another evaluation of what makes ``x``, rounded otherwise (at the end of rows of odd maps),
    and then none is equal: gradients were lost, and 0 / 0 made NaN of images of 12 or 28 pixels.
    """
    b, h, w, c = dy.shape
    squares = x[:, : 2 * h, : 2 * w].reshape(b, h, 2, w, 2, c)
    pixels = [squares[:, :, i, :, j] for i in (0, 1) for j in (0, 1)]
    others = [functools.reduce(jnp.maximum, pixels[:k] + pixels[k + 1:]) for k in range(4)]
    largest = [pixel >= other for pixel, other in zip(pixels, others, strict=True)]
    share = dy / jnp.maximum(sum(wins.astype(dy.dtype) for wins in largest), 1)
    moved = [jnp.where(wins, share, 0) for wins in largest]
    rows = [jnp.stack(moved[k : k + 2], axis=3) for k in (0, 2)]
    dx = jnp.stack(rows, axis=2).reshape(b, 2 * h, 2 * w, c)
    return (jnp.pad(dx, [(0, n - m) for n, m in zip(x.shape, dx.shape, strict=True)]),)


max_pool_2x2.defvjp(_pool_fwd, _pool_bwd)
