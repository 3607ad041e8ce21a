"""Neurons as factors on the weights: found, multiplied, perturbed, chosen and pruned."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from awm_jax import models, validate
from awm_jax.defences.base import by_path, map_weights
from awm_jax.types import Params


class Factors(NamedTuple):
    """One number for each neuron, by slash-joined layer name.

    Args:
      weight: ``{layer: [c]}``, multiplies BatchNorm's scale or the kernel's output channels.
      bias: ``{layer: [c]}``, multiplies the bias of the layers that have one.
    """

    weight: dict[str, jax.Array]
    bias: dict[str, jax.Array]


def has_norms(params: Params) -> bool:
    """Whether the neurons are BatchNorm channels."""
    return bool(_norms(params))


def _norms(params: Params) -> dict[str, jax.Array]:
    """The scale of every BatchNorm layer, which LayerNorm's is not: that keeps no statistics."""
    kept = {path.rpartition("/")[0] for path in by_path(params.batch_stats)}
    return {layer: leaf for path, leaf in by_path(params.weights).items()
            for layer, _, last in [path.rpartition("/")] if last == "scale" and layer in kept}


def ones(params: Params) -> Factors:
    """All neurons of a network, each with the factor 1.

    They are the BatchNorm channels. In a network without BatchNorm they are the output channels of
    all convolutions and dense layers but the last one, whose outputs are classes, not neurons (the
    counts of ANP's Tables 5 and 6 leave them out too): `awm_jax.models.classifier`, or, where no
    one layer gives the logits, all dense layers as wide as there are classes.

    Args:
      params: the network.

    Returns:
      `Factors` of ones; ``weight`` lists the neurons.

    Raises:
      ValueError: there are none.

    Example:
      >>> from awm_jax.types import Arch
      >>> params = models.create(jax.random.key(0), Arch(name='small_vgg', num_classes=10))
      >>> ones(params).weight['bn6'].shape
      (128,)
    """
    leaves = by_path(params.weights)
    owners = _norms(params)
    if not owners:
        classifier = models.classifier(params.arch)
        kernels = {path.rpartition("/")[0]: leaf for path, leaf in leaves.items()
                   if path.endswith("kernel")}
        wide = {name for name, leaf in kernels.items()
                if leaf.ndim == 2 and leaf.shape[-1] == params.arch.num_classes}
        apart = wide if classifier is None else {classifier}
        owners = {name: leaf for name, leaf in kernels.items() if name not in apart}
    if not owners:
        raise ValueError("Expected BatchNorm layers, convolutions or hidden dense layers to prune, "
                         f"found only: {', '.join(leaves)}.")
    weight = {layer: jnp.ones(leaf.shape[-1], leaf.dtype) for layer, leaf in owners.items()}
    biases = {layer: leaves[f"{layer}/bias"] for layer in owners if f"{layer}/bias" in leaves}
    # Over the last axis alone, as the weights': an attention's biases have two.
    bias = {layer: jnp.ones(leaf.shape[-1], leaf.dtype) for layer, leaf in biases.items()}
    return Factors(weight, bias)


def multiply(params: Params, factors: Factors) -> Params:
    """``f(x; a o w, b o bias)``, with one factor for all weights of a neuron.

    Args:
      params: the network.
      factors: of some or all of its neurons; what they leave out stays as it is.

    Returns:
      `Params` with the factors multiplied in.

    Example: see `awm_jax.defences.anp`, which does so with ``m + delta`` and ``1 + xi``.

    Reference: AWM paper, eq. 3.1.
    """
    def times(path, leaf):
        layer, _, last = path.rpartition("/")
        chosen = factors.bias if last == "bias" else factors.weight
        if layer not in chosen:
            return leaf
        return leaf * chosen[layer].reshape((1,) * (leaf.ndim - 1) + (-1,))

    return dataclasses.replace(params, weights=map_weights(times, params.weights))


