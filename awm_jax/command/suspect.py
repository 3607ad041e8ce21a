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
_USUAL_SIZES = ((32, 32), (64, 64))  # that networks of any size are mostly trained on
_PHOTO = 128  # pixels a side: larger images are likelier photos than what a network was trained on
_TOO_LARGE = 256  # and beyond this a try would take minutes, and gigabytes: it must be asked for


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

    @property
    def sane(self) -> bool:
        """Whether the network gives most images their class, and not all of several the same."""
        alike = len(set(self.answers().tolist())) == 1
        several = len(set(np.asarray(self.batch.labels).tolist())) > 1
        return self.correct() > _SANE * len(self.batch.labels) and not (alike and several)


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


def _open_sizes(params: Params, source: formats.Source, listing: given.Listing,
                asked: tuple[int, int] | None) -> tuple[tuple[tuple[int, int], ...], ...]:
    """Image sizes to try where nothing tells the network's, in groups, the likeliest group first.

    Images of a common size come first, photos' own last. No groups where something tells it.
    """
    if asked is not None or source.kind == "orbax" or formats.fixed_size(params.arch.name):
        return ()
    own = _own_size(listing)
    usual = tuple(size for size in _USUAL_SIZES if size != own)
    if own is None or max(own) > _TOO_LARGE:
        return (usual,)
    return ((own,), usual) if max(own) <= _PHOTO else (usual, (own,))


def _fitted(params: Params, source: formats.Source, listing: given.Listing,
            normalise: str | None) -> Suspect:
    """A network, its image size as it is, with the images and what is told of its normalisation."""
    notes, arch = [*source.notes], params.arch
    plain = not any(arch.mean) and all(s == 1.0 for s in arch.std)
    if normalise is not None:
        params = normalisation.with_known(params, normalise)
    found = given.read(listing, num_classes=arch.num_classes, size=arch.image_shape[:2],
                       channels=arch.image_shape[2])
    batch = Batch(jnp.asarray(found.images, jnp.float32) / 255.0, jnp.asarray(found.labels))
    if normalise is not None:
        notes.append(f"normalisation {normalise!r}, as given")
    elif plain:
        told = normalisation.tell(params, batch)
        params = normalisation.with_known(params, told.name)
        notes.append(told.note)
    return Suspect(params, source, batch, found.note, tuple(notes))


def _in_size(suspect: Suspect, how: str) -> Suspect:
    """The same, with the image size and how it is known among its notes."""
    height, width, _ = suspect.params.arch.image_shape
    notes = tuple(f"image size {height}x{width}, {how}" if note.startswith("image size") else note
                  for note in suspect.notes)
    return dataclasses.replace(suspect, notes=notes)


def _sized(params: Params, source: formats.Source, listing: given.Listing,
           groups: tuple[tuple[tuple[int, int], ...], ...], normalise: str | None) -> Suspect:
    """A network that takes any size, in the one at which it gives most images their class.

    Later groups are tried only where no size before them is sane.
    """
    def fitted(size):
        arch = dataclasses.replace(params.arch, image_shape=(*size, params.arch.image_shape[2]))
        models.check(arch)
        return _fitted(dataclasses.replace(params, arch=arch), source, listing, normalise)

    tried: list[tuple[int, Suspect]] = []
    for group in groups:
        tried += [(found.correct(), found) for found in map(fitted, group)]
        best = max(tried, key=lambda each: each[0])[1]
        if best.sane:
            break
    else:
        best = tried[0][1]
    counts = ", ".join("{}x{} {}".format(*found.params.arch.image_shape[:2], right)
                       for right, found in tried)
    return _in_size(best, "the given images' own" if len(tried) == 1 else
                    f"told by how many images get their class ({counts})")


def read(args: argparse.Namespace) -> Suspect:
    """Everything that can be wrong with a model and images, before any work starts.

    Args:
      args: of the parser in `awm_jax.command`.

    Returns:
      `Suspect`; what it is was printed.

    Raises:
      OSError: files that cannot be read.
      ValueError: a network or images of another kind than can be taken; unless ``args.force``,
        images of one class, or a network that gets most of them wrong.
    """
    if args.arch is not None:
        validate.choice(models.MODELS, arch=args.arch)
    listing = given.find(args.images)
    params, source = formats.read(args.model, arch=args.arch, image_size=args.image_size)
    groups = _open_sizes(params, source, listing, args.image_size)
    suspect = (_sized(params, source, listing, groups, args.normalise) if groups else
               _fitted(params, source, listing, args.normalise))
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
    if len(set(labels.tolist())) == 1 and not force:
        raise ValueError(f"Expected images of two classes or more, better one of each, got class "
                         f"{labels[0]} alone: what moves every class cannot be told from them. "
                         "Give others, or go on with --force.")
    if not suspect.sane and not force:
        alike = len(set(answers.tolist())) == 1 and len(set(labels.tolist())) > 1
        shape = suspect.params.arch.image_shape
        size = ("" if formats.fixed_size(suspect.params.arch.name) else
                f" and sized (--image_size, {shape[0]}x{shape[1]} here)")
        raise ValueError(
            f"Expected a network that gives most of the given images their class, it gives "
            f"{correct} of {count}{f', all the same class {answers[0]}' if alike else ''}. Check "
            "the labels' numbers, the order of colours, how images were cropped, normalised "
            f"(--normalise){size} in training, or go on with --force.")
