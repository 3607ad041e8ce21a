"""Curves and histograms; arrays in, PNG files out."""

import os
from collections.abc import Mapping

import numpy as np

from awm_jax.report.pictures import _save

_BINS = np.linspace(0.0, 1.0, 11)


def history(path: str | os.PathLike, curves: Mapping[str, list[float] | np.ndarray],
            title: str) -> None:
    """Draws curves over epochs (the AWM paper's Figure 4 when they are ACC and ASR).

    Args:
      path: the PNG.
      curves: ``'epoch'`` and any number of named curves of the same length.
      title: shown on top.

    Raises:
      ValueError: no ``'epoch'``, or a curve of another length.
    """
    from matplotlib.figure import Figure

    epochs = curves.get("epoch")
    if epochs is None or any(len(values) != len(epochs) for values in curves.values()):
        raise ValueError(
            "Expected 'epoch' and curves of its length, got "
            + ", ".join(f"{name} ({len(values)})" for name, values in curves.items())
        )
    figure = Figure(figsize=(5, 3.2))
    axis = figure.subplots()
    for name, values in curves.items():
        if name != "epoch":
            axis.plot(epochs, values, label=name.replace("_", " "))
    axis.set_xlabel("epoch")
    axis.set_title(title, fontsize=10)
    axis.grid(alpha=0.3)
    axis.legend()
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
    """
    from matplotlib.figure import Figure

    table = np.stack([mask_percentages(np.ravel(values)) for values in layers.values()])
    figure = Figure(figsize=(7, 0.45 * len(layers) + 1))
    axis = figure.subplots()
    axis.imshow(table, cmap="Blues", vmin=0, vmax=100, aspect="auto")
    for (row, column), value in np.ndenumerate(table):
        axis.text(column, row, f"{value:.1f}", ha="center", va="center", fontsize=7,
                  color="white" if value > 60 else "black")
    axis.set_yticks(range(len(layers)), list(layers), fontsize=8)
    axis.set_xticks(range(10), [f"{low:.1f}" for low in _BINS[:-1]], fontsize=8)
    axis.set_xlabel("mask value from, in steps of 0.1; percentage of a layer's weights")
    _save(figure, path)
