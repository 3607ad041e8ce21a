"""Which normalisation a network was trained with, told by how well it then does."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from awm_jax import models
from awm_jax.types import Batch, Params

_NONE = ((0.0,) * 3, (1.0,) * 3)
# Means and scales that published training code uses, for images in [0, 1].
KNOWN: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "none": _NONE,
    "half": ((0.5,) * 3, (0.5,) * 3),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar10_kuangliu": ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "gtsrb": ((0.3403, 0.3121, 0.3214), (0.2724, 0.2608, 0.2669)),
    "tiny_imagenet": ((0.4802, 0.4481, 0.3975), (0.2302, 0.2265, 0.2262)),
    "mnist": ((0.1307,) * 3, (0.3081,) * 3),
    "0_255": ((0.0,) * 3, (1 / 255,) * 3),
}


class Told(NamedTuple):
    """A choice, and what speaks for it.

    Args:
      name: a key of `KNOWN`.
      accuracy: of each candidate on the given images, in [0, 1], in the order of `KNOWN`.
    """

    name: str
    accuracy: dict[str, float]

    @property
    def note(self) -> str:
        """A line to say aloud: the choice, and the others' accuracies."""
        others = ", ".join(f"{name} {100 * value:.0f}%" for name, value in self.accuracy.items()
                           if name != self.name)
        return (f"normalisation {self.name!r}, with which {100 * self.accuracy[self.name]:.0f}% of "
                f"the images are given their class ({others})")


@jax.jit
def _try(params: Params, images: jax.Array, labels: jax.Array, mean: jax.Array,
         std: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Accuracy and mean log-probability of the labels under each normalisation."""
    def one(moments):
        mean, std = (v[None, None, None] for v in moments)
        scores = jax.nn.log_softmax(models.apply(params, (images - mean) / std))
        own = jnp.take_along_axis(scores, labels[:, None], axis=1)[:, 0]
        return (scores.argmax(axis=1) == labels).mean(), own.mean()

    return jax.lax.map(one, (mean, std))


def tell(params: Params, batch: Batch) -> Told:
    """The candidate under which most of the images get their class, the likeliest where several do.

    Args:
      params: the network, its own ``arch.mean`` and ``arch.std`` being those of `KNOWN`'s 'none'.
      batch: clean images in [0, 1] and labels.

    Returns:
      `Told`. It may be wrong where several do well, which the note lets everybody see; name it
      then.

    Example: `with_known(params, tell(params, batch).name)`.
    """
    mean, std = (jnp.asarray([pair[i] for pair in KNOWN.values()]) for i in (0, 1))
    accuracy, likelihood = map(np.asarray, _try(
        params, jnp.asarray(batch.images, jnp.float32), jnp.asarray(batch.labels, jnp.int32), mean,
        std))
    order = sorted(range(len(KNOWN)), key=lambda i: (-accuracy[i], -likelihood[i]))
    names = list(KNOWN)
    return Told(names[order[0]], dict(zip(names, map(float, accuracy), strict=True)))


def with_known(params: Params, name: str) -> Params:
    """The network with a candidate's normalisation as its own.

    Args:
      params: the network.
      name: a key of `KNOWN`.

    Returns:
      Its copy, with `Arch.mean` and `Arch.std` set.

    Example:
      >>> from awm_jax.types import Arch
      >>> params = models.create(jax.random.key(0), Arch(name='mlp', num_classes=10))
      >>> with_known(params, 'half').arch.mean
      (0.5, 0.5, 0.5)
    """
    mean, std = KNOWN[name]
    return dataclasses.replace(params, arch=dataclasses.replace(params.arch, mean=mean, std=std))