def prune(params: Params, keep: dict[str, jax.Array]) -> Params:
    """The network without the neurons whose factor is 0.

    With BatchNorm only the scale is zeroed, as the published code does: the neuron then puts out
    its bias, a constant that no input changes. Without BatchNorm kernel and bias are zeroed.

    Args:
      params: the network.
      keep: ``{layer: [c]}`` of 0 and 1.

    Returns:
      `Params` of the same shapes.

    Example: see `awm_jax.defences.anp`.

    Reference: ANP's published code (``prune_neuron``); AWM paper, eq. 3.2.
    """
    return multiply(params, Factors(keep, {} if has_norms(params) else keep))


def perturbed_gradient(key: jax.Array, loss: Callable[[jax.Array, Any], jax.Array], point: Any, *,
                       eps: float, alpha: float, project: bool) -> tuple[Any, jax.Array]:
    """The gradient of ``alpha L(p) + (1 - alpha) L(p + d)``, d = one sign step from a random start.

    ``d0 ~ U(-eps, eps)``, ``d = d0 + eps sign(L'(p + d0))``, held fixed in the gradient. The three
    gradients are one scan, so that the network is compiled once.

    Args:
      key: PRNG key of the start and of the losses' own noise (dropout).
      loss: ``(key, point) -> scalar``.
      point: tree of float arrays.
      eps: bound of the perturbation, > 0, in units of the point.
      alpha: weight of the unperturbed loss, in [0, 1].
      project: clip d to [-eps, eps]; otherwise ``|d| <= 2 eps``.

    Returns:
      ``(gradient shaped like point, value)``.

    Example: see `awm_jax.defences.anp`.

    Reference: AWM paper, eq. 3.1, 3.2 and 4.1.
    """
    key_start, key_losses = jax.random.split(key)
    start, shaped = uniform(key_start, point, eps)
    dtype, start = start.dtype, shaped(start)

    def stage(carry, inputs):
        (noise, total, mixed), (key, stay, share) = carry, inputs
        moved = jax.tree.map(jnp.add, point, noise)
        value, gradient = jax.value_and_grad(lambda p: loss(key, p))(moved)
        # What the next stage adds is carried as it is added: a factor to be multiplied in there
        # would be fused into the network, once a pixel, and take as long again.
        noise = jax.tree.map(lambda d, g: d + eps * jnp.sign(g), noise, gradient)
        if project:
            noise = jax.tree.map(lambda d: jnp.clip(d, -eps, eps), noise)
        noise = jax.tree.map(lambda d: stay * d, noise)
        total = jax.tree.map(lambda t, g: t + share * g, total, gradient)
        return (noise, total, mixed + share * value), None

    stages = jnp.asarray([[1, 0], [0, 1 - alpha], [0, alpha]], dtype)
    begin = (start, jax.tree.map(jnp.zeros_like, start), jnp.zeros((), dtype))
    (_, total, mixed), _ = jax.lax.scan(stage, begin, (jax.random.split(key_losses, 3), *stages.T))
    return total, mixed


def uniform(key: jax.Array, tree: Any, eps: float) -> tuple[jax.Array, Callable[[jax.Array], Any]]:
    """Noise in [-eps, eps], flat, for all numbers of a tree, and what shapes it like the tree.

    Example:
      >>> noise, shaped = uniform(jax.random.key(0), {'a': jnp.ones((2, 3)), 'b': None}, .4)
      >>> noise.shape, shaped(noise)['a'].shape
      ((6,), (2, 3))
    """
    flat, shaped = ravel_pytree(tree)
    return jax.random.uniform(key, flat.shape, flat.dtype, -eps, eps), shaped


@dataclasses.dataclass(frozen=True, kw_only=True)
class PruneConfig:
    """Which neurons go, once each has a mask in [0, 1].

    Args:
      prune: ``'threshold'``: masks up to ``threshold``; ``'number'``: the ``number`` smallest;
        ``'held_out'``: as many as accuracy on clean images kept out of mask learning allows.
      threshold: in [0, 1].
      number: neurons, >= 0; of equal masks, those of the layers first in the alphabet go first.
      held_out: share of the images kept out (at least one, rounded down), in (0, 1).
      tolerance: how much accuracy on them may fall, in [0, 1].
      candidates: how many thresholds ``0, 1/k, ..., (k-1)/k`` are tried on them, >= 1.

    Raises:
      ValueError: a value outside its range.
    """

    prune: str = "threshold"
    threshold: float = 0.2
    number: int = 0
    held_out: float = 0.2
    tolerance: float = 0.05
    candidates: int = 20

    def __post_init__(self):
        """Checks every range before any work starts."""
        validate.choice(("threshold", "number", "held_out"), prune=self.prune)
        validate.between(0.0, 1.0, threshold=self.threshold, held_out=self.held_out,
                         tolerance=self.tolerance)
        if self.held_out in (0.0, 1.0):
            raise ValueError(f"Expected held_out={self.held_out} strictly between 0 and 1.")
        validate.whole(0, number=self.number)
        validate.whole(1, candidates=self.candidates)


