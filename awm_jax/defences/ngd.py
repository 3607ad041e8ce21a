"""Natural-gradient fine-tuning (NGF, also NGD) of the last layer, solved exactly."""

import dataclasses

import jax
import jax.numpy as jnp
import optax

from awm_jax import losses, models, validate
from awm_jax.defences import chunks, tuning
from awm_jax.defences.base import CLASSIFIER, Defence
from awm_jax.types import Params


@dataclasses.dataclass(frozen=True, kw_only=True)
class NGDConfig:
    """Settings of `ngd`.

    The rate and the number of steps are those of the authors' next method (FIP), whose code is
    public; this one's is not. Damping, the regulariser's weight and the cosine along which the rate
    falls are choices of this project.

    Args:
      steps: minibatches, >= 1.
      batch_size: images a step, >= 1; all of them where there are fewer. A step decomposes a square
        matrix of this size.
      lr: learning rate, > 0, falling to zero along a cosine.
      damping: added to the Fisher matrix's diagonal, > 0. A smaller one follows the curvature
        further and makes longer steps: without the regulariser's pull, a step is at most
        ``lr / (2 sqrt(damping))`` long.
      eta: weight of the Fisher regulariser, >= 0: how firmly what the clean images rest on is kept.

    Raises:
      ValueError: a value outside its range.
    """

    steps: int = 2000
    batch_size: int = 128
    lr: float = 0.005
    damping: float = 1e-3
    eta: float = 0.1

    def __post_init__(self):
        """Checks every range before any work starts."""
        validate.whole(1, steps=self.steps, batch_size=self.batch_size)
        validate.positive(lr=self.lr, damping=self.damping)
        validate.at_least(0, eta=self.eta)


def fisher_diagonal(features: jax.Array, errors: jax.Array) -> jax.Array:
    """``diag F = mean_i (x_i e_i^T)^2``, the diagonal of a dense layer's empirical Fisher matrix.

    The gradient of one image's cross-entropy is the outer product of its features ``x`` and its
    error ``e = p - onehot(y)``, so no gradient is ever formed.

    Args:
      features: ``[n, d]`` what the layer sees.
      errors: ``[n, c]`` probabilities minus one-hot labels.

    Returns:
      ``[d, c]``, >= 0.

    Example:
      >>> fisher_diagonal(jnp.array([[1., 2.]]), jnp.array([[.5, -.5]])).tolist()
      [[0.25, 0.25], [1.0, 1.0]]

    Reference: NGF (Karim et al. 2023), the Fisher matrix over clean images and their labels.
    """
    with jax.default_matmul_precision("highest"):
        return (features**2).T @ errors**2 / len(features)


def natural_gradient(features: jax.Array, errors: jax.Array, pull: jax.Array,
                     damping: jax.Array) -> jax.Array:
    """``(F + diag(damping))^-1 (g + pull)`` for a dense layer, exactly, by an ``n x n`` problem.

    With the images' gradients over sqrt(n) as the rows of ``U``, ``F = U^T U`` and ``g = U^T a``
    where every entry of ``a`` is 1/sqrt(n). With ``V = U diag(damping)^(-1/2)`` and
    ``q = diag(damping)^(-1/2) pull``, the Woodbury identity gives
    ``diag(damping)^(-1/2) (q + V^T (I + V V^T)^-1 (a - V q))``. The gradients are outer products
    ``x e^T``, so ``V V^T`` is the sum over the classes k of ``X diag(damping_k)^-1 X^T / n`` times
    ``e_k e_k^T``, elementwise; ``V`` is never formed.

    Args:
      features: ``[n, d]`` what the layer sees (a column of ones for the bias).
      errors: ``[n, c]`` probabilities minus one-hot labels.
      pull: ``[d, c]`` the part of the gradient that is not the images', such as a regulariser's.
      damping: ``[d, c]``, > 0.

    Returns:
      ``[d, c]``.

    Example:
      >>> x, e = jnp.array([[1., 0.]]), jnp.array([[1.]])
      >>> natural_gradient(x, e, jnp.zeros((2, 1)), jnp.ones((2, 1))).tolist()
      [[0.5], [0.0]]

    Reference: NGF (Karim et al. 2023), the natural gradient; damping and solution are this
    project's.
    """
    share = len(features) ** -0.5
    root = jnp.sqrt(damping)
    # TensorFloat-32 would lose the small eigenvalues.
    with jax.default_matmul_precision("highest"):
        scaled = share * features[None] / root.T[:, None]
        by_class = (scaled @ scaled.transpose(0, 2, 1)) * errors.T[:, :, None] * errors.T[:, None]
        values, vectors = jnp.linalg.eigh(by_class.sum(axis=0))
        # Rounding turns eigenvalues that are zero negative; a Cholesky factor would be NaN there.
        inverse = 1.0 / (1.0 + jnp.maximum(values, 0.0))
        target = share - share * ((features @ (pull / damping)) * errors).sum(axis=1)
        solution = vectors @ (inverse * (vectors.T @ target))
        return (pull + share * features.T @ (solution[:, None] * errors)) / damping


