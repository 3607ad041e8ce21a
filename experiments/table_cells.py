"""What there is to run for the papers' tables and figures: every table, every purification."""

from collections.abc import Iterator

from experiments import figure_cells, tables_anp, tables_awm, tables_ft_sam, tables_own
from experiments.cells import Cell, Column, Samples, Scores, Table

__all__ = ["OWN", "PLANS", "TABLES", "USUAL", "Cell", "Column", "Samples", "Scores", "Table",
           "cells", "name"]

TABLES = {**tables_awm.TABLES, **tables_anp.TABLES, **tables_ft_sam.TABLES}

OWN = tables_own.TABLES

# Figures whose points are purifications are run like tables.
PLANS = {**TABLES, **{name: figure.table for name, figure in figure_cells.FIGURES.items()},
         **OWN}

# What is run unless told otherwise: all of the papers that the small VGG does, which 2 cores can.
USUAL = tuple(name for name, table in PLANS.items()
              if table.network() == "small_vgg" and name not in OWN)


def cells(names: tuple[str, ...], seeds: int, arch: str | None = None) -> Iterator[Cell]:
    """Every purification of some tables, the first seed of all before the second of any.

    What is not available here is left out.

    Args:
      names: keys of `PLANS`.
      seeds: draws a cell, >= 1.
      arch: the network, as `Table.network` takes it.

    Example:
      >>> next(cells(("awm8",), 1))[:3]
      ('awm8', 'badnets', 'one-shot')
    """
    for seed in range(seeds):
        for name in names:
            table = PLANS[name]
            for samples in table.samples:
                for attack in table.attacks:
                    for column in table.columns:
                        if not column.lacking and samples in (column.samples or (samples,)):
                            yield Cell(name, attack, samples, column, seed, table.dataset,
                                       table.network(arch), table.networks.get(attack, ()))


def name(cell: Cell) -> str:
    """A cell's key in figures.json: what it is, whichever table it stands in.

    Args:
      cell: of `cells`.

    Example:
      >>> name(next(cells(("awm8",), 1)))
      'gtsrb/small_vgg/badnets/one-shot/anp/0'
    """
    return "/".join(map(str, (cell.dataset, cell.arch, cell.attack, cell.samples,
                              cell.column.defence, *cell.options, cell.seed)))
