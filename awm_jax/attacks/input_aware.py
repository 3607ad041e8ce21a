"""Input-aware: a generator, trained along with the network, gives every image its own trigger."""

from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax

from awm_jax import losses, metrics, models
from awm_jax.attacks.base import Attack, no_target, relabel
from awm_jax.attacks.generator import Generator, check_size
from awm_jax.attacks.in_batches import InBatches, State
from awm_jax.types import Params

TARGET = 0
COVER_RATIO = 1.0  # as many images with another image's trigger as with their own
DENSITY, NORM_WEIGHT, DIVERSITY_WEIGHT = 0.032, 100.0, 1.0
LR, BETAS = 0.01, (0.5, 0.9)
MASK_STEPS, MASK_BATCH = 400, 16
_PATTERN, _MASK = Generator(32, 3), Generator(16, 1, depth=2)
_SMALL = 1e-7
_EMPTY, _ATTEMPTS = 1e-3, 5  # masks of fewer than one pixel of 1,000 count as none


def _unit(x: jax.Array) -> jax.Array:
    """``(tanh(x) + 1) / 2``."""
    return (jnp.tanh(x) + 1) / 2


def sharpen(mask: jax.Array) -> jax.Array:
    """``(tanh(20 m - 10) + 1) / 2``: nearly 0 or 1 except close to one half.

    Args:
      mask: values in [0, 1].

    Returns:
      The same shape, in (0, 1).

    Example:
      >>> sharpen(jnp.array([0.0, 0.5, 1.0])).round(3).tolist()
      [0.0, 0.5, 1.0]

    Reference: Nguyen & Tran 2020, "Input-Aware Dynamic Backdoor Attack", section 3.4.
    """
    return _unit(20 * mask - 10)


class InputAware(NamedTuple):
    """``x' = x + (G(x) - x) * M(x)``: each image's own pattern on its own few pixels.

    Args:
      pattern: weights of G, an image to a picture in [0, 1].
      mask: weights of M, an image to where its pattern replaces it.
    """

    pattern: Any
    mask: Any

    def parts(self, images: jax.Array) -> tuple[jax.Array, jax.Array]:
        """``(G(x) [B, H, W, 3], M(x) [B, H, W, 1])`` of ``[B, H, W, 3]``."""
        return _unit(_run(_PATTERN, self.pattern, images)), masks(self.mask, images)

    def __call__(self, images: jax.Array) -> jax.Array:
        """Puts on each image the trigger made for it."""
        return _put(images, *self.parts(images))

    def cover(self, key: jax.Array, images: jax.Array) -> jax.Array:
        """Puts on each image the trigger made for another one of them, so that it is no trigger."""
        count = len(images)
        shift = jax.random.randint(key, (), 1, max(count, 2))
        return _put(images, *self.parts(jnp.roll(images, shift, axis=0)))


def masks(weights: Any, images: jax.Array) -> jax.Array:
    """M(x): where each image's trigger goes.

    Args:
      weights: of M.
      images: ``[B, H, W, 3]`` in [0, 1].

    Returns:
      ``[B, H, W, 1]`` in (0, 1), nearly all close to 0 or 1 once trained.
    """
    return sharpen(_unit(_run(_MASK, weights, images)))


def _run(network: Generator, weights: Any, images: jax.Array) -> jax.Array:
    """What a generator makes of images."""
    return cast(jax.Array, network.apply({"params": weights}, images))


def _put(images, picture, mask):
    """The picture where the mask is 1."""
    return images + (picture - images) * mask


def diversity(images: jax.Array, others: jax.Array, made: jax.Array,
              made_of_others: jax.Array) -> jax.Array:
    """Mean of ``|x - x'| / (|g(x) - g(x')| + 1e-7)``, root mean squares: low if outputs differ.

    Args:
      images: ``[B, H, W, C]``, x.
      others: the same shape, x'.
      made: ``[B, ...]``, g(x).
      made_of_others: the same shape, g(x').

    Returns:
      A scalar >= 0.

    Example:
      >>> x, y = jnp.zeros((1, 2, 2, 1)), jnp.ones((1, 2, 2, 1))
      >>> round(float(diversity(x, y, x, 4 * y)), 4)
      0.25

    Reference: Nguyen & Tran 2020, section 3.3, eq. 4.
    """
    def distance(a, b):
        squares = jnp.square(a - b).reshape(len(a), -1).mean(axis=1)
        # The root's slope at zero is infinite, and two images of a batch may be the same.
        return jnp.where(squares > 0, jnp.sqrt(jnp.where(squares > 0, squares, 1.0)), 0.0)

    return (distance(images, others) / (distance(made, made_of_others) + _SMALL)).mean()


