"""The papers' figures as data: what each is drawn from. None of their numbers is printed."""

from typing import NamedTuple

from experiments.cells import ONE, Column, Samples, Table, setting


class Figure(NamedTuple):
    """A figure over the values of a setting, each of which is a column of a table.

    Args:
      table: its purifications; a curve for each of its attacks and each variant. Its columns are
        the values of the first variant, then those of the next.
      name: the setting.
      values: its values, in the order of the columns.
      log: whether the axis is logarithmic.
      variants: of the defence; empty where there is only one.
    """

    table: Table
    name: str
    values: tuple[float, ...]
    log: bool = False
    variants: tuple[str, ...] = ("",)

    def curves(self) -> dict[tuple[str, str], tuple[Column, ...]]:
        """The columns of every curve, by ``(attack, variant)``.

        Example:
          >>> list(FIGURES['awm_fig2_tau'].curves())
          [('trojan_sq', 'paper'), ('trojan_sq', 'ours')]
        """
        count = len(self.values)
        return {(attack, variant): self.table.columns[i * count:(i + 1) * count]
                for attack in self.table.attacks for i, variant in enumerate(self.variants)}


class Record(NamedTuple):
    """A figure of what the first seed's purifications of a table kept beside their scores.

    Args:
      title: what it shows.
      kept: ``'curve'`` (ACC and ASR epoch by epoch) or ``'masks'`` (their distribution).
      table: a key of `experiments.table_cells.TABLES`.
      attacks: some of its rows.
      samples: some of its numbers of images.
      headings: some of its columns.
      joined: one picture of all columns, not one of each.
      note: what a reader must know.
    """

    title: str
    kept: str
    table: str
    attacks: tuple[str, ...]
    samples: tuple[Samples, ...]
    headings: tuple[str, ...]
    joined: bool = False
    note: str = ""


class Measured(NamedTuple):
    """A figure of what a command of its own measures.

    Args:
      title: what it shows.
      command: a module of `experiments`: ``'proportions'`` or ``'thresholds'``.
      arch: the network, of several in the paper one.
      options: of that command, beyond the network, the data directory and ``--out``.
      note: what a reader must know.
      printed: whether there is such a figure in a paper.
    """

    title: str
    command: str
    arch: str
    options: tuple[str, ...]
    note: str = ""
    printed: bool = True


_SINGLE = ("badnets", "trojan_sq", "trojan_wm", "l0_inv", "l2_inv")
# What the defences have anyway: with it a cell is one of a table's, or of another figure's.
# Alpha is not AWM's own alone: where the survey finds more than one small trigger it is another.
_OWN = {"awm_paper": {"alpha": "0.9", "tau": "1000"}, "awm": {"gamma": "1e-8", "tau": "50"},
        "anp": {"alpha": "0.2", "threshold": "0.2"}}


def _columns(defence: str, name: str, values: tuple[str, ...], variant: str = "",
             **others: str) -> tuple[Column, ...]:
    """A column a value, the other settings given or the defence's own."""
    columns = []
    for value in values:
        chosen = {**others, name: value}
        options = setting(**{k: v for k, v in chosen.items() if _OWN[defence].get(k) != v})
        columns.append(Column(f"{name}={value}{variant and f' ({variant})'}", defence, options))
    return tuple(columns)


def _sensitivity(number: int, name: str, values: tuple[str, ...], attacks: tuple[str, ...],
                 log: bool, note: str) -> Figure:
    """A panel of AWM's Figures 2 and 3, by its paper's algorithm and by this project's variant."""
    columns = (*_columns("awm_paper", name, values, gamma="1e-7"),
               *_columns("awm", name, values, "ours"))
    table = Table(f"AWM, Figure {number}: {name}, CIFAR-10, 500 clean images", "cifar10", "",
                  attacks, (500,), columns, {}, {},
                  f"5 runs in the paper, which names neither the network nor the values on the "
                  f"axis: those here are within its range. Other settings stay at alpha .9, gamma "
                  f"1e-7, tau 1000; of this project's variant (ours) at its own, alpha .9 (.8 where"
                  f" it suspects several triggers or a large one), gamma 1e-8, tau 50. {note}",
                  usual="small_vgg")
    return Figure(table, name, tuple(map(float, values)), log, ("paper", "ours"))


