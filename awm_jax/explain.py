"""What a backdoor does inside a network: trigger-activated change, gradient norms, Grad-CAM.

For analysis only: TAC and the pictures look at triggered images, which no defence sees, and no
defence imports this module.
"""

import functools

import jax
import jax.numpy as jnp
from flax import linen as nn

from awm_jax import losses, models
from awm_jax.types import Arch, Params, Weights


def last_convolution(arch: Arch) -> str:
    """The convolution that a network applies last; its output channels are the neurons here.

    Args:
      arch: the network's architecture.

    Returns:
      Its slash-joined name, such as ``'layer4_1/conv2'``.

    Raises:
      ValueError: a network without a convolution.

    Example:
      >>> last_convolution(Arch(name='small_vgg', num_classes=10))
      'conv6'

    Reference: FT-SAM (Zhu et al. 2023), supplement, section F.
    """
    seen: list[str] = []

    def watch(call, args, kwargs, context):
        if isinstance(context.module, nn.Conv) and context.method_name == "__call__":
            seen.append("/".join(context.module.path))
        return call(*args, **kwargs)

    with nn.intercept_methods(watch):
        jax.eval_shape(lambda key: models.create(key, arch), jax.random.key(0))
    if not seen:
        raise ValueError(f"Expected a network with convolutions, {arch.name} has none. Choose "
                         "another (--arch).")
    return seen[-1]


def neurons(params: Params, images: jax.Array) -> jax.Array:
    """What the last convolution puts out, before any normalisation or activation after it.

    Args:
      params: the network.
      images: ``[B, H, W, C]`` float32 in [0, 1].

    Returns:
      ``[B, h, w, k]``, a channel a neuron.

    Raises:
      ValueError: a network without a convolution.

    Example:
      >>> params = models.create(jax.random.key(0), Arch(name='small_vgg', num_classes=10))
      >>> neurons(params, jnp.zeros((2, 32, 32, 3))).shape
      (2, 8, 8, 128)
    """
    layer, seen = last_convolution(params.arch), []

    def watch(call, args, kwargs, context):
        out = call(*args, **kwargs)
        if "/".join(context.module.path) == layer and context.method_name == "__call__":
            seen.append(out)
        return out

    with nn.intercept_methods(watch):
        models.apply(params, images)
    return seen[-1]


def tac(clean: jax.Array, triggered: jax.Array) -> jax.Array:
    """``TAC_k = mean_i ||z_k(x_i) - z_k(x_i + trigger)||_2``, the trigger-activated change.

    Args:
      clean: ``[B, h, w, k]``, `neurons` of clean images.
      triggered: the same of the same images with the trigger.

    Returns:
      ``[k]``, >= 0, a value a neuron: large where the trigger acts.

    Raises:
      ValueError: the shapes differ.

    Example:
      >>> tac(jnp.zeros((1, 1, 2, 2)), jnp.array([[[[3., 0.], [4., 0.]]]])).tolist()
      [5.0, 0.0]

    Reference: Zheng et al., ECCV 2022, "Data-free Backdoor Removal based on Channel Lipschitzness";
    FT-SAM (Zhu et al. 2023), supplement, Figure 1.
    """
    if clean.shape != triggered.shape:
        raise ValueError(f"Expected what one layer puts out for the same images, got "
                         f"{clean.shape} and {triggered.shape}.")
    return jnp.sqrt(((clean - triggered) ** 2).sum(axis=(1, 2))).mean(axis=0)


def neuron_norms(weights: Weights, layer: str) -> jax.Array:
    """``n_k = ||W_k||_2`` over the part of a layer's kernel that makes neuron k.

    Args:
      weights: a tree shaped like a network's weights: these, or the gradient with respect to them.
      layer: slash-joined name of a convolution or dense layer in it.

    Returns:
      ``[k]``, >= 0.

    Example:
      >>> neuron_norms({'a': {'kernel': jnp.array([[3., 1.], [4., 0.]])}}, 'a').tolist()
      [5.0, 1.0]
    """
    kernel = functools.reduce(lambda tree, name: tree[name], layer.split("/"), weights)["kernel"]
    return jnp.sqrt((kernel**2).sum(axis=tuple(range(kernel.ndim - 1))))