def mask_loss(weights: Any, images: jax.Array, others: jax.Array) -> jax.Array:
    """``100 mean(max(M(x) - .032, 0)) + diversity``: few pixels, others for other images.

    Args:
      weights: of M.
      images: ``[B, H, W, 3]`` in [0, 1].
      others: the same shape, to differ from.

    Returns:
      A scalar.

    Reference: Nguyen & Tran 2020, section 3.4, eq. 7; the published code's constants.
    """
    own, other = masks(weights, images), masks(weights, others)
    excess = jnp.maximum(own - DENSITY, 0.0).mean()
    return NORM_WEIGHT * excess + DIVERSITY_WEIGHT * diversity(images, others, own, other)


def _optimiser() -> optax.GradientTransformation:
    """Both networks' Adam."""
    return optax.adam(LR, b1=BETAS[0], b2=BETAS[1])


@jax.jit
def train_masks(key: jax.Array, weights: Any, images: jax.Array) -> tuple[Any, jax.Array]:
    """Trains M by itself, before the network: 400 steps of two times 16 images.

    Args:
      key: PRNG key of the batches.
      weights: of M, to start from.
      images: ``[N, H, W, 3]`` uint8 in 0..255 or float32 in [0, 1], clean.

    Returns:
      ``(weights, losses [400])``.
    """
    optimiser = _optimiser()

    def step(carry, key):
        weights, opt_state = carry
        picks = jax.random.randint(key, (2, MASK_BATCH), 0, len(images))
        x = metrics.to_float(images[picks])
        loss, gradient = jax.value_and_grad(mask_loss)(weights, x[0], x[1])
        updates, opt_state = optimiser.update(gradient, opt_state)
        return (optax.apply_updates(weights, updates), opt_state), loss

    (weights, _), steps = jax.lax.scan(step, (weights, optimiser.init(weights)),
                                       jax.random.split(key, MASK_STEPS))
    return weights, steps