def hold_out(key: jax.Array, count: int, config: PruneConfig) -> tuple[jax.Array, jax.Array]:
    """Which images masks are learnt from, and which are kept out (none unless asked for).

    Args:
      key: PRNG key of the draw.
      count: images in all, >= 1.
      config: ``prune`` and ``held_out``.

    Returns:
      ``(learnt from, kept out)``, indices.

    Raises:
      ValueError: a single image cannot be shared out.

    Example:
      >>> [len(part) for part in hold_out(jax.random.key(0), 9, PruneConfig(prune='held_out'))]
      [8, 1]
    """
    if config.prune != "held_out":
        return jnp.arange(count), jnp.arange(0)
    if count < 2:
        raise ValueError(f"Expected at least 2 images for prune='held_out', got {count}.")
    order = jax.random.permutation(key, count)
    kept = min(count - 1, max(1, int(config.held_out * count)))
    return order[kept:], order[:kept]


def choose(params: Params, masks: dict[str, jax.Array], images: jax.Array, labels: jax.Array,
           config: PruneConfig) -> tuple[Params, dict[str, Any]]:
    """Prunes the neurons with the lowest masks.

    ``'held_out'`` goes up the thresholds as long as accuracy stays within the tolerance of the
    unpruned network's, and stops there: on a handful of images a ruined network may pass again by
    luck. Where already the first threshold costs more, nothing is pruned.

    Args:
      params: the network to prune.
      masks: ``{layer: [c]}`` in [0, 1].
      images: ``[h, H, W, C]`` the images kept out; unused unless ``prune`` is ``'held_out'``.
      labels: ``[h]`` theirs.
      config: `PruneConfig`.

    Returns:
      ``(pruned, info)``: ``masks``; ``pruned`` scalar count; ``threshold`` scalar, the largest mask
      that still goes, -1 where none shall; and for ``'held_out'`` ``thresholds`` and
      ``accuracies``, each ``[1 + candidates]``, first the unpruned network's at -1.

    Raises:
      ValueError: ``number`` is above the number of neurons.

    Example: see `awm_jax.defences.anp`.
    """
    flat, shaped = ravel_pytree(masks)
    info: dict[str, Any] = {"masks": masks}

    def kept(threshold):
        return (flat > threshold).astype(flat.dtype)

    if config.prune == "number":
        validate.between(0, flat.size, number=config.number)
        order = jnp.argsort(flat)
        keep = jnp.ones_like(flat).at[order[:config.number]].set(0.0)
        threshold = flat[order[config.number - 1]] if config.number else jnp.full((), -1.0)
    elif config.prune == "threshold":
        threshold = jnp.asarray(config.threshold, flat.dtype)
        keep = kept(threshold)
    else:
        grid = jnp.concatenate([-jnp.ones(1), jnp.arange(config.candidates) / config.candidates])
        grid = grid.astype(flat.dtype)

        def accuracy(threshold):
            logits = models.apply(prune(params, shaped(kept(threshold))), images)
            return (logits.argmax(axis=1) == labels).mean()

        accuracies = jax.lax.map(accuracy, grid)
        # A thousandth of an image below the bound, so that rounding does not decide.
        holds = accuracies >= accuracies[0] - config.tolerance - 1e-3 / len(labels)
        threshold = grid[jnp.cumprod(holds).sum() - 1]
        keep = kept(threshold)
        info |= {"thresholds": grid, "accuracies": accuracies}
    info |= {"pruned": (keep == 0).sum(), "threshold": threshold}
    return prune(params, shaped(keep)), info
