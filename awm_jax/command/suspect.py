"""A network of somebody else with the images it is judged by: read, made to fit, said aloud."""

import argparse
import dataclasses
import pathlib

import jax.numpy as jnp
import numpy as np

from awm_jax import formats, metrics, models, validate
from awm_jax.command import normalisation
from awm_jax.data import folder, given
from awm_jax.types import Batch, Params

_SANE = 0.5  # of the given images: no more than that, and network or labels are not as was meant


@dataclasses.dataclass(frozen=True)
class Suspect:
    """A network and clean images that fit it.

    Args:
      params: the network, its normalisation within.
      source: where it came from, as `awm_jax.formats.write` takes it.
      batch: the images in [0, 1] and their labels.
      images_note: how their labels were told.
      notes: what was told about the network and how, a line each.
    """

    params: Params
    source: formats.Source
    batch: Batch
    images_note: str
    notes: tuple[str, ...]

    def answers(self, params: Params | None = None) -> np.ndarray:
        """The class that a network, by default itself, gives each image."""
        return np.asarray(metrics.predict(params or self.params, self.batch.images))

    def correct(self, params: Params | None = None) -> int:
        """How many of the given images a network gives their class."""
        return int((self.answers(params) == np.asarray(self.batch.labels)).sum())


def say(line: str) -> None:
    """One line, at once."""
    print(line, flush=True)


def _own_size(listing: given.Listing) -> tuple[int, int] | None:
    """The size that all images have, if networks take such; else None."""
    sizes = given.sizes(listing)
    if len(sizes) != 1:
        return None
    size = next(iter(sizes))
    return size if all(folder.SIDES[0] <= side <= folder.SIDES[1] for side in size) else None


def _sized(params: Params, listing: given.Listing, size: tuple[int, int] | None
           ) -> tuple[Params, str | None]:
    """A network that takes any size with the images' own, and a word on it."""
    if size is not None or formats.fixed_size(params.arch.name):
        return params, None
    own = _own_size(listing)
    if own is None or own == params.arch.image_shape[:2]:
        return params, None
    arch = dataclasses.replace(params.arch, image_shape=(*own, params.arch.image_shape[2]))
    models.check(arch)
    return (dataclasses.replace(params, arch=arch),
            f"image size {own[0]}x{own[1]}, the given images' own")


def read(args: argparse.Namespace) -> Suspect:
    """Everything that can be wrong with a model and images, before any work starts.

    Args:
      args: of the parser in `awm_jax.command`.

    Returns:
      `Suspect`; what it is was printed.

    Raises:
      OSError: files that cannot be read.
      ValueError: a network or images of another kind than can be taken, or a network that gets
        most of the images wrong, unless ``args.force``.
    """
    if args.arch is not None:
        validate.choice(models.MODELS, arch=args.arch)
    listing = given.find(args.images)
    params, source = formats.read(args.model, arch=args.arch, image_size=args.image_size)
    params, note = _sized(params, listing, args.image_size)
    notes = [*(n for n in source.notes if note is None or not n.startswith("image size")),
             *([] if note is None else [note])]
    plain = not any(params.arch.mean) and all(s == 1.0 for s in params.arch.std)
    if args.normalise is not None:
        params = normalisation.with_known(params, args.normalise)
    found = given.read(listing, num_classes=params.arch.num_classes,
                       size=params.arch.image_shape[:2], channels=params.arch.image_shape[2])
    batch = Batch(jnp.asarray(found.images, jnp.float32) / 255.0, jnp.asarray(found.labels))
    if args.normalise is not None:
        notes.append(f"normalisation {args.normalise!r}, as given")
    elif plain:
        told = normalisation.tell(params, batch)
        params = normalisation.with_known(params, told.name)
        notes.append(told.note)
    suspect = Suspect(params, source, batch, found.note, tuple(notes))
    _say_what(args.model, suspect)
    _check_sane(suspect, args.force)
    return suspect


def _say_what(path: pathlib.Path, suspect: Suspect) -> None:
    """The network, the images, and how both were told."""
    arch = suspect.params.arch
    say(f"{path}: {suspect.source.kind}, {arch.name}, {arch.num_classes} classes, images of "
        f"{arch.image_shape[0]}x{arch.image_shape[1]}")
    for note in (*suspect.notes, suspect.images_note):
        say(f"  {note}")


def _check_sane(suspect: Suspect, force: bool) -> None:
    """ValueError where a network gets most of its images wrong, which is then no use to judge."""
    labels, answers = np.asarray(suspect.batch.labels), suspect.answers()
    count, correct = len(labels), int((answers == labels).sum())
    say(f"  it gives {correct} of {count} images their class")
    alike = len(set(answers.tolist())) == 1 and len(set(labels.tolist())) > 1
    if (correct <= _SANE * count or alike) and not force:
        shape = suspect.params.arch.image_shape
        size = ("" if formats.fixed_size(suspect.params.arch.name) else
                f" and sized (--image_size, {shape[0]}x{shape[1]} here)")
        raise ValueError(
            f"Expected a network that gives most of the given images their class, it gives "
            f"{correct} of {count}{f', all the same class {answers[0]}' if alike else ''}. Check "
            "the labels' numbers, the order of colours, how images were cropped, normalised "
            f"(--normalise){size} in training, or go on with --force.")
