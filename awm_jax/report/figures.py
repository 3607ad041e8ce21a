"""Curves and histograms; arrays in, PNG files out."""

import os
from collections.abc import Mapping, Sequence

import numpy as np

from awm_jax.report.pictures import _save, lowest

_BINS = np.linspace(0.0, 1.0, 11)
_PANELS = {"clean_loss": "loss", "trigger_loss": "loss", "mask_l1": "mask L1"}
_PERCENT = "%"


def history(path: str | os.PathLike, curves: Mapping[str, list[float] | np.ndarray],
            title: str) -> None:
    """Draws curves over epochs (the AWM paper's Figure 4 when they are ACC and ASR).

    Losses and the mask's L1 norm get panels of their own, since their scales differ.

    Args:
      path: the PNG.
      curves: ``'epoch'`` and at least one named curve of the same length.
      title: shown on top.

    Raises:
      ValueError: no ``'epoch'``, nothing else, or a curve of another length.
    """
    from matplotlib.figure import Figure

    epochs = curves.get("epoch")
    if epochs is None or len(curves) < 2 or any(len(v) != len(epochs) for v in curves.values()):
        raise ValueError(
            "Expected 'epoch' and curves of its length, got "
            + (", ".join(f"{name} ({len(values)})" for name, values in curves.items()) or "nothing")
        )
    panels: dict[str, list[str]] = {}
    for name in curves:
        if name != "epoch":
            panels.setdefault(_PANELS.get(name, _PERCENT), []).append(name)
    figure = Figure(figsize=(4.6 * len(panels) + 0.4, 3.2), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, (label, names) in zip(axes, panels.items(), strict=True):
        for name in names:
            axis.plot(epochs, curves[name], label=name.replace("_", " "))
        axis.set_xlabel("epoch")
        axis.set_ylabel(label)
        axis.grid(alpha=0.3)
        axis.legend()
    figure.suptitle(title, fontsize=10)
    _save(figure, path)


def mask_percentages(values: np.ndarray) -> np.ndarray:
    """Percentage of mask values in each of ten intervals of [0, 1], the last one closed.

    Example:
      >>> mask_percentages(np.array([0.0, 0.05, 0.95, 1.0]))[[0, 9]].tolist()
      [50.0, 50.0]
    """
    counts, _ = np.histogram(values, bins=_BINS)
    return 100.0 * counts / max(len(values), 1)


def mask_histogram(path: str | os.PathLike, layers: Mapping[str, np.ndarray]) -> None:
    """Draws the distribution of mask values, a row a layer (the AWM paper's Figure 5).

    Args:
      path: the PNG.
      layers: layer names to mask values in [0, 1], any shape.

    Raises:
      ValueError: no layers.
    """
    if not layers:
        raise ValueError("Expected the masks of at least one layer, got none.")
    percentages(path, {name: mask_percentages(np.ravel(v)) for name, v in layers.items()})


def percentages(path: str | os.PathLike, rows: Mapping[str, Sequence[float] | np.ndarray]) -> None:
    """Draws distributions over ten intervals of [0, 1], a row each, as `mask_histogram` does.

    Args:
      path: the PNG.
      rows: names to ten percentages in [0, 100], as `mask_percentages` gives them.

    Raises:
      ValueError: no rows, or one without ten numbers.
    """
    from matplotlib.figure import Figure

    if not rows or any(np.shape(row) != (10,) for row in rows.values()):
        raise ValueError("Expected rows of ten percentages, got "
                         + (", ".join(f"{name} {np.shape(row)}" for name, row in rows.items())
                            or "none") + ".")
    table = np.stack([np.asarray(row) for row in rows.values()])
    figure = Figure(figsize=(7, 0.45 * len(rows) + 1))
    axis = figure.subplots()
    axis.imshow(table, cmap="Blues", vmin=0, vmax=100, aspect="auto")
    for (row, column), value in np.ndenumerate(table):
        axis.text(column, row, f"{value:.1f}", ha="center", va="center", fontsize=7,
                  color="white" if value > 60 else "black")
    axis.set_yticks(range(len(rows)), list(rows), fontsize=8)
    axis.set_xticks(range(10), [f"{low:.1f}" for low in _BINS[:-1]], fontsize=8)
    axis.set_xlabel("mask value from, in steps of 0.1; percentage of a layer's weights")
    _save(figure, path)


def curves(path: str | os.PathLike, panels: Mapping[str, Mapping[str, np.ndarray]], label: str,
           title: str, *, log: bool = False) -> None:
    """Draws curves over a setting or over epochs (AWM's Figures 2, 3 and 4, ANP's 8 and 10).

    Args:
      path: the PNG.
      panels: titles of the vertical axes to curves by name: ``[k, 2]``, each row x and y, or
        ``[k, 3]`` with the standard deviation of y, >= 0, which becomes a bar.
      label: of the horizontal axes.
      title: shown on top.
      log: whether these are logarithmic; every x is then > 0.

    Raises:
      ValueError: no curves, or one of another shape.
    """
    from matplotlib.figure import Figure

    drawn = [(panel, name, np.asarray(points)) for panel, lines in panels.items()
             for name, points in lines.items()]
    if not drawn or any(p.ndim != 2 or p.shape[1] not in (2, 3) for _, _, p in drawn):
        raise ValueError("Expected curves of shape [k, 2] or [k, 3], got "
                         + (", ".join(f"{name} {p.shape}" for _, name, p in drawn) or "none") + ".")
    figure = Figure(figsize=(4.6 * len(panels) + 2.0, 3.4), layout="constrained")
    axes = dict(zip(panels, figure.subplots(1, len(panels), squeeze=False)[0], strict=True))
    order = list(dict.fromkeys(name for _, name, _ in drawn))  # of one colour in every panel
    for panel, name, points in drawn:
        spread = points[:, 2] if points.shape[1] == 3 else None
        many = len(points) > 20
        axes[panel].errorbar(points[:, 0], points[:, 1], yerr=spread, label=name, capsize=2,
                             color=f"C{order.index(name) % 10}",
                             marker=None if many else "o", markersize=3, elinewidth=0.8)
    for panel, axis in axes.items():
        if log:
            axis.set_xscale("log")
        axis.set_xlabel(label)
        axis.set_ylabel(panel)
        axis.grid(alpha=0.3)
    # One for all panels, in the order of first appearance, beside them: within it hides points.
    handles = {label: handle for axis in axes.values()
               for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), fontsize=8, loc="outside right center")
    figure.suptitle(title, fontsize=10)
    _save(figure, path)