def _features(params: Params, images: jax.Array, batch_size: int) -> jax.Array:
    """``[n, d + 1]`` features in batches, so that their memory is bounded, and a one."""
    found = chunks.over_images(lambda x: models.features(params, x), images, batch_size)
    return jnp.concatenate([found, jnp.ones_like(found[:, :1])], axis=1)


def _errors(theta: jax.Array, features: jax.Array, labels: jax.Array) -> jax.Array:
    """``p - onehot(y)``, the gradient of the cross-entropy with respect to the logits."""
    return jax.nn.softmax(features @ theta) - jax.nn.one_hot(
        labels, theta.shape[1], dtype=theta.dtype)


def _method(key: jax.Array, params: Params, images: jax.Array, labels: jax.Array,
            config: NGDConfig) -> tuple[Params, dict]:
    """``min_theta L + eta/2 sum_j F_jj (theta_j - theta0_j)^2`` over the last layer.

    F of the regulariser is that of the suspect network over all the images, and stays; the one of
    the natural gradient is each minibatch's, at the present weights. The regulariser, a Gaussian
    prior, joins that matrix with its own curvature: over the damping alone, its gradient would
    overshoot, ever farther, wherever features are long.
    """
    name = models.needed_classifier(params.arch)
    dense = models.layer(params.weights, name)
    start = jnp.concatenate([dense["kernel"], *(dense[k][None] for k in dense if k == "bias")])
    features = _features(params, images, config.batch_size)[:, :len(start)]
    importance = config.eta * fisher_diagonal(features, _errors(start, features, labels))
    damping = config.damping + importance
    epochs = tuning.passes(config.steps, len(images), config.batch_size)
    order = tuning.minibatches(key, len(images), config.batch_size, epochs)[:config.steps]
    rule = optax.sgd(optax.cosine_decay_schedule(config.lr, config.steps))

    def step(carry, picks):
        theta, opt_state = carry
        x, y = features[picks], labels[picks]
        direction = natural_gradient(x, _errors(theta, x, y), importance * (theta - start),
                                     damping)
        value = losses.cross_entropy(x @ theta, y) + (
            importance * (theta - start) ** 2).sum() / 2
        updates, opt_state = rule.update(direction, opt_state)
        return (optax.apply_updates(theta, updates), opt_state), value

    (theta, _), values = jax.lax.scan(step, (start, rule.init(start)), order)
    width = len(dense["kernel"])
    found = {"kernel": theta[:width], "bias": theta[-1]}
    weights = models.with_layer(params.weights, name, {part: found[part] for part in dense})
    return dataclasses.replace(params, weights=weights), {
        "loss": values, "moved": jnp.linalg.norm(theta - start)}


ngd = Defence(
    name="ngd", method=_method, default=NGDConfig(),
    remit=CLASSIFIER,
    fits=models.needed_classifier,
    paper="NGF (Karim et al. 2023, arXiv 2306.17441; NGD in FT-SAM's Table 5)",
)