def gradient_norms(params: Params, images: jax.Array, labels: jax.Array) -> jax.Array:
    """``||dL/dW_k||_2`` of each neuron k of the last convolution, BatchNorm statistics frozen.

    Args:
      params: the network.
      images: ``[B, H, W, C]`` float32 in [0, 1].
      labels: ``[B]`` integers in 0..c-1; L is the mean cross-entropy.

    Returns:
      ``[k]``, >= 0.

    Raises:
      ValueError: a network without a convolution.

    Example:
      >>> params = models.create(jax.random.key(0), Arch(name='small_vgg', num_classes=10))
      >>> gradient_norms(params, jnp.zeros((2, 32, 32, 3)), jnp.array([0, 1])).shape
      (128,)

    Reference: FT-SAM (Zhu et al. 2023), supplement, Figure 1, without its perturbation.
    """
    layer = last_convolution(params.arch)

    def loss(weights):
        moved = Params(weights, params.batch_stats, params.arch)
        return losses.cross_entropy(models.apply(moved, images), labels)

    return neuron_norms(jax.grad(loss)(params.weights), layer)


def last_map(arch: Arch) -> str:
    """The last block of a network that still has a height or a width, where `grad_cam` looks.

    Args:
      arch: the network's architecture.

    Returns:
      Its name, such as ``'block4'``.

    Raises:
      ValueError: no block of more than one pixel whose gradient can be taken.

    Example:
      >>> last_map(Arch(name='cnn', num_classes=10))
      'block2'
    """
    params = jax.eval_shape(lambda key: models.create(key, arch), jax.random.key(0))
    shapes = _shapes(params, jax.ShapeDtypeStruct((1, *arch.image_shape), jnp.float32))
    names = [name for name in models.movable(arch) if max(shapes[name].shape[1:3]) > 1]
    if not names:
        raise ValueError(f"Expected a network with a block of more than one pixel that is "
                         f"perturbed, {arch.name} has none. Choose another (--arch); in a module "
                         "of your own call x = self.perturb('block1', x) beside self.sow.")
    return names[-1]


def _shapes(params: Params, images: jax.Array | jax.ShapeDtypeStruct
            ) -> dict[str, jax.ShapeDtypeStruct]:
    """What the blocks of a network put out, without computing it."""
    return jax.eval_shape(models.activations, params, images)[1]


def heat_maps(maps: jax.Array, gradients: jax.Array, size: tuple[int, ...]) -> jax.Array:
    """``ReLU(sum_k a_k A_k)`` with ``a_k = mean_ij dy/dA_kij``, enlarged, its largest value 1.

    Args:
      maps: ``[B, h, w, k]``, the feature maps A.
      gradients: of the same shape, those of the scores y with respect to them.
      size: height and width of the images.

    Returns:
      ``[B, height, width]`` in [0, 1]; zero where no weighted sum is above zero.

    Example:
      >>> maps = jnp.array([[[[1., 0.], [0., 2.]]]])
      >>> heat_maps(maps, jnp.array([[[[1., -1.], [1., -1.]]]]), (1, 2)).tolist()
      [[[1.0, 0.0]]]

    Reference: Selvaraju et al., ICCV 2017, "Grad-CAM", eq. 1 and 2.
    """
    heat = jax.nn.relu((gradients.mean(axis=(1, 2), keepdims=True) * maps).sum(axis=-1))
    heat = jax.image.resize(heat, (len(heat), *size), "linear")
    peak = heat.max(axis=(1, 2), keepdims=True)
    return heat / jnp.where(peak > 0, peak, 1.0)


def grad_cam(params: Params, images: jax.Array, classes: jax.Array | None = None) -> jax.Array:
    """`heat_maps` of the last block with spatial extent, towards a class of each image.

    Args:
      params: the network.
      images: ``[B, H, W, C]`` float32 in [0, 1].
      classes: ``[B]`` integers in 0..c-1, whose logits y are explained; None for the class that
        the network gives each image.

    Returns:
      ``[B, H, W]`` in [0, 1]: 1 where an image speaks most for its class, 0 where nothing does.

    Raises:
      ValueError: as `last_map`.

    Example:
      >>> params = models.create(jax.random.key(0), Arch(name='small_vgg', num_classes=10))
      >>> grad_cam(params, jnp.ones((2, 32, 32, 3))).shape
      (2, 32, 32)

    Reference: Selvaraju et al., ICCV 2017, "Grad-CAM", section 3; FT-SAM (Zhu et al. 2023),
    supplement, Figures 2 to 5.
    """
    name = last_map(params.arch)
    zeros = {block: jnp.zeros(like.shape, like.dtype)
             for block, like in _shapes(params, images).items()}

    def score(offset):
        logits, blocks, _ = models.activations(params, images, offsets={**zeros, name: offset})
        chosen = logits.argmax(axis=1) if classes is None else classes
        # Images do not touch each other: the gradient of the sum is each one's own.
        return jnp.take_along_axis(logits, chosen[:, None], axis=1).sum(), blocks[name]

    gradients, maps = jax.grad(score, has_aux=True)(zeros[name])
    return heat_maps(maps, gradients, images.shape[1:3])
