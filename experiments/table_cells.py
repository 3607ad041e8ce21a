"""The papers' tables as data: the purifications each is made of, and what the paper has there.

The figures are those of the AWM paper (NeurIPS 2022), ACC and ASR in percent; its ASR counts all
test images, ours beside them is ASR(all).
"""

from collections.abc import Iterator
from typing import NamedTuple

Samples = str | int
Scores = tuple[float, float]


class Column(NamedTuple):
    """A defence as a table has it.

    Args:
      heading: over its column.
      defence: a key of `awm_jax.defences.DEFENCES`.
      options: of `experiments.oneshot`, beyond those of the table.
    """

    heading: str
    defence: str
    options: tuple[str, ...] = ()


class Table(NamedTuple):
    """A table of a paper.

    Args:
      title: what it shows.
      dataset: a ``--dataset``.
      arch: an ``--arch``.
      attacks: its rows, ``--attack`` names.
      samples: how many clean images, each a block of rows: 'one-shot' or a number.
      columns: its columns.
      before: the paper's ``(ACC, ASR)`` of the suspect network, by attack.
      paper: the paper's ``(ACC, ASR)``, by ``(attack, samples, heading)``.
      note: what a reader must know about the comparison.
    """

    title: str
    dataset: str
    arch: str
    attacks: tuple[str, ...]
    samples: tuple[Samples, ...]
    columns: tuple[Column, ...]
    before: dict[str, Scores]
    paper: dict[tuple[str, Samples, str], Scores]
    note: str = ""


class Cell(NamedTuple):
    """One purification of a table.

    Args:
      table: its name in `TABLES`.
      attack: what the network carries.
      samples: clean images.
      column: the defence.
      seed: which draw.
    """

    table: str
    attack: str
    samples: Samples
    column: Column
    seed: int


_ONE = "one-shot"
_OURS = Column("AWM (ours)", "awm")
_MAIN = (Column("ANP", "anp"), Column("IBAU", "ibau"), Column("AWM", "awm_paper"), _OURS)
_SINGLE = ("badnets", "trojan_sq", "trojan_wm", "l0_inv", "l2_inv")


def _figures(attacks: tuple[str, ...], samples: tuple[Samples, ...], headings: tuple[str, ...],
             rows: str) -> dict[tuple[str, Samples, str], Scores]:
    """A paper's figures: a line an attack and number of images, ``ACC ASR`` a column."""
    keys = [(attack, n) for attack in attacks for n in samples]
    found = {}
    for (attack, n), line in zip(keys, rows.split("\n"), strict=True):
        numbers = [float(v) for v in line.split()]
        pairs = zip(numbers[::2], numbers[1::2], strict=True)
        for heading, pair in zip(headings, pairs, strict=True):
            found[attack, n, heading] = pair
    return found


_TABLE_1 = _figures(_SINGLE, (5000, 500, 200, 100, 50), ("ANP", "IBAU", "AWM"), """\
77.34 8.64 81.06 12.25 83.58 13.98
73.17 13.76 77.30 13.52 78.20 11.93
64.59 13.35 75.88 14.75 76.42 12.82
51.19 15.86 75.53 33.62 75.69 10.64
49.81 17.66 68.72 45.23 73.20 12.22
67.70 8.68 82.38 14.20 83.82 12.76
63.21 35.77 76.42 11.53 79.40 10.08
63.84 36.31 73.81 10.69 75.50 14.40
40.23 7.14 74.32 55.68 74.49 12.08
40.06 6.41 73.20 84.32 72.23 5.01
58.14 31.70 83.03 8.26 82.78 13.64
55.64 9.76 82.89 7.33 82.61 12.15
52.58 8.45 80.27 10.36 81.96 17.88
42.95 21.20 81.02 30.25 81.56 12.82
46.84 6.15 78.33 35.06 79.97 8.88
66.90 10.21 82.90 12.68 82.26 12.88
67.70 30.20 80.42 10.11 75.01 20.54
69.47 73.10 76.26 95.50 76.20 33.74
60.31 59.14 67.40 93.56 62.31 24.58
54.95 58.08 59.13 78.20 60.73 45.36
70.70 7.58 81.51 6.23 82.74 12.94
74.80 0.44 78.09 7.64 81.33 4.39
66.38 0.92 73.28 6.42 80.36 6.39
53.07 1.12 72.91 18.86 81.67 7.55
47.87 0.15 75.41 30.27 80.36 9.93""")

