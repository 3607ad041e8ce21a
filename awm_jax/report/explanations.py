"""Pictures of what happens inside networks: neurons, heat maps, features; arrays in, PNG out."""

import os
from collections.abc import Mapping, Sequence

import numpy as np

from awm_jax.report.pictures import _grid, _save, _show, lowest


def neurons(path: str | os.PathLike, panels: Mapping[str, Mapping[str, np.ndarray]],
            order_by: np.ndarray, title: str) -> None:
    """Draws a value a neuron, the neurons from the least to the largest ``order_by``.

    Args:
      path: the PNG.
      panels: titles to values ``[k]`` by name, each name a series in a colour of its own.
      order_by: ``[k]``, the trigger-activated change of the backdoored network, say.
      title: shown on top.

    Raises:
      ValueError: no values, or another number of them than of ``order_by``.

    Reference: FT-SAM (Zhu et al. 2023), supplement, Figure 1.
    """
    from matplotlib.figure import Figure

    shapes = [np.shape(values) for series in panels.values() for values in series.values()]
    if not shapes or set(shapes) != {np.shape(order_by)}:
        raise ValueError(f"Expected values for {len(order_by)} neurons, got shapes {shapes}.")
    columns = min(4, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(3.6 * columns + 0.4, 2.6 * rows + 0.4), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, sharex=True)
    order = np.argsort(order_by, kind="stable")
    for axis, (name, series) in zip(axes.flat, panels.items(), strict=False):
        for label, values in series.items():
            axis.plot(np.asarray(values)[order], ".", markersize=4, alpha=0.7, label=label)
        axis.set_title(name, fontsize=9)
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
    lowest(axes, len(panels))
    if any(len(series) > 1 for series in panels.values()):
        figure.legend(*axes[0, 0].get_legend_handles_labels(), fontsize=8, markerscale=2,
                      loc="outside right center")
    figure.supxlabel("neurons of the last convolution, by the backdoored network's TAC",
                     fontsize=9)
    figure.suptitle(title, fontsize=10)
    _save(figure, path)


def overlay(image: np.ndarray, heat: np.ndarray) -> np.ndarray:
    """An image in grey under a heat map: blue is 0, red is 1.

    Args:
      image: ``[H, W, C]`` in [0, 1].
      heat: ``[H, W]`` in [0, 1].

    Returns:
      ``[H, W, 3]`` in [0, 1], half of it the image.

    Example:
      >>> found = overlay(np.zeros((1, 2, 3)), np.array([[0., 1.]]))
      >>> bool(found[0, 0].argmax() == 2), bool(found[0, 1].argmax() == 0)
      (True, True)
    """
    from matplotlib import colormaps

    return 0.5 * image.mean(axis=2, keepdims=True) + 0.5 * colormaps["jet"](heat)[..., :3]


def heat_maps(path: str | os.PathLike, images: np.ndarray, maps: Mapping[str, np.ndarray],
              titles: Mapping[str, Sequence[str]]) -> None:
    """Draws images, and below them a row of heat maps a network.

    Args:
      path: the PNG.
      images: ``[B, H, W, C]`` in [0, 1].
      maps: names of networks to ``[B, H, W]`` in [0, 1].
      titles: names of networks, and ``'triggered'`` for the images, to what stands above each of
        the B pictures; a name that is missing has nothing above.

    Raises:
      ValueError: no maps, or some of another number or size than the images.

    Reference: FT-SAM (Zhu et al. 2023), supplement, Figures 2 to 5.
    """
    for name, heat in maps.items():
        if np.shape(heat) != images.shape[:3]:
            raise ValueError(f"Expected heat maps of {name!r} of shape {images.shape[:3]}, got "
                             f"{np.shape(heat)}.")
    if not maps:
        raise ValueError("Expected the heat maps of at least one network, got none.")
    figure, axes = _grid(1 + len(maps), len(images))
    rows = {"triggered": list(images)}
    for name, heat in maps.items():
        rows[name] = [overlay(image, one) for image, one
                      in zip(images, np.asarray(heat), strict=True)]
    for line, (name, shown) in zip(axes, rows.items(), strict=True):
        line[0].set_ylabel(name, fontsize=9)
        for axis, picture, text in zip(line, shown, titles.get(name, [""] * len(images)),
                                       strict=True):
            _show(axis, picture)
            axis.set_title(text, fontsize=8, pad=3)
    _save(figure, path)


def scatter(path: str | os.PathLike, panels: Mapping[str, np.ndarray], labels: np.ndarray,
            triggered: np.ndarray, names: Sequence[str], title: str) -> None:
    """Draws features in two dimensions, each class in a colour, triggered images in black.

    Args:
      path: the PNG.
      panels: names of networks to points ``[n, 2]``.
      labels: ``[n]`` integers, the true classes.
      triggered: ``[n]`` bool, which points are images with the trigger.
      names: of the classes; those of over 12 classes are not written out.
      title: shown on top.

    Raises:
      ValueError: no panels, or another number of points than of labels.

    Reference: FT-SAM (Zhu et al. 2023), supplement, Figure 6.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    if not panels or any(np.shape(points) != (len(labels), 2) for points in panels.values()):
        raise ValueError(f"Expected points of shape ({len(labels)}, 2), got "
                         + (", ".join(f"{name} {np.shape(p)}" for name, p in panels.items())
                            or "none") + ".")
    figure = Figure(figsize=(4.2 * len(panels) + 1.2, 4.2), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    colours = colormaps["tab20" if len(names) > 10 else "tab10"]
    for axis, (name, points) in zip(axes, panels.items(), strict=True):
        for label, text in enumerate(names):
            own = points[(labels == label) & ~triggered]
            axis.plot(own[:, 0], own[:, 1], ".", markersize=4, color=colours(label % colours.N),
                      label=text)
        own = points[triggered]
        axis.plot(own[:, 0], own[:, 1], "x", markersize=3, color="black", label="triggered")
        axis.set_title(name, fontsize=9)
        axis.set_xticks([])
        axis.set_yticks([])
    handles, texts = axes[-1].get_legend_handles_labels()
    shown = slice(None) if len(names) <= 12 else slice(-1, None)
    axes[-1].legend(handles[shown], texts[shown], fontsize=8, markerscale=2,
                    loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.suptitle(title, fontsize=10)
    _save(figure, path)
