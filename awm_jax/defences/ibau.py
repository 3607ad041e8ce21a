"""I-BAU: minimise over the weights what a universal perturbation maximises, exactly to first order.

What distinguishes it from adversarial training is that the perturbation's own dependence on the
weights is followed, by implicit differentiation.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from awm_jax import losses, models, projections, validate
from awm_jax.defences import tuning
from awm_jax.defences.base import WEIGHTS, Defence
from awm_jax.types import Params

# (delta, weights) -> scalar
Level = Callable[[jax.Array, Any], jax.Array]

_OFFICIAL_SHARE = 0.01


@dataclasses.dataclass(frozen=True, kw_only=True)
class IBAUConfig:
    """Settings of I-BAU; the defaults are those of the official code but for ``patching``.

    Args:
      rounds: alternations of perturbation and unlearning, >= 1.
      batch_size: images a step, >= 1; all of them where there are fewer.
      lr: Adam's learning rate for the weights, > 0.
      inner_lr: step of the perturbation's gradient ascent, > 0, in pixels per unit of gradient.
      penalty: coefficient of ``||delta||_2^2`` that the perturbation pays, >= 0.
      radius: bound on ``||delta||_2``, > 0, in units of pixel intensity; None for no bound. The
        paper's problem has one, the official code only as a comment (10).
      fixed_point_rate: step of the map whose fixed point defines the perturbation, > 0.
      fixed_point_steps: terms of the Neumann series, >= 1.
      patching: which images get the perturbation while unlearning: ``'paper'`` all images,
        ``'official'`` ``int(0.01 * batch)`` of each batch, which is **none of a batch under 100**,
        so that what remains is plain fine-tuning.

    Raises:
      ValueError: a value outside its range.
    """

    rounds: int = 5
    batch_size: int = 100
    lr: float = 1e-3
    inner_lr: float = 10.0
    penalty: float = 1e-3
    radius: float | None = None
    fixed_point_rate: float = 0.1
    fixed_point_steps: int = 5
    patching: str = "paper"

    def __post_init__(self):
        """Checks every range before any work starts."""
        validate.whole(1, rounds=self.rounds, batch_size=self.batch_size,
                       fixed_point_steps=self.fixed_point_steps)
        validate.positive(lr=self.lr, inner_lr=self.inner_lr,
                          fixed_point_rate=self.fixed_point_rate)
        validate.at_least(0, penalty=self.penalty)
        if self.radius is not None:
            validate.positive(radius=self.radius)
        validate.choice(("paper", "official"), patching=self.patching)


def hypergradient(inner: Level, outer: Level, delta: jax.Array, weights: Any, *, rate: float,
                  steps: int) -> tuple[Any, jax.Array]:
    """``d/dw L_out(delta*(w), w)`` where ``delta*`` minimises ``L_in(., w)``.

    With ``Phi(d, w) = d - rate * dL_in/dd``, whose fixed point is ``delta*``,
    ``dL_out/dw + (dPhi/dw)' v`` where ``v = (I - (dPhi/dd)')^-1 dL_out/dd``, and of the inverse the
    first ``steps`` terms of its Neumann series: ``v <- (dPhi/dd)' v + dL_out/dd``.

    The series converges where ``Phi`` contracts, that is where ``L_in`` is strongly convex and
    ``rate`` small. I-BAU's inner loss is minus a cross-entropy, which is not convex: there
    ``steps`` is a truncation, and more of them are not more exact.

    Args:
      inner: ``(delta, weights) -> scalar``, twice differentiable.
      outer: ``(delta, weights) -> scalar``.
      delta: an array, (near) the minimiser of ``inner(., weights)``.
      weights: a tree of arrays.
      rate: step of ``Phi``, > 0.
      steps: terms of the series, >= 1.

    Returns:
      ``(gradient, loss)``: a tree shaped like ``weights``, and ``outer(delta, weights)``.

    Example:
      The inner problem gives ``delta* = 3 w``, so the outer one is ``9 w^2 / 2``:

      >>> g, _ = hypergradient(lambda d, w: (d - 3 * w)**2 / 2, lambda d, w: d**2 / 2,
      ...                      jnp.array(6.), jnp.array(2.), rate=0.5, steps=40)
      >>> round(float(g), 4)
      18.0

    Reference: Zeng et al. 2022, section 3.2; Grazzi et al. 2020, "On the Iteration Complexity of
      Hypergradient Computation", Algorithm 2.
    """

    def fixed_point_map(delta, weights):
        return delta - rate * jax.grad(inner)(delta, weights)

    _, pull = jax.vjp(fixed_point_map, delta, weights)
    loss, (by_delta, by_weights) = jax.value_and_grad(outer, (0, 1))(delta, weights)
    # The first step, from zero, gives dL_out/dd itself.
    v = jax.lax.fori_loop(1, steps, lambda _, v: pull(v)[0] + by_delta, by_delta)
    return jax.tree.map(jnp.add, by_weights, pull(v)[1]), loss


def inner_loss(params: Params, delta: jax.Array, images: jax.Array, labels: jax.Array,
               penalty: float) -> jax.Array:
    """``-CE(f(x + delta), y) + penalty * ||delta||_2^2``, what the perturbation minimises.

    Args:
      params: the network.
      delta: ``[H, W, C]``, one for all images.
      images: ``[B, H, W, C]`` in [0, 1]; the sum is not clipped, as in the official code.
      labels: ``[B]``.
      penalty: >= 0.

    Returns:
      A scalar.

    Example: see `perturbation`, which descends it.
    """
    logits = models.apply(params, images + delta[None])
    return penalty * (delta**2).sum() - losses.cross_entropy(logits, labels)


def perturbation(params: Params, images: jax.Array, batches: jax.Array,
                 config: IBAUConfig) -> jax.Array:
    """One pass of gradient descent on `inner_loss` from zero, labels being the network's answers.

    Args:
      params: the network.
      images: ``[n, H, W, C]`` in [0, 1].
      batches: ``[steps, B]`` indices of images.
      config: ``inner_lr``, ``penalty``, ``radius``.

    Returns:
      ``[H, W, C]``.

    Example: the triggers that the defence puts into its ``info``.
    """

    def step(delta, picks):
        x = images[picks]
        answers = models.apply(params, x).argmax(axis=1)
        gradient = jax.grad(inner_loss, 1)(params, delta, x, answers, config.penalty)
        return delta - config.inner_lr * gradient, None

    delta, _ = jax.lax.scan(step, jnp.zeros(images.shape[1:], images.dtype), batches)
    return delta if config.radius is None else projections.scale_to_l2(delta, config.radius)


def _patched(key: jax.Array, images: jax.Array, delta: jax.Array, patching: str) -> jax.Array:
    """Images with the perturbation on all of them, or on the official code's hundredth."""
    if patching == "paper":
        return images + delta[None]
    count = int(_OFFICIAL_SHARE * len(images))
    chosen = jax.random.permutation(key, len(images)) < count
    return images + chosen[:, None, None, None] * delta[None]


