"""Depthwise convolution: each channel has a kernel of its own, ``y_c = x_c * k_c``.

On a CPU it is nine shifted images (for a 3x3 kernel), each times its weights, summed in one pass:
no copies, and no matrix product, as there is nothing to sum over channels. XLA:CPU's own takes some
fifty times as long, and hundreds of times for the kernel's gradient.
"""

import jax
import jax.numpy as jnp
from jax import lax

from awm_jax.models import lowering
from awm_jax.models.lowering import Pads

_DIMS = ("NHWC", "HWIO", "NHWC")


def _cpu_conv(x, kernel, strides, pads):
    """The sum of shifted images, each times its weights."""
    kh, kw, _, channels = kernel.shape
    # Otherwise XLA fuses what makes x, a BatchNorm as a rule, into each of the shifted images.
    shifted = lowering.shifted(lax.optimization_barrier(x), kh, kw, strides, pads)
    return sum(v * k for v, k in zip(shifted, kernel.reshape(kh * kw, 1, 1, 1, channels),
                                     strict=True))


def _cpu_input_grad(x, kernel, dy, strides, pads):
    """The gradient, spread by the stride, convolved with the flipped kernel."""
    dy = lowering.dilated(dy, x.shape, kernel.shape[:2], strides, pads)
    return _cpu_conv(dy, kernel[::-1, ::-1], (1, 1), ((0, 0), (0, 0)))


def _cpu_kernel_grad(x, kernel, dy, strides, pads):
    """For each of the kernel's places, the sum of shifted image times gradient.

    Image by image, pixels apart until the end: XLA:CPU reduces all but the last axis in steps of a
    whole row, five times as slowly.
    """
    kh, kw = kernel.shape[:2]

    def add(totals, inputs):
        image, slope = inputs
        shifted = lowering.shifted(image[None], kh, kw, strides, pads)
        return [t + v[0] * slope for t, v in zip(totals, shifted, strict=True)], None

    start = [jnp.zeros(dy.shape[1:], dy.dtype)] * (kh * kw)
    totals, _ = lax.scan(add, start, (x, dy))
    return jnp.stack([t.sum(axis=(0, 1)) for t in totals]).reshape(kernel.shape)


def _native_conv(x, kernel, strides, pads):
    """The platform's own convolution."""
    return lax.conv_general_dilated(x, kernel, strides, pads, dimension_numbers=_DIMS,
                                    feature_group_count=x.shape[-1])


_conv = lowering.convolution(_native_conv, _cpu_conv, _cpu_input_grad, _cpu_kernel_grad)


def conv(x: jax.Array, kernel: jax.Array, strides: tuple[int, int], pads: Pads) -> jax.Array:
    """Convolves each channel of NHWC images with its own kernel.

    Args:
      x: ``[B, H, W, C]``.
      kernel: ``[kh, kw, 1, C]``.
      strides: positive steps ``(down, right)``.
      pads: zeros added: ``((top, bottom), (left, right))``.

    Returns:
      ``[B, H', W', C]``.

    Example:
      >>> x = jnp.ones((1, 4, 4, 2))
      >>> conv(x, jnp.ones((3, 3, 1, 2)), (1, 1), ((1, 1), (1, 1)))[0, 0, :, 1].tolist()
      [4.0, 6.0, 6.0, 4.0]
    """
    return _conv(x, kernel, strides, pads)
