"""Which normalisation a network was trained with, told by how well it then does."""

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from awm_jax import models
from awm_jax.types import Batch, Params

_RIVAL = 0.05  # of the probability, above which another candidate is named too
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
      probability: of each, as `tell` has it; they sum to 1.
    """

    name: str
    accuracy: dict[str, float]
    probability: dict[str, float]

    @property
    def note(self) -> str:
        """A line to say aloud: the choice, how sure it is, and the others' accuracies."""
        others = ", ".join(f"{name} {100 * value:.0f}%" for name, value in self.accuracy.items()
                           if name != self.name)
        rivals = [name for name in sorted(self.probability, key=lambda n: -self.probability[n])
                  if name != self.name and self.probability[name] > _RIVAL]
        unsure = (f"; {' or '.join(rivals)} is as well possible: if you know it, say so with "
                  "--normalise" if rivals else "")
        return (f"normalisation {self.name!r}, with which {100 * self.accuracy[self.name]:.0f}% of "
                f"the images are given their class ({others}){unsure}")


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
    """The candidate under which the images' classes are likeliest, as the network's softmax has it.

    ``p(k) ~ p_0(k) prod_i softmax(f((x_i - mean_k) / std_k))[y_i]``, with p_0 a half for 'none' and
    a half shared by the others. Accuracy alone tells less: of ten images candidates differ by one
    or two by chance (docs/suspect.md has what either costs).

    Args:
      params: the network, its own ``arch.mean`` and ``arch.std`` being those of `KNOWN`'s 'none'.
      batch: clean images in [0, 1] and labels.

    Returns:
      `Told`. It may be wrong where several are about as likely, which the note says; name it then.

    Example: `with_known(params, tell(params, batch).name)`.
    """
    channels = params.arch.image_shape[2]
    mean, std = (jnp.asarray([_for_channels(pair[i], channels) for pair in KNOWN.values()])
                 for i in (0, 1))
    accuracy, likelihood = map(np.asarray, _try(
        params, jnp.asarray(batch.images, jnp.float32), jnp.asarray(batch.labels, jnp.int32), mean,
        std))
    odds = len(batch.labels) * np.nan_to_num(likelihood.astype(np.float64), nan=-np.inf)
    odds += np.where(np.array(list(KNOWN)) == "none", np.log(len(KNOWN) - 1), 0.0)
    probability = np.exp(odds - odds.max()) if np.isfinite(odds.max()) else np.ones(len(KNOWN))
    probability /= probability.sum()
    found = [dict(zip(KNOWN, map(float, values), strict=True))
             for values in (accuracy, probability)]
    return Told(max(found[1], key=lambda name: found[1][name]), *found)


def moments(text: str, channels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """What ``--normalise`` asks for: a key of `KNOWN`, or means and scales.

    Args:
      text: a name; or ``'MEAN/STD'``, each one number or as many as there are channels, with
        commas between.
      channels: of the network's images; of one, a name's numbers are averaged.

    Returns:
      ``(mean, std)``, a number a channel each.

    Raises:
      ValueError: neither; says what there is.

    Example:
      >>> moments('.5,.4,.3/.2', 3)
      ((0.5, 0.4, 0.3), (0.2, 0.2, 0.2))
    """
    if text in KNOWN:
        mean, std = KNOWN[text]
        return _for_channels(mean, channels), _for_channels(std, channels)
    try:
        found = [tuple(map(float, part.split(","))) for part in text.split("/")]
    except ValueError:
        found = []
    if (len(found) != 2 or any(len(v) not in (1, channels) for v in found)
            or not all(map(math.isfinite, (*found[0], *found[1]))) or min(found[1]) <= 0):
        raise ValueError("Expected --normalise to be MEAN/STD, such as .5,.5,.5/.2,.2,.2 (a number "
                         f"for each of the {channels} channels or one for all, STD above 0), or "
                         f"one of: {listed()}.")
    return tuple(v * channels if len(v) == 1 else v for v in found)  # type: ignore[return-value]


def _for_channels(values: tuple[float, ...], channels: int) -> tuple[float, ...]:
    """A colour's three numbers for images of so many channels: their mean for grey ones."""
    return values if channels == len(values) else (sum(values) / len(values),) * channels


def listed() -> str:
    """The candidates and their numbers, in one line."""
    def numbers(values):
        return ", ".join(f"{value:.4g}" for value in values)

    return "; ".join(f"{name} (mean {numbers(mean)}, std {numbers(std)})"
                     for name, (mean, std) in KNOWN.items())


def with_known(params: Params, name: str) -> Params:
    """The network with a normalisation as its own.

    Args:
      params: the network.
      name: as `moments` takes it.

    Returns:
      Its copy, with `Arch.mean` and `Arch.std` set.

    Example:
      >>> from awm_jax.types import Arch
      >>> params = models.create(jax.random.key(0), Arch(name='mlp', num_classes=10))
      >>> with_known(params, 'half').arch.mean
      (0.5, 0.5, 0.5)
    """
    mean, std = moments(name, params.arch.image_shape[2])
    return dataclasses.replace(params, arch=dataclasses.replace(params.arch, mean=mean, std=std))