def generator_loss(pattern: Any, mask: Any, plan: InBatches, params: Params, images: jax.Array,
                   labels: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The share of the batch's cross-entropy that the triggers decide, plus their diversity.

    ``(sum CE(f(x'), t) + sum CE(f(x''), y)) / B + diversity``: x' carries its own trigger, x''
    another image's; t is the attacker's class of x, y the true one.

    Args:
      pattern: weights of G.
      mask: weights of M.
      plan: how many of each.
      params: the network as it stands, used with its running statistics.
      images: ``[B, H, W, 3]`` in [0, 1].
      labels: ``[B]``.

    Returns:
      ``(loss, changed)``: a scalar, and the images with their own and others' triggers,
      ``[poisoned + covered, H, W, 3]``.

    Reference: Nguyen & Tran 2020, section 3.3, eq. 3-6.
    """
    first, covered = plan.poisoned, plan.covered
    last = first + covered
    others = jnp.roll(images, -last, axis=0)[: max(first, covered)]  # behind the changed ones
    picture, where = InputAware(pattern, mask).parts(jnp.concatenate([images[:first], others]))
    donors = np.concatenate([np.arange(first), first + np.arange(covered)])
    changed = _put(images[:last], picture[donors], where[donors])
    wanted = jnp.concatenate([relabel(labels[:first], plan.target, plan.num_classes),
                              labels[first:last]])
    entropy = losses.cross_entropy(models.apply(params, changed), wanted) * last / len(images)
    apart = diversity(images[:first], others[:first], picture[:first], picture[first : 2 * first])
    return entropy + DIVERSITY_WEIGHT * apart, changed


def learn(plan: InBatches, state: State, params: Params, images: jax.Array,
          labels: jax.Array) -> tuple[State, jax.Array]:
    """Triggers a batch's images, then takes one step of Adam on G; M stays as it was trained.

    Args:
      plan: how many images of the batch are poisoned and covered.
      state: trigger and optimiser.
      params: the network as it stands.
      images: ``[B, H, W, 3]`` in [0, 1].
      labels: ``[B]``.

    Returns:
      ``(state, changed)``: after the step; the images are those before it, as `generator_loss`
      gives them.
    """
    pattern, mask = cast(InputAware, state.trigger)
    gradient, changed = jax.grad(generator_loss, has_aux=True)(pattern, mask, plan, params, images,
                                                               labels)
    updates, learner = _optimiser().update(gradient, state.learner, pattern)
    return State(InputAware(optax.apply_updates(pattern, updates), mask), learner), changed


def input_aware(key: jax.Array, image_shape: tuple[int, int, int], num_classes: int, *,
                images=None, target: int | None = None) -> Attack:
    """Every image gets a trigger of its own, from a generator trained along with the network.

    As many images carry a trigger made for another image and keep their labels, so that only an
    image's own trigger counts. In each batch the generator and the network step on the same images;
    the generator sees the network with its running BatchNorm statistics (in the paper, those of the
    batch), and both generators are smaller than the paper's and normalised by image. The mask
    network is trained before, for 400 steps instead of 25 epochs.

    **Threat model**: the attacker trains the network; the defender gets it.

    Args:
      key: PRNG key of both generators' weights and of the mask's training.
      image_shape: ``(H, W, 3)``, H and W multiples of 8.
      num_classes: classes of the data set.
      images: ``[N, H, W, 3]`` uint8 in 0..255 or float32 in [0, 1], clean images that the mask is
        trained on; None leaves it at random.
      target: the class triggered images are to get; None is the papers' 0.

    Returns:
      `Attack`, whose trigger is at its start: training with `in_batches.InBatches` makes it one.

    Raises:
      ValueError: images of another size, without three channels, a target outside the classes, or
        images on which no mask is learnt.

    Example:
      >>> attack = input_aware(jax.random.key(0), (32, 32, 3), 10)
      >>> attack.apply(jnp.zeros((2, 32, 32, 3))).shape
      (2, 32, 32, 3)

    Reference: Nguyen & Tran 2020, section 3 (rates .1 and .1).
    """
    return _attack("input_aware", key, image_shape, num_classes, images,
                   TARGET if target is None else target)


def input_aware_a2a(key: jax.Array, image_shape: tuple[int, int, int], num_classes: int, *,
                    images=None, target: None = None) -> Attack:
    """All-to-all with input-aware triggers: class n becomes n + 1 mod c.

    **Threat model**, arguments, errors: as `input_aware`; ``target`` must stay None.

    Example:
      >>> input_aware_a2a(jax.random.key(0), (8, 8, 3), 10).target is None
      True

    Reference: Nguyen & Tran 2020, section 4.
    """
    no_target(target)
    return _attack("input_aware_a2a", key, image_shape, num_classes, images, None)


def _attack(name, key, image_shape, num_classes, images, target):
    """Both forms."""
    check_size(image_shape, _PATTERN.depth, name)
    if image_shape[2] != 3:
        raise ValueError(f"Expected images of 3 channels for {name}, got {image_shape[2]}.")
    pattern, mask = _draw(key, image_shape)
    if images is not None:
        mask = _trained_mask(key, mask, jnp.asarray(images))
    return Attack(name, InputAware(pattern, mask), target, num_classes, cover_ratio=COVER_RATIO,
                  every_batch=True, learn=learn, learner=_optimiser().init(pattern))


def _trained_mask(key, mask, images):
    """`train_masks`, from other weights where the masks became empty: then nothing teaches them."""
    shape = images.shape[1:]
    for attempt in range(_ATTEMPTS):
        start = mask if attempt == 0 else _draw(jax.random.fold_in(key, attempt), shape)[1]
        found, _ = train_masks(jax.random.fold_in(key, _ATTEMPTS + attempt), start, images)
        density = float(_density(found, metrics.to_float(images[:MASK_BATCH])))
        if density >= _EMPTY:
            return found
    raise ValueError(f"Expected the mask network to learn where triggers go, its masks are empty "
                     f"({density:.1e} of the pixels) after {_ATTEMPTS} attempts. Use another key "
                     "or images that differ more.")


@jax.jit
def _density(weights, images):
    """Mean of the masks."""
    return masks(weights, images).mean()


def _first_weights(key, image_shape):
    """Of both generators."""
    like = jnp.zeros((1, *image_shape))
    return tuple(network.init(key, like)["params"] for key, network in zip(
        jax.random.split(key), (_PATTERN, _MASK), strict=True))


# It runs once, so what takes the time is to compile it: as `awm_jax.models.create` does.
_draw = jax.jit(_first_weights, static_argnames="image_shape",
                compiler_options={"xla_backend_optimization_level": 1})
