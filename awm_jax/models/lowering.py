"""A convolution made from a native and a CPU form, with gradients of its own of every order.

A convolution is linear in its image and in its kernel. So the gradient in one is linear in the
other and in what comes back, and the gradients of that are again of these three kinds: none is ever
left to JAX, which would differentiate shifted slices and take three times as long.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

Pads = tuple[tuple[int, int], tuple[int, int]]


def convolution(native: Callable[..., jax.Array], cpu: Callable[..., jax.Array],
                cpu_input_grad: Callable[..., jax.Array],
                cpu_kernel_grad: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """``conv(x, kernel, strides, pads)``, on a CPU by the forms given for it.

    Args:
      native: ``(x, kernel, strides, pads) -> y``, the platform's own convolution; JAX
        differentiates it.
      cpu: the same for CPUs.
      cpu_input_grad: ``(x, kernel, dy, strides, pads) -> dx``; of ``x`` only the shape is known.
      cpu_kernel_grad: ``(x, kernel, dy, strides, pads) -> dkernel``; of ``kernel`` only the shape.

    Returns:
      The convolution: ``strides`` and ``pads`` are static, any derivative can be taken backwards.

    Example: see `awm_jax.models.depthwise`.
    """

    @functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
    def conv(x, kernel, strides, pads):
        return lax.platform_dependent(
            x, kernel, cpu=lambda x, k: cpu(x, k, strides, pads),
            default=lambda x, k: native(x, k, strides, pads))

    @functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
    def input_grad(kernel, dy, shape, strides, pads):
        def on_cpu(kernel, dy):
            return cpu_input_grad(jax.ShapeDtypeStruct(shape, dy.dtype), kernel, dy, strides, pads)

        def elsewhere(kernel, dy):
            x = jnp.zeros(shape, dy.dtype)
            return jax.vjp(lambda x: native(x, kernel, strides, pads), x)[1](dy)[0]

        return lax.platform_dependent(kernel, dy, cpu=on_cpu, default=elsewhere)

    @functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
    def kernel_grad(x, dy, shape, strides, pads):
        def on_cpu(x, dy):
            return cpu_kernel_grad(x, jax.ShapeDtypeStruct(shape, x.dtype), dy, strides, pads)

        def elsewhere(x, dy):
            kernel = jnp.zeros(shape, x.dtype)
            return jax.vjp(lambda k: native(x, k, strides, pads), kernel)[1](dy)[0]

        return lax.platform_dependent(x, dy, cpu=on_cpu, default=elsewhere)

    def conv_bwd(strides, pads, operands, dy):
        x, kernel = operands
        # Otherwise XLA fuses what makes dy into each of its 3 to 9 shifted copies, and does it
        # anew. Two separate products, so that the unused one is removed as dead code.
        dy = lax.optimization_barrier(dy)
        return (input_grad(kernel, dy, x.shape, strides, pads),
                kernel_grad(x, dy, kernel.shape, strides, pads))

    def input_grad_bwd(_, strides, pads, operands, ct):  # <ct, dx(k, dy)> = <conv(ct, k), dy>
        kernel, dy = operands
        return kernel_grad(ct, dy, kernel.shape, strides, pads), conv(ct, kernel, strides, pads)

    def kernel_grad_bwd(_, strides, pads, operands, ct):  # <ct, dk(x, dy)> = <conv(x, ct), dy>
        x, dy = operands
        return input_grad(ct, dy, x.shape, strides, pads), conv(x, ct, strides, pads)

    # Only the operands are kept: residuals of both platforms' branches would be stored otherwise.
    for function, backward in ((conv, conv_bwd), (input_grad, input_grad_bwd),
                               (kernel_grad, kernel_grad_bwd)):
        function.defvjp(functools.partial(_keep_operands, function), backward)
    return conv


def _keep_operands(function: Callable[..., Any], *args: Any) -> tuple[Any, Any]:
    """The result, and its first two arguments for the way back."""
    return function(*args), args[:2]


def shifted(x: jax.Array, kh: int, kw: int, strides: tuple[int, int],
            pads: Pads) -> list[jax.Array]:
    """What each place of the kernel, row by row, sees: ``kh * kw`` images ``[B, H', W', C]``.

    Example:
      >>> [v[0, 0, 0, 0].item() for v in shifted(jnp.arange(4.).reshape(1, 2, 2, 1), 2, 2, (1, 1),
      ...                                        ((0, 0), (0, 0)))]
      [0.0, 1.0, 2.0, 3.0]
    """
    x = jnp.pad(x, ((0, 0), *pads, (0, 0)))
    (sh, sw), (_, height, width, _) = strides, x.shape
    out_h, out_w = (height - kh) // sh + 1, (width - kw) // sw + 1
    return [x[:, i : i + (out_h - 1) * sh + 1 : sh, j : j + (out_w - 1) * sw + 1 : sw]
            for i in range(kh) for j in range(kw)]


def dilated(dy: jax.Array, x_shape: tuple[int, ...], size: tuple[int, int],
            strides: tuple[int, int], pads: Pads) -> jax.Array:
    """What a convolution with the flipped kernel and stride 1 turns into the image's gradient.

    Args:
      dy: ``[B, H', W', O]``, the gradient of the result.
      x_shape: ``(B, H, W, I)``.
      size: ``(kh, kw)`` of the kernel.
      strides: ``(down, right)`` of the convolution.
      pads: its zeros added: ``((top, bottom), (left, right))``.

    Returns:
      ``[B, H + kh - 1, W + kw - 1, O]``: zeros between the pixels for a stride, and around them.

    Example:
      >>> dilated(jnp.ones((1, 2, 2, 1)), (1, 4, 4, 1), (3, 3), (2, 2), ((1, 1), (1, 1)))[
      ...     0, :, 1, 0].tolist()
      [0.0, 1.0, 0.0, 1.0, 0.0, 0.0]
    """
    widths = []
    for axis in (0, 1):
        span = (dy.shape[axis + 1] - 1) * strides[axis] + 1
        low = size[axis] - 1 - pads[axis][0]
        high = x_shape[axis + 1] + size[axis] - 1 - low - span
        widths.append((low, high, strides[axis] - 1))
    return lax.pad(dy, jnp.zeros((), dy.dtype), ((0, 0, 0), *widths, (0, 0, 0)))