_TAUS = ("10", "50", "100", "300", "1000", "3000")
_ALPHAS = ("0.1", "0.2", "0.3", "0.4", "0.5", "0.6", "0.7", "0.8", "0.9")
_ORACLE = ("Every threshold of masks that were learnt once, scored on test and triggered images: "
           "what a defender cannot see, so the best one is an oracle's.")

FIGURES = {
    "awm_fig2_alpha": _sensitivity(
        2, "alpha", ("0.5", "0.6", "0.7", "0.8", "0.9", "0.99"), ("trojan_sq",), False,
        "It prints the range [.5, .8] and discusses values up to 1."),
    "awm_fig2_gamma": _sensitivity(2, "gamma", ("1e-8", "1e-7", "1e-6", "1e-5"), ("trojan_sq",),
                                   True, "Appendix A's default is 1e-8."),
    "awm_fig2_tau": _sensitivity(2, "tau", _TAUS, ("trojan_sq",), True, ""),
    "awm_fig3": _sensitivity(3, "tau", _TAUS, ("trojan_sq", "trojan_wm", "badnets", "l0_inv"),
                             True, "It does not print the number of images: Figure 2's."),
    "anp_fig10": Figure(
        Table("ANP, Figure 10: the trade-off alpha, CIFAR-10, threshold .2", "cifar10", "resnet18",
              ("badnets_checkerboard", "blended", "clb"), (500,),
              _columns("anp", "alpha", _ALPHAS, threshold="0.2"), {}, {},
              "The supplement prints neither the number of images (500 here, as in its Table 8) "
              "nor the values on the axis.", ("acc", "asr")),
        "alpha", tuple(map(float, _ALPHAS))),
}

RECORDS = {
    "awm_fig4": Record(
        "AWM, Figure 4: training records, GTSRB, one-shot", "curve", "awm8", _SINGLE, (ONE,),
        ("AWM", "AWM (ours)"),
        note="The first seed; epoch 0 is the suspect network, scores after it are on 500 of the "
        "test images, every fourth or fifth epoch."),
    "awm_fig5": Record(
        "AWM, Figure 5: distribution of the masks by layer, all-to-all on GTSRB", "masks", "awm8",
        ("trojan_a2a",), (ONE, 100), ("AWM", "AWM (ours)"),
        note="The paper does not print the number of images."),
    "awm_fig6": Record(
        "AWM, Figure 6: the same with masks on one layer only, a row a network", "masks", "awm9",
        ("trojan_a2a",), (100,), tuple(f"VGG-{i}" for i in range(1, 7)), joined=True),
}

MEASURED = {
    "awm_fig1_prune": Measured(
        "AWM, Figure 1(b), right: ANP's threshold, CIFAR-10, 500 clean images", "thresholds",
        "small_vgg", ("--dataset", "cifar10", "--attack", "badnets", "--samples", "500"),
        f"{_ORACLE} The paper compares ResNet-18 with the small VGG: --arch resnet18 --out with "
        "another name that begins with awm_fig1_prune is the other. It prints neither the number "
        "of images nor the values on the axis."),
    "anp_thresholds": Measured(
        "What ANP's threshold decides: GTSRB, one image a class", "thresholds", "small_vgg",
        ("--dataset", "gtsrb", "--attack", "awm"),
        f"{_ORACLE} The networks and the draws of AWM's Table 8, whose ANP takes .2.",
        printed=False),
    "awm_fig1": Measured(
        "AWM, Figure 1(a) and (b), left: what perturbed networks predict", "proportions",
        "resnet18",
        ("--dataset", "cifar10", "--attack", "badnets", "--samples", "one-shot,500,5000"),
        "The VGG of (b): --arch small_vgg --out with another name that begins with awm_fig1. The "
        "right part of (a), ANP by number of images, is the ANP column of awm1r and awm2."),
    "anp_fig8": Measured(
        "ANP, Figures 8 and 9: error rates and predictions of perturbed networks", "proportions",
        "resnet18",
        ("--dataset", "cifar10", "--attack", "badnets_checkerboard,sig", "--samples", "500",
         "--eps", ".1,.2,.3,.4", "--benign"),
        "The paper's network is ResNet-18. Its second benign one, trained on a set with more "
        "images of one class, has no command here. It prints neither the bounds nor the number of "
        "images."),
}