def _method(key: jax.Array, params: Params, images: jax.Array, labels: jax.Array,
            config: IBAUConfig) -> tuple[Params, dict]:
    """``min_w max_delta mean CE(f(x + delta; w), y)``, the maximiser followed implicitly.

    BatchNorm keeps its statistics throughout: the official code evaluates, and so freezes them,
    before it starts. As there, the batches stay the same in every round, and the first of them
    with its true labels defines the inner problem that is differentiated.
    """
    key_order, key_steps = jax.random.split(key)
    batches = tuning.minibatches(key_order, len(images), config.batch_size, 1)
    first = images[batches[0]], labels[batches[0]]
    rule = optax.adam(config.lr)

    def descend(delta, carry, inputs):
        (weights, opt_state), (picks, key) = carry, inputs

        def network(weights):
            return Params(weights, params.batch_stats, params.arch)

        def inner(delta, weights):
            return inner_loss(network(weights), delta, *first, config.penalty)

        def outer(delta, weights):
            x = _patched(key, images[picks], delta, config.patching)
            return losses.cross_entropy(models.apply(network(weights), x), labels[picks])

        gradients, loss = hypergradient(inner, outer, delta, weights,
                                        rate=config.fixed_point_rate,
                                        steps=config.fixed_point_steps)
        updates, opt_state = rule.update(gradients, opt_state, weights)
        return (optax.apply_updates(weights, updates), opt_state), loss

    def play(carry, key):
        delta = perturbation(Params(carry[0], params.batch_stats, params.arch), images, batches,
                             config)
        keys = jax.random.split(key, len(batches))
        carry, values = jax.lax.scan(lambda c, i: descend(delta, c, i), carry, (batches, keys))
        return carry, (values, delta)

    (weights, _), (values, triggers) = jax.lax.scan(
        play, (params.weights, rule.init(params.weights)), jax.random.split(key_steps,
                                                                            config.rounds))
    return (Params(weights, params.batch_stats, params.arch),
            {"loss": values.ravel(), "triggers": triggers})


ibau = Defence(
    name="ibau", method=_method, default=IBAUConfig(), remit=WEIGHTS,
    paper="Zeng et al., Adversarial Unlearning of Backdoors via Implicit Hypergradient, ICLR 2022, "
    "Algorithm 1",
)

ibau_official = Defence(
    # As the published code runs: one image of a hundred is perturbed.
    name="ibau_official", method=_method, default=IBAUConfig(patching="official"), remit=WEIGHTS,
    fixed=("patching",),
    paper="Zeng et al. 2022, as their published code runs: 1% of a batch is perturbed",
)