_TABLE_2 = _figures(_SINGLE, (_ONE,), ("ANP", "IBAU", "AWM"), """\
60.35 32.83 60.18 97.33 76.46 8.98
68.32 13.88 45.38 96.27 78.26 10.68
50.42 35.50 57.76 99.93 74.28 8.66
63.42 22.46 69.26 95.81 69.94 10.18
67.08 76.16 63.48 89.42 76.60 10.64""")

_TABLE_4 = _figures(("l2_inv",), (500, 100, _ONE), ("ANP", "ANP+SWM", "ANP+SWM+ATR", "AWM"), """\
74.80 0.44 76.35 3.17 82.08 5.81 81.33 4.39
66.38 0.92 75.63 7.89 79.42 6.46 80.36 6.39
47.08 30.15 70.82 19.17 78.34 14.73 80.32 12.52""")

_ABLATIONS = (Column("No Clip", "awm_no_clip"), Column("No Shrink", "awm_no_shrink"),
              Column("NC-NS", "awm_nc_ns"), Column("L2 Reg", "awm_l2_reg"),
              Column("L2 Reg NC", "awm_l2_reg_nc"), Column("AWM", "awm_paper"))
_TABLE_5 = _figures(_SINGLE, (200, _ONE), tuple(c.heading for c in _ABLATIONS), """\
82.86 19.36 84.52 10.31 82.33 15.78 81.46 13.29 83.72 11.64 84.26 10.90
66.03 16.28 66.32 9.97 65.32 9.77 72.71 8.98 73.96 14.38 76.46 8.98
79.21 20.58 83.06 9.20 78.41 26.93 83.60 8.81 83.49 30.13 85.38 9.41
62.14 20.68 76.62 12.83 68.17 26.14 75.21 8.06 72.50 13.74 78.26 10.68
84.82 32.16 84.33 9.96 84.40 37.81 83.93 14.63 83.55 7.56 84.88 11.10
55.32 12.28 73.50 9.26 73.62 59.52 71.32 8.48 73.39 10.61 74.28 8.66
80.17 46.85 83.34 16.52 77.84 36.37 83.04 18.52 81.27 29.61 82.83 17.79
61.68 37.38 70.69 21.36 70.22 24.87 72.42 14.73 68.94 31.53 69.94 10.18
81.76 17.28 84.66 10.43 81.80 12.39 85.30 9.48 83.45 21.54 85.16 11.44
72.71 16.15 75.57 14.86 71.52 29.84 76.96 12.35 72.06 20.87 76.60 10.64""")

_GTSRB = (*_SINGLE, "trojan_a2a")
_TABLE_8 = _figures(_GTSRB, (5000, 500, 100, _ONE), ("ANP", "IBAU", "AWM"), """\
98.06 5.17 99.06 0.37 97.32 4.35
97.35 6.35 97.02 0.32 98.90 4.31
96.41 6.84 92.41 59.74 94.58 6.58
95.78 16.53 90.84 83.57 95.48 4.54
97.90 7.11 99.17 6.66 99.03 6.03
97.49 11.49 96.82 5.92 98.17 7.05
96.94 32.50 84.09 88.57 95.89 6.30
97.21 37.09 83.76 91.02 93.96 6.25
98.03 7.20 99.02 0.53 99.25 5.70
97.35 6.98 97.80 4.35 98.52 5.93
97.13 19.65 90.37 15.84 94.38 5.06
97.45 25.49 88.65 30.52 93.74 5.99
98.07 0.48 99.27 0.46 98.73 0.35
98.24 0.49 96.80 1.36 97.57 1.25
97.72 0.38 84.24 7.14 94.05 0.96
97.51 0.43 80.71 10.63 94.56 0.73
97.79 6.74 99.13 0.54 98.98 1.81
97.74 6.53 94.83 0.56 97.88 1.59
97.21 0.46 88.45 7.03 96.36 6.17
97.21 0.74 87.42 6.89 96.09 2.37
97.34 3.53 98.95 0.74 98.68 1.47
95.70 3.03 96.45 10.74 98.02 4.45
94.34 13.27 90.69 41.61 95.15 5.38
95.76 24.99 75.24 31.72 93.02 7.18""")

_LAYERS = tuple(Column(f"VGG-{i}", "awm_paper", ("--set", f"layers=('conv{i}',)"))
                for i in range(1, 7))
