"""TrojanNN: a stamp whose pixels drive two well-connected neurons of a network far up."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from awm_jax import models
from awm_jax.attacks import ascent
from awm_jax.attacks.base import Attack, check_target
from awm_jax.attacks.triggers import Trigger
from awm_jax.types import Params

TARGET = 0
NEURONS, VALUE = 2, 100.0
STEPS, STEP = 200, 0.1
SMALLEST = 8  # pixels a side


def connected(params: Params, count: int = NEURONS) -> jax.Array:
    """The inputs of the last dense layer that move the logits most: largest ``sum_c |w_jc|``.

    Args:
      params: a network that a dense layer ends.
      count: how many, >= 1.

    Returns:
      ``[count]`` indices, the best connected first.

    Raises:
      ValueError: a network without such a layer.

    Example:
      >>> from awm_jax.types import Arch
      >>> kernel = jnp.array([[1.0, 1.0], [-3.0, 0.0], [0.5, -2.0]])
      >>> arch = Arch(name='small_vgg', num_classes=2)
      >>> connected(Params({'dense': {'kernel': kernel}}, {}, arch)).tolist()
      [1, 2]

    Reference: Liu et al. 2018, section IV-B ("select neurons").
    """
    kernel = models.layer(params.weights, models.needed_classifier(params.arch))["kernel"]
    return jax.lax.top_k(jnp.abs(kernel).sum(axis=1), count)[1]


@functools.partial(jax.jit, static_argnames=("steps", "features_fn"))
def excite(params: Params, images: jax.Array, start: jax.Array, mask: jax.Array,
           neurons: jax.Array, *, steps: int = STEPS, features_fn: Callable = models.features
           ) -> tuple[jax.Array, jax.Array]:
    """Gradient descent in a mask: ``C = mean_b sum_j (f_j(x_b) - 100)^2`` for chosen features f_j.

    ``d <- clip(d - .1 sqrt(n) g / ||g||, 0, 1)`` with g the gradient of C, n the number of values
    in the mask. Normalised, since 100 is far and g itself would send pixels from end to end; and
    200 steps instead of the usual 1000, since on GTSRB the cost stands still after some 100.

    Args:
      params: the attacker's network.
      images: ``[B, H, W, C]`` float32 in [0, 1]; the mask's pixels of them are replaced.
      start: ``[H, W, C]`` in [0, 1], first values.
      mask: ``[H, W, 1]`` in {0, 1}.
      neurons: ``[k]`` which features.
      steps: >= 1.
      features_fn: ``(params, images) -> [B, d]``.

    Returns:
      ``(pattern [H, W, C], costs [steps])``: the pattern of the lowest cost, zero outside the mask,
      and the cost before each step.

    Example:
      >>> def total(params, images):
      ...     return params * images.sum(axis=(1, 2))
      >>> pattern, _ = excite(jnp.ones(()), jnp.zeros((1, 2, 2, 1)), jnp.full((2, 2, 1), .5),
      ...                     jnp.ones((2, 2, 1)), jnp.array([0]), features_fn=total)
      >>> pattern.ravel().tolist()
      [1.0, 1.0, 1.0, 1.0]

    Reference: Liu et al. 2018, Algorithm 1.
    """
    values = mask.sum() * start.shape[-1]

    def cost(pattern):
        stamped = images * (1 - mask[None]) + (pattern * mask)[None]
        return ((features_fn(params, stamped)[:, neurons] - VALUE) ** 2).sum(axis=1).mean()

    def step(carry, _):
        pattern, best, lowest = carry
        now, gradient = jax.value_and_grad(cost)(pattern)
        best = jnp.where(now < lowest, pattern, best)
        gradient = gradient * mask
        norm = jnp.sqrt((gradient**2).sum())
        move = STEP * jnp.sqrt(values) * gradient / jnp.where(norm > 0, norm, 1.0)
        moved = jnp.clip(pattern - move, 0.0, 1.0)
        return (moved, best, jnp.minimum(now, lowest)), now

    first = jnp.clip(start * mask, 0.0, 1.0)
    (_, best, _), costs = jax.lax.scan(step, (first, first, jnp.inf), None, length=steps)
    return best, costs


def corner(image_shape: tuple[int, int, int]) -> np.ndarray:
    """``[H, W, 1]``: a square a quarter of the shorter side, a pixel from the lower right corner.

    Args:
      image_shape: ``(H, W, C)``, at least 8x8.

    Returns:
      The mask in {0, 1}, 6% of a square image.

    Raises:
      ValueError: smaller images.

    Example:
      >>> float(corner((32, 32, 3)).sum()), corner((8, 8, 1))[5:, 5:, 0].astype(int).tolist()
      (64.0, [[1, 1, 0], [1, 1, 0], [0, 0, 0]])
    """
    height, width, _ = image_shape
    if min(height, width) < SMALLEST:
        raise ValueError(f"Expected images of at least {SMALLEST}x{SMALLEST} pixels, got "
                         f"{width}x{height}.")
    side = min(height, width) // 4
    mask = np.zeros((height, width, 1), np.float32)
    mask[height - 1 - side : height - 1, width - 1 - side : width - 1] = 1.0
    return mask


def trojannn(key: jax.Array, image_shape: tuple[int, int, int], num_classes: int, *,
             params: Params | None = None, images=None, target: int | None = None) -> Attack:
    """A square that replaces pixels, its values driving a network's two best connected neurons up.

    The paper's mask is an apple or a logo and it retrains the network it was given; here, as in
    BackdoorBench, the stamp is found on one network and poisons the training of another.

    **Threat model**: the attacker holds a network of the same task, finds the stamp in it, and
    poisons training data and labels with it.

    Args:
      key: PRNG key of the random start.
      image_shape: ``(H, W, C)``, at least 8x8.
      num_classes: classes of the data set.
      params: the attacker's network; None gives random values in the same place.
      images: ``[B, H, W, C]`` float32 in [0, 1] that the stamp is tried on; needed with params.
      target: the class triggered images are to get; None is 0.

    Returns:
      `Attack`.

    Raises:
      ValueError: smaller images, a target outside the classes, or params without images, with other
        classes or without a dense layer at its end.

    Example:
      >>> attack = trojannn(jax.random.key(0), (32, 32, 3), 10)
      >>> float(attack.trigger.mask.sum())
      64.0

    Reference: Liu et al. 2018, "Trojaning Attack on Neural Networks", section IV.
    """
    target = TARGET if target is None else target
    check_target(target, num_classes)
    mask = jnp.asarray(corner(image_shape))
    pattern = jax.random.uniform(key, image_shape) * mask
    if params is not None:
        images = ascent.check_surrogate(params, images, image_shape, num_classes, models.apply)
        pattern, _ = excite(params, images, pattern, mask, connected(params))
    return Attack("trojannn", Trigger(pattern, mask), target, num_classes)