def proportions(path: str | os.PathLike, panels: Mapping[str, np.ndarray], target: int | None,
                title: str) -> None:
    """Draws the share of the predictions each class gets (AWM's Figure 1, ANP's Figure 9).

    Args:
      path: the PNG.
      panels: names to shares ``[seeds, c]`` in [0, 1]; means are bars, sample standard deviations
        of several seeds lines.
      target: the attacker's class, drawn red; None for all-to-all.
      title: shown on top.

    Raises:
      ValueError: no panels, or shares of another rank.
    """
    from matplotlib.figure import Figure

    if not panels or any(np.ndim(shares) != 2 for shares in panels.values()):
        raise ValueError("Expected shares of shape [seeds, classes], got "
                         + (", ".join(f"{name} {np.shape(s)}" for name, s in panels.items())
                            or "nothing"))
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(4.2 * columns, 2.4 * rows + 0.4), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    for axis, (name, shares) in zip(axes.flat, panels.items(), strict=False):
        percent = 100 * np.asarray(shares)
        classes = np.arange(percent.shape[1])
        spread = percent.std(axis=0, ddof=1) if len(percent) > 1 else None
        axis.bar(classes, percent.mean(axis=0), yerr=spread, width=0.9,
                 color=["tab:red" if c == target else "tab:blue" for c in classes],
                 error_kw={"elinewidth": 0.8})
        axis.set_title(name, fontsize=9)
    for axis in axes[:, 0]:
        axis.set_ylabel("% of predictions")
    for axis in lowest(axes, len(panels)):
        axis.set_xlabel("class" + ("" if target is None else f" (attacker's {target} in red)"))
    figure.suptitle(title, fontsize=10)
    _save(figure, path)
