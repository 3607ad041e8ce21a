"""Small smooth warps: what they do to images, and one step of a search for the worst."""

import jax
import jax.numpy as jnp
import numpy as np

KNOTS = 6
BOUND = 0.75  # pixels; WaNet's own moves by a quarter on average, by half at most knots
_STEPS_ACROSS = 5  # sign steps from rest to the bound
_KEYS = -0.75  # the cubic kernel's parameter, as in most image libraries


def cubic(knots: int, size: int) -> np.ndarray:
    """The matrix of cubic interpolation between knots, of which the first and last lie on borders.

    Args:
      knots: k, >= 2.
      size: places, evenly spaced, >= 2.

    Returns:
      ``[size, k]``, rows that sum to 1.

    Example:
      >>> cubic(2, 3).tolist()
      [[1.0, 0.0], [0.5, 0.5], [0.0, 1.0]]

    Reference: Keys 1981, "Cubic Convolution Interpolation for Digital Image Processing".
    """
    at = np.linspace(0, knots - 1, size)
    first = np.floor(at).astype(int)
    matrix = np.zeros((size, knots))
    for offset in (-1, 0, 1, 2):
        t = np.abs(at - (first + offset))
        near = (_KEYS + 2) * t**3 - (_KEYS + 3) * t**2 + 1
        far = _KEYS * (t**3 - 5 * t**2 + 8 * t - 4)
        weight = np.where(t <= 1, near, np.where(t < 2, far, 0.0))
        np.add.at(matrix, (np.arange(size), np.clip(first + offset, 0, knots - 1)), weight)
    return matrix


def field(warp: jax.Array, height: int, width: int) -> jax.Array:
    """How far each pixel looks aside: knots joined by cubic interpolation, at most one pixel.

    Args:
      warp: ``[..., k, k, 2]`` pixels to the right, then down, at knots evenly spaced.
      height: H in pixels.
      width: W in pixels.

    Returns:
      ``[..., H, W, 2]`` in [-1, 1].

    Raises:
      ValueError: another shape.

    Example:
      >>> field(jnp.full((2, 2, 2), .5), 3, 3)[1, 1].tolist()
      [0.5, 0.5]

    Reference: Nguyen & Tran 2021, "WaNet", section 3.2.
    """
    knots = warp.shape[-2] if warp.ndim >= 3 else 0
    if knots < 2 or warp.shape[-3:] != (knots, knots, 2):
        raise ValueError(f"Expected a warp of shape [..., k, k, 2] with k >= 2, got {warp.shape}.")
    rows, columns = (jnp.asarray(cubic(knots, n), warp.dtype) for n in (height, width))
    return jnp.clip(jnp.einsum("ik,jl,...klc->...ijc", rows, columns, warp), -1.0, 1.0)


def bend(images: jax.Array, warp: jax.Array) -> jax.Array:
    """``out(i, j) = x(i + v_ij, j + u_ij)``, bilinear, with (u, v) = `field`; the border repeats.

    By shifts of one pixel, exact because no pixel looks further; a warp of zeros changes nothing.

    Args:
      images: ``[B, H, W, C]``.
      warp: ``[k, k, 2]`` in pixels, or ``[B, k, k, 2]`` one an image.

    Returns:
      ``[B, H, W, C]``.

    Raises:
      ValueError: a warp of another shape, or not one for each image.

    Example:
      >>> row = jnp.arange(3.).reshape(1, 1, 3, 1)
      >>> bend(row, jnp.full((2, 2, 2), .5)).ravel().tolist()
      [0.5, 1.5, 2.0]

    Reference: Jaderberg et al. 2015, "Spatial Transformer Networks", eq. 5.
    """
    if warp.ndim == 4 and len(warp) != len(images):
        raise ValueError(f"Expected one warp or {len(images)}, one an image, got {len(warp)}.")
    flow = field(warp if warp.ndim == 4 else warp[None], *images.shape[1:3])
    right, down = flow[..., :1], flow[..., 1:]
    above, below = _shifted(images, -1, 1), _shifted(images, 1, 1)
    here, above, below = (_between(_shifted(x, -1, 2), x, _shifted(x, 1, 2), right)
                          for x in (images, above, below))
    return _between(above, here, below, down)


def _shifted(images: jax.Array, by: int, axis: int) -> jax.Array:
    """Every pixel's neighbour along an axis, the border's its own."""
    padding = [(1, 1) if i == axis else (0, 0) for i in range(images.ndim)]
    padded = jnp.pad(images, padding, mode="edge")
    return jax.lax.slice_in_dim(padded, 1 + by, 1 + by + images.shape[axis], axis=axis)


def _between(before: jax.Array, here: jax.Array, after: jax.Array, t: jax.Array) -> jax.Array:
    """Linear interpolation at t in [-1, 1] between three neighbours."""
    return (here + jnp.maximum(t, 0) * (after - here) + jnp.maximum(-t, 0) * (before - here))


def ascend(warp: jax.Array, gradient: jax.Array, bound: float = BOUND) -> jax.Array:
    """One step up: ``clip(w + b / 5 sign g, -b, b)``.

    Args:
      warp: ``[k, k, 2]`` in pixels.
      gradient: of what is raised, with respect to it.
      bound: b in pixels, in (0, 1].

    Returns:
      ``[k, k, 2]`` in [-b, b].

    Example:
      >>> ascend(jnp.zeros((1, 1, 2)), jnp.array([[[3., -1.]]]), .5).tolist()
      [[[0.10000000149011612, -0.10000000149011612]]]

    Reference: Madry et al. 2018, "Towards Deep Learning Models Resistant to Adversarial Attacks",
    section 2.1 (projected sign steps).
    """
    return jnp.clip(warp + bound / _STEPS_ACROSS * jnp.sign(gradient), -bound, bound)