_TABLE_9 = _figures(("trojan_a2a",), (100,), ("VGG", *(c.heading for c in _LAYERS)), """\
95.15 5.38 93.75 3.34 96.27 7.25 96.54 9.60 96.98 23.71 97.65 47.83 97.37 60.19""")

_VGG_BEFORE = {"badnets": (85.98, 97.96), "trojan_sq": (85.86, 99.36),
               "trojan_wm": (86.08, 99.80), "l0_inv": (86.56, 100.0), "l2_inv": (86.22, 99.84)}
_RESNET_BEFORE = {"badnets": (87.83, 97.90), "trojan_sq": (88.27, 99.61),
                  "trojan_wm": (88.00, 99.96), "l0_inv": (88.23, 100.0), "l2_inv": (88.51, 99.86)}
_GTSRB_BEFORE = {"badnets": (98.11, 98.37), "trojan_sq": (98.18, 99.55),
                 "trojan_wm": (97.90, 99.82), "l0_inv": (98.35, 100.0), "l2_inv": (98.31, 99.80),
                 "trojan_a2a": (98.15, 93.17)}
_OTHER_NETWORK = ("The paper's figures are of ResNet-18, ours of the small VGG: what they share is "
                  "the success test, not the accuracy.")

TABLES = {
    "awm8": Table("AWM, Table 8 (small VGG): GTSRB, by number of clean images", "gtsrb",
                  "small_vgg", _GTSRB, (_ONE, 100, 500, 5000), _MAIN, _GTSRB_BEFORE, _TABLE_8),
    "awm9": Table("AWM, Table 9: masks on one layer only", "gtsrb", "small_vgg", ("trojan_a2a",),
                  (100,), (Column("VGG", "awm_paper"), *_LAYERS),
                  {"trojan_a2a": _GTSRB_BEFORE["trojan_a2a"]}, _TABLE_9,
                  "The paper's text says CIFAR-10 for this table, but its first row is Table 8's "
                  "all-to-all on GTSRB with 100 images, figure for figure: so GTSRB here."),
    "awm2": Table("AWM, Table 2: CIFAR-10, one-shot", "cifar10", "small_vgg", _SINGLE, (_ONE,),
                  _MAIN, _RESNET_BEFORE, _TABLE_2, _OTHER_NETWORK),
    "awm1": Table("AWM, Table 1 (small VGG): CIFAR-10, by number of clean images", "cifar10",
                  "small_vgg", _SINGLE, (50, 100, 200, 500, 5000), _MAIN, _VGG_BEFORE, _TABLE_1),
    "awm4": Table("AWM, Table 4 (small VGG): from ANP to AWM", "cifar10", "small_vgg", ("l2_inv",),
                  (_ONE, 100, 500), (Column("ANP", "anp"), Column("ANP+SWM", "swm"),
                                     Column("ANP+SWM+ATR", "swm_atr"), Column("AWM", "awm_paper")),
                  {"l2_inv": _VGG_BEFORE["l2_inv"]}, _TABLE_4,
                  "With 100 images the paper repeats Table 1's figures for 200."),
    "awm5": Table("AWM, Table 5: ablations", "cifar10", "small_vgg", _SINGLE, (_ONE, 200),
                  _ABLATIONS, _RESNET_BEFORE, _TABLE_5, _OTHER_NETWORK),
    "awm10": Table("AWM, Table 10: several triggers in one network", "cifar10", "small_vgg",
                   ("multi",), (_ONE, 500), (Column("AWM", "awm_paper"), _OURS),
                   {"multi": (84.86, 99.83)},
                   {("multi", _ONE, "AWM"): (71.83, 8.47), ("multi", 500, "AWM"): (77.02, 10.38)},
                   "The paper's network is a ShuffleNet. Its ASR here counts an image that any of "
                   "the three triggers leads astray."),
}


def cells(names: tuple[str, ...], seeds: int) -> Iterator[Cell]:
    """Every purification of some tables, the first seed of all before the second of any.

    Args:
      names: keys of `TABLES`.
      seeds: draws a cell, >= 1.

    Example:
      >>> next(cells(("awm8",), 1))[:3]
      ('awm8', 'badnets', 'one-shot')
    """
    for seed in range(seeds):
        for name in names:
            table = TABLES[name]
            for samples in table.samples:
                for attack in table.attacks:
                    for column in table.columns:
                        yield Cell(name, attack, samples, column, seed)
