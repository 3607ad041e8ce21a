"""Pictures of triggers; arrays in, PNG files out."""

import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from awm_jax import whole_files


def _save(figure: Any, path: str | os.PathLike) -> None:
    """Writes under a temporary name and renames."""
    with whole_files.writing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110, bbox_inches="tight")


def lowest(axes: np.ndarray, count: int) -> list[Any]:
    """Of a grid of which ``count`` axes are used, row by row: hides the others.

    Args:
      axes: ``[rows, columns]`` of matplotlib.
      count: how many are used, >= 1.

    Returns:
      The lowest used axis of every column, given the tick labels that a hidden one had.

    Example: `lowest(figure.subplots(2, 3, sharex=True), 4)`.
    """
    columns = axes.shape[1]
    for axis in axes.flat[count:]:
        axis.set_axis_off()
    found = [axes[(count - 1 - column) // columns, column] for column in range(min(columns, count))]
    for axis in found:
        axis.tick_params(labelbottom=True)
    return found


def _grid(rows: int, columns: int, width: float = 1.6) -> tuple[Any, np.ndarray]:
    """A figure without a window, and its axes without ticks."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(columns * width, rows * width + 0.3))
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat:
        axis.set_xticks([])
        axis.set_yticks([])
    return figure, axes


def _show(axis: Any, picture: np.ndarray) -> None:
    """A picture in [0, 1], in colour or in grey."""
    axis.imshow(np.clip(picture, 0, 1), cmap="gray", vmin=0, vmax=1)


def amplified(difference: np.ndarray) -> np.ndarray:
    """A signed difference as a picture: grey is none, the largest is black or white.

    Example:
      >>> amplified(np.array([[[0.0], [0.1]]])).ravel().tolist()
      [0.5, 1.0]
    """
    peak = np.abs(difference).max()
    return 0.5 + difference / (2 * peak) if peak > 0 else np.full_like(difference, 0.5)


def trigger_sheet(path: str | os.PathLike, triggers: Mapping[str, Any], image: np.ndarray) -> None:
    """Draws triggers side by side: the amplified pattern, and what it makes of one image.

    Args:
      path: the PNG.
      triggers: names to records with ``pattern [H, W, C]`` and ``mask [H, W, 1]``
        (`awm_jax.attacks.Trigger`).
      image: ``[H, W, C]`` in [0, 1].

    Raises:
      ValueError: no triggers, or one of another size than the image.
    """
    image = np.asarray(image)
    if not triggers:
        raise ValueError("Expected at least one trigger, got none.")
    figure, axes = _grid(3, len(triggers))
    for column, (name, trigger) in enumerate(triggers.items()):
        pattern, mask = np.asarray(trigger.pattern), np.asarray(trigger.mask)
        if pattern.shape != image.shape:
            raise ValueError(
                f"Expected trigger {name!r} of shape {image.shape}, got {pattern.shape}.")
        triggered = np.clip(image * (1 - mask) + pattern, 0, 1)
        change = amplified(triggered - image)
        for row, picture in enumerate((amplified(pattern), triggered, change)):
            _show(axes[row, column], picture)
        norm = np.sqrt((pattern**2).sum())
        axes[0, column].set_title(f"{name}\nL2 {norm:.2f}", fontsize=8)
    for row, label in enumerate(("pattern", "triggered", "difference")):
        axes[row, 0].set_ylabel(label)
    _save(figure, path)


def pairs(path: str | os.PathLike, images: np.ndarray, triggered: np.ndarray) -> None:
    """Draws clean images, the same with the trigger, and the amplified difference.

    Args:
      path: the PNG.
      images: ``[B, H, W, C]`` in [0, 1].
      triggered: the same shape.

    Raises:
      ValueError: the shapes differ.
    """
    if images.shape != triggered.shape:
        raise ValueError(f"Expected equal shapes, got {images.shape} and {triggered.shape}.")
    figure, axes = _grid(3, len(images))
    for column, (clean, dirty) in enumerate(zip(images, triggered, strict=True)):
        for row, picture in enumerate((clean, dirty, amplified(dirty - clean))):
            _show(axes[row, column], picture)
    for row, label in enumerate(("clean", "triggered", "difference")):
        axes[row, 0].set_ylabel(label)
    _save(figure, path)


def gallery(path: str | os.PathLike, images: np.ndarray,
            triggered: Mapping[str, np.ndarray]) -> None:
    """Draws attacks one below the other: of each image clean, triggered, amplified difference.

    Args:
      path: the PNG.
      images: ``[B, H, W, C]`` in [0, 1].
      triggered: names of attacks to images of the same shape.

    Raises:
      ValueError: no attacks, or one whose images have another shape.
    """
    if not triggered:
        raise ValueError("Expected at least one attack, got none.")
    for name, dirty in triggered.items():
        if np.shape(dirty) != images.shape:
            raise ValueError(
                f"Expected images of {name!r} of shape {images.shape}, got {np.shape(dirty)}.")
    figure, axes = _grid(len(triggered), 3 * len(images), width=1.1)
    for row, (name, dirty) in enumerate(triggered.items()):
        for i, clean in enumerate(images):
            for j, picture in enumerate((clean, dirty[i], amplified(dirty[i] - clean))):
                _show(axes[row, 3 * i + j], picture)
        axes[row, 0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize=8)
    for column in range(3 * len(images)):
        title = ("clean", "triggered", "difference")[column % 3]
        axes[0, column].set_title(title, fontsize=8)
    _save(figure, path)


def recovered_trigger(path: str | os.PathLike, recovered: np.ndarray,
                      true_pattern: np.ndarray | None = None) -> None:
    """Draws the trigger a defence found, beside the true one where it is known.

    Args:
      path: the PNG.
      recovered: ``[H, W, C]`` signed.
      true_pattern: ``[H, W, C]`` signed, or None.
    """
    shown = [("recovered", recovered)]
    if true_pattern is not None:
        shown.append(("true", true_pattern))
    figure, axes = _grid(1, len(shown), 2.6)
    for axis, (label, pattern) in zip(axes.flat, shown, strict=True):
        _show(axis, amplified(np.asarray(pattern)))
        axis.set_title(f"{label}, L1 {np.abs(pattern).sum():.0f}", fontsize=9)
    _save(figure, path)
