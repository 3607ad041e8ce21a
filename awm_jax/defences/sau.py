"""SAU: make the network disagree with its former self on examples that fool both alike."""

import dataclasses

import jax
import jax.numpy as jnp
import optax

from awm_jax import losses, models, validate
from awm_jax.defences import tuning
from awm_jax.defences.base import WEIGHTS, Defence
from awm_jax.types import Params

_each_loss = optax.softmax_cross_entropy_with_integer_labels


@dataclasses.dataclass(frozen=True, kw_only=True)
class SAUConfig(tuning.MinibatchConfig):
    """Settings of SAU; the rest are `tuning.MinibatchConfig`'s.

    The defaults are the authors' but for ``batch_size`` and ``crop``, ours.

    Args:
      lr: Adam's learning rate, > 0, constant.
      radius: bound on each number of a perturbation, > 0, in units of pixel intensity.
      ascent_lr: step of its signed gradient ascent, > 0, in the same units.
      ascent_steps: >= 1.
      fooling: weight of the cross-entropies in the ascent, >= 0.
      sharing: weight there of minus the divergence between the two networks, >= 0.
      unlearning: weight of disagreement beside the clean cross-entropy, >= 0.

    Raises:
      ValueError: a value outside its range.
    """

    lr: float = 1e-4
    radius: float = 0.2
    ascent_lr: float = 0.2
    ascent_steps: int = 5
    fooling: float = 0.01
    sharing: float = 1.0
    unlearning: float = 1.0

    def __post_init__(self):
        """Checks every range before any work starts."""
        super().__post_init__()
        validate.whole(1, ascent_steps=self.ascent_steps)
        validate.positive(lr=self.lr, radius=self.radius, ascent_lr=self.ascent_lr)
        validate.at_least(0, fooling=self.fooling, sharing=self.sharing,
                          unlearning=self.unlearning)


def jensen_shannon(logits: jax.Array, others: jax.Array) -> jax.Array:
    """``(KL(p || (p + q) / 2) + KL(q || (p + q) / 2)) / 2`` of two softmaxes, row by row.

    Args:
      logits: ``[B, c]`` of p.
      others: ``[B, c]`` of q.

    Returns:
      ``[B]`` in [0, log 2].

    Example:
      >>> far = jensen_shannon(jnp.array([[40., 0.]]), jnp.array([[0., 40.]]))
      >>> bool(jnp.isclose(far, jnp.log(2))[0])
      True
    """
    p, q = jax.nn.log_softmax(logits), jax.nn.log_softmax(others)
    middle = jnp.logaddexp(p, q) - jnp.log(2.0)
    return (jnp.exp(p) * (p - middle) + jnp.exp(q) * (q - middle)).sum(axis=1) / 2


def shared_examples(params: Params, reference: Params, images: jax.Array, labels: jax.Array,
                    config: SAUConfig) -> jax.Array:
    """Perturbations that move both networks to one and the same wrong class.

    Signed ascent within ``|delta| <= radius`` on
    ``fooling * (CE(f(x + d), y) + CE(f0(x + d), y)) / 2 - sharing * JS(f(x + d), f0(x + d))``.
    A network that is fooled already leaves the first sum, an image on which both give the same
    wrong class leaves the second. Here "wrong" is not the label, as in the paper; the official
    code compares with each network's own answer to the clean image.

    Args:
      params: the network ``f`` that is being purified.
      reference: the suspect one, ``f0``.
      images: ``[B, H, W, C]`` in [0, 1]; the sum is not clipped, as in the official code.
      labels: ``[B]``.
      config: ``radius``, ``ascent_lr``, ``ascent_steps``, ``fooling``, ``sharing``.

    Returns:
      ``[B, H, W, C]`` in [-radius, radius], one an image; the search starts from ``radius``
      everywhere, as in the official code.

    Example: see `awm_jax.defences.sau`.

    Reference: Wei et al. 2023, section 3.3, the inner maximisation.
    """

    def objective(delta):
        now, before = (models.apply(p, images + delta) for p in (params, reference))
        answer, former = now.argmax(axis=1), before.argmax(axis=1)
        away = (jnp.where(answer == labels, _each_loss(now, labels), 0.0)
                + jnp.where(former == labels, _each_loss(before, labels), 0.0)) / 2
        shared = (answer == former) & (answer != labels)
        apart = jnp.where(shared, 0.0, jensen_shannon(now, before))
        return config.fooling * away.mean() - config.sharing * apart.mean()

    def step(_, delta):
        delta = delta + config.ascent_lr * jnp.sign(jax.grad(objective)(delta))
        return jnp.clip(delta, -config.radius, config.radius)

    return jax.lax.fori_loop(0, config.ascent_steps, step, jnp.full_like(images, config.radius))


def disagreement(logits: jax.Array, answers: jax.Array, labels: jax.Array) -> jax.Array:
    """Mean of ``-log(1 - softmax(z)_a)`` over the images where the answer ``a`` is wrong.

    Args:
      logits: ``[B, c]`` of the network on perturbed images.
      answers: ``[B]``, what the suspect network gives them.
      labels: ``[B]``.

    Returns:
      A scalar >= 0; right answers count as zero. The logarithm is of the other classes' sum, so it
      needs no clamp (the official code has several).

    Example:
      >>> z = jnp.zeros((2, 4))
      >>> bool(jnp.isclose(disagreement(z, jnp.array([1, 2]), jnp.array([0, 2])),
      ...                  jnp.log(4 / 3) / 2))
      True

    Reference: Wei et al. 2023, section 3.3, the loss of shared adversarial risk.
    """
    given = jax.nn.one_hot(answers, logits.shape[1], dtype=bool)
    others = jax.nn.logsumexp(jnp.where(given, -jnp.inf, logits), axis=1)
    each = jax.nn.logsumexp(logits, axis=1) - others
    return jnp.where(answers != labels, each, 0.0).mean()


def _method(key: jax.Array, params: Params, images: jax.Array, labels: jax.Array,
            config: SAUConfig) -> tuple[Params, dict]:
    """``min_w L(f(x), y) + unlearning * disagreement`` on ever new shared examples.

    BatchNorm keeps its statistics, as one of the authors' two programs has it by default.
    """

    def gradient(key, current, x, y):
        delta = shared_examples(current, params, x, y, config)
        answers = models.apply(params, x + delta).argmax(axis=1)

        def loss(key, network, x, y):
            logits = models.apply(network, jnp.concatenate([x, x + delta]))
            clean, perturbed = logits[:len(x)], logits[len(x):]
            total = losses.cross_entropy(clean, y) + config.unlearning * disagreement(
                perturbed, answers, y)
            return total, params.batch_stats

        return tuning.plain(loss)(key, current, x, y)

    tuned, values = tuning.descend(key, params, images, labels, config, gradient=gradient,
                                   optimiser=optax.adam(config.lr))
    return tuned, {"loss": values}


sau = Defence(
    name="sau", method=_method, default=SAUConfig(), remit=WEIGHTS,
    paper="Wei et al., Shared Adversarial Unlearning: Backdoor Mitigation by Unlearning Shared "
    "Adversarial Examples, NeurIPS 2023, section 3.3",
)
