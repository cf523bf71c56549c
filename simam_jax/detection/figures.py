"""Figures of detectors beside the ground truth and beside one another, drawn with matplotlib."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from simam_jax.detection.evaluation import Evaluated

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from PIL import Image

PANEL = 640  # pixels: the longer side of an image in a figure
_DPI = 160
_TITLES: dict[str, str] = {"bbox": "boxes", "segm": "masks"}


class Panel(NamedTuple):
    """A picture in a figure with a line above it."""

    text: str
    picture: "Image.Image"


def examples_figure(columns: Sequence[str], rows: Sequence[Sequence[Panel]], note: str) -> "Figure":
    """The figure of images, a row each: the ground truth and what detectors find.

    Args:
        columns: titles.
        rows: a panel for each column, pictures of one size.
        note: stands below.
    """
    from matplotlib.figure import Figure

    side, gap, text_height, head, foot = PANEL / _DPI, 0.08, 0.25, 0.35, 0.35  # inches
    heights = [row[0].picture.height / _DPI for row in rows]
    width = len(columns) * (side + gap) + gap
    height = head + foot + sum(heights) + len(rows) * text_height
    figure = Figure(figsize=(width, height))
    for j, column in enumerate(columns):
        x = gap + j * (side + gap) + side / 2
        figure.text(x / width, 1 - 0.1 / height, column, ha="center", va="top", fontsize=11, parse_math=False)
    bottom = height - head
    for row, tall in zip(rows, heights, strict=True):
        bottom -= tall + text_height
        for j, panel in enumerate(row):
            wide = panel.picture.width / _DPI
            left = gap + j * (side + gap) + (side - wide) / 2
            axes = figure.add_axes((left / width, bottom / height, wide / width, tall / height))
            axes.imshow(panel.picture)
            axes.set_axis_off()
            x, y = (left + wide / 2) / width, (bottom + tall + 0.05) / height
            figure.text(x, y, panel.text, ha="center", va="bottom", fontsize=8, parse_math=False)
    figure.text(0.5, 0.1 / height, note, ha="center", va="bottom", fontsize=8)
    return figure


def scores_figure(scores: Mapping[str, Mapping[str, Evaluated]], class_names: Sequence[str]) -> "Figure":
    """The figure of precision over recall and of every class's AP, a row for boxes and one for masks.

    Args:
        scores: by kind ("bbox", "segm") and by the detector's title.
        class_names: of the ground truth.
    """
    from matplotlib.figure import Figure

    detectors = len(next(iter(scores.values())))
    tall = max(4.0, 1.2 + len(class_names) * (0.08 + 0.07 * detectors))
    figure = Figure(figsize=(11, len(scores) * tall), layout="constrained")
    grid = figure.subplots(len(scores), 2, squeeze=False)
    for (curves, bars), (kind, of_kind) in zip(grid, scores.items(), strict=True):
        _draw_curves(curves, kind, of_kind)
        _draw_classes(bars, kind, of_kind, class_names)
    return figure


def _draw_curves(axes: "Axes", kind: str, scores: Mapping[str, Evaluated]) -> None:
    """Precision over recall, a colour for each detector."""
    from matplotlib.lines import Line2D

    handles = []
    for i, (title, evaluated) in enumerate(scores.items()):
        curves = _mean_over_classes(evaluated.precision)
        for threshold, line in ((0, "-"), (5, "--")):
            axes.plot(np.linspace(0, 1, curves.shape[1]), curves[threshold], line, color=f"C{i}")
        ap, ap50, ap75 = map(_percent, evaluated.stats[:3])
        handles.append(Line2D([], [], color=f"C{i}", linewidth=3, label=f"{title}: AP {ap}, AP50 {ap50}, AP75 {ap75}"))
    styles = {"IoU 0.50": "-", "IoU 0.75": "--"}
    handles += [Line2D([], [], color="0.3", ls=line, label=label) for label, line in styles.items()]
    axes.set(xlabel="recall", ylabel="precision", xlim=(0, 1), ylim=(0, 1.02))
    axes.set_title(f"{_TITLES[kind]}: mean over classes", fontsize=10)
    axes.set_box_aspect(0.75)  # beside many classes too
    axes.set_anchor("N")
    axes.grid(color="0.9")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(handles=handles, edgecolor="none", fontsize=8, loc="best")


def _draw_classes(axes: "Axes", kind: str, scores: Mapping[str, Evaluated], class_names: Sequence[str]) -> None:
    """A bar for each class and detector, the classes by the first detector's AP."""
    values = [np.array(evaluated.per_class()) for evaluated in scores.values()]
    order = np.argsort(np.nan_to_num(values[0], nan=-1), kind="stable")
    places, thick = np.arange(len(order)), 0.8 / len(values)
    for i, of_classes in enumerate(values):
        y = places + 0.4 - (i + 0.5) * thick
        axes.barh(y, 100 * np.nan_to_num(of_classes[order]), thick, color=f"C{i}")
    for place, k in enumerate(order.tolist()):
        if math.isnan(values[0][k]):
            axes.text(0.5, place, "n/a: no ground truth", va="center", fontsize=7)
    axes.set_yticks(places, [str(class_names[k]) for k in order.tolist()], fontsize=8, parse_math=False)
    axes.set(xlabel="AP (%)", xlim=(0, 100), ylim=(-0.6, len(order) - 0.4))
    axes.set_title(f"{_TITLES[kind]}: each class", fontsize=10)
    axes.grid(axis="x", color="0.9")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _mean_over_classes(precision: np.ndarray) -> np.ndarray:
    """(IoU thresholds, recalls): of objects of all sizes; not a number where no class has ground truth."""
    of_classes = precision[:, :, :, 0, -1]
    real = of_classes > -1
    with np.errstate(invalid="ignore"):
        return np.where(real, of_classes, 0).sum(-1) / real.sum(-1)


def _percent(value: float) -> str:
    return "n/a" if math.isnan(value) else f"{100 * value:.1f}"
