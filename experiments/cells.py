"""What the papers' tables are declared with: columns, tables, and the purifications in them."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

from awm_jax.data import num_classes

Samples = str | int
Scores = tuple[float, ...]
ONE = "one-shot"


class Column(NamedTuple):
    """A defence as a table has it.

    Args:
      heading: over its column.
      defence: a key of `awm_jax.defences.DEFENCES`; empty if it is not available here.
      options: of `experiments.oneshot`, beyond those of the table.
      lacking: why it is not available here; empty if it is.
      samples: the table's numbers of clean images that it is run with; empty for all.
    """

    heading: str
    defence: str
    options: tuple[str, ...] = ()
    lacking: str = ""
    samples: tuple[Samples, ...] = ()


class Table(NamedTuple):
    """A table of a paper.

    Args:
      title: what it shows.
      dataset: a ``--dataset``.
      arch: the paper's network, an ``--arch``; empty where it names none.
      attacks: its rows, ``--attack`` names.
      samples: how many clean images, each a block of rows: 'one-shot' or a number.
      columns: its columns.
      before: the paper's ``(ACC, ASR)`` of the suspect network, by attack.
      paper: the paper's figures, one for each of ``measures``, by ``(attack, samples, heading)``.
      note: what a reader must know about the comparison.
      measures: which of ours stand beside the paper's: ``'acc'``, then ``'asr_all'`` or ``'asr'``
        (with or without the images of the attacker's class), then perhaps ``'der'``.
      usual: what it is run with unless told otherwise, an ``--arch``; empty for the paper's.
      networks: options of `experiments.oneshot` that say how an attack's network is trained, by
        attack.
    """

    title: str
    dataset: str
    arch: str
    attacks: tuple[str, ...]
    samples: tuple[Samples, ...]
    columns: tuple[Column, ...]
    before: Mapping[str, Scores]
    paper: Mapping[tuple[str, Samples, str], Scores]
    note: str = ""
    measures: tuple[str, ...] = ("acc", "asr_all")
    usual: str = ""
    networks: Mapping[str, tuple[str, ...]] = MappingProxyType({})

    @property
    def classes(self) -> int:
        """How many classes its data set has."""
        # Of an archive laid out like Tiny ImageNet the name does not tell; the papers' has 200.
        return 200 if self.dataset == "tiny_imagenet" else num_classes(self.dataset)

    def network(self, arch: str | None = None) -> str:
        """The network that it is run with: the one asked for, or its usual one.

        Args:
          arch: an ``--arch``, ``'paper'`` for the paper's, None for the usual one.

        Returns:
          An ``--arch``.
        """
        if arch is None or (arch == "paper" and not self.arch):
            return self.usual or self.arch
        return self.arch if arch == "paper" else arch


class Cell(NamedTuple):
    """One purification of a table.

    Args:
      table: its name in `experiments.table_cells.PLANS`.
      attack: what the network carries.
      samples: clean images.
      column: the defence.
      seed: which draw.
      dataset: a ``--dataset``.
      arch: an ``--arch``.
      network: options that say how the network is trained.
    """

    table: str
    attack: str
    samples: Samples
    column: Column
    seed: int
    dataset: str
    arch: str
    network: tuple[str, ...] = ()

    @property
    def options(self) -> tuple[str, ...]:
        """What `experiments.oneshot` is told beyond what every cell has."""
        return (*self.network, *self.column.options)


def setting(**values: object) -> tuple[str, ...]:
    """Settings of a defence as options of `experiments.oneshot`.

    Example:
      >>> setting(lr='.02', threshold=.4)
      ('--set', 'lr=.02', '--set', 'threshold=0.4')
    """
    return tuple(part for name, value in values.items() for part in ("--set", f"{name}={value}"))


def scores(attacks: tuple[str, ...], samples: tuple[Samples, ...], headings: tuple[str, ...],
           text: str, each: int = 2) -> dict[tuple[str, Samples, str], Scores]:
    """A paper's figures, read from a text: attack by attack, of each one number of images by one.

    Args:
      attacks: rows of the table.
      samples: numbers of images, rows within those.
      headings: the columns.
      text: ``each`` numbers a column, '-' where the paper has none; lines may break anywhere.
      each: numbers a column.

    Returns:
      By ``(attack, samples, heading)``; places with '-' are left out.

    Raises:
      ValueError: more or fewer numbers than places.

    Example:
      >>> scores(('badnets',), (50,), ('ANP', 'AWM'), '49.81 17.66 73.20 12.22')[
      ...     'badnets', 50, 'AWM']
      (73.2, 12.22)
    """
    places = [(attack, n, heading) for attack in attacks for n in samples for heading in headings]
    parts = text.split()
    if len(parts) != each * len(places):
        raise ValueError(f"Expected {each} numbers for each of {len(places)} places, got "
                         f"{len(parts)} numbers.")
    groups = (parts[i:i + each] for i in range(0, len(parts), each))
    return {place: tuple(float(v) for v in group)
            for place, group in zip(places, groups, strict=True) if "-" not in group}
