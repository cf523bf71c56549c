"""Figures of what `explain` and `simam_jax.curves` give, drawn with matplotlib and written as PNG or SVG."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from simam_jax import errors
from simam_jax.paths import local

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from PIL import Image

ENDINGS = (".png", ".svg")
TITLES = {"simam": "SimAM", "none": "no attention", "se": "SE", "cbam": "CBAM"}
COLOURS = "inferno"  # perceptually uniform: equal steps of a value are equal steps for the eye

# What curves show, and by their names the line and the words of each.
_ERROR = "top-1 error (%)", {"train": ("--", "training"), "eval": ("-", "validation")}
_AP = "AP (%)", {"bbox_AP": ("-", "boxes"), "segm_AP": ("--", "masks")}
_COLUMNS = 10  # panels side by side, at most


def overlay(pixels: np.ndarray, heat: np.ndarray) -> "Image.Image":
    """An image with a heat map over it, in colours from the map's lowest value (dark) to its highest (bright).

    Args:
        pixels: uint8 (S, S, 3).
        heat: floating (H, W), of any range, resized with a bicubic filter.

    Returns:
        An RGB image of S x S pixels.

    Raises:
        UserError: other shapes or dtypes.
    """
    import matplotlib
    from PIL import Image

    pixels, heat = np.asarray(pixels), np.asarray(heat, np.float32)
    if pixels.ndim != 3 or pixels.shape[-1] != 3 or pixels.dtype != np.uint8 or heat.ndim != 2:
        raise errors.UserError(
            f"overlay takes pixels uint8 (S, S, 3) and heat (H, W), got {pixels.dtype} {pixels.shape} and {heat.shape}."
        )
    height, width = pixels.shape[:2]
    span = np.ptp(heat)
    scaled = (heat - heat.min()) / (span if span > 0 else 1)
    smooth = np.asarray(Image.fromarray(scaled).resize((width, height), Image.Resampling.BICUBIC)).clip(0, 1)
    colours = 255 * matplotlib.colormaps[COLOURS](smooth)[..., :3]
    grey = np.asarray(Image.fromarray(pixels).convert("L"))[..., None]  # so that every colour is the map's
    return Image.fromarray((0.6 * colours + 0.4 * grey).round().astype(np.uint8))


def attention_figure(
    pixels: Sequence[np.ndarray] | np.ndarray,
    weights: Mapping[str, Sequence[np.ndarray] | np.ndarray | jax.Array],
    layer: str | None = None,
    channels: int = 6,
    names: Sequence[str] = (),
) -> "Figure":
    """The figure of SimAM's weights over images: the mean over the channels of every layer, or one layer's channels.

    Args:
        pixels: N images uint8 (H, W, 3), what the network saw.
        weights: of `attention_weights`, of the same images; N maps (h, w, C) of each layer.
        layer: the layer that is shown channel by channel; None: all layers.
        channels: how many channels of `layer` are shown: those whose weights vary most over the image.
        names: of the images.

    Raises:
        UserError: `weights` is empty, has no such layer, or `channels` is negative.
    """
    if not weights:
        raise errors.UserError("This network has no SimAM in it: there are no weights to show.")
    if layer is not None and layer not in weights:
        raise errors.unknown("layer", layer, weights)
    if channels < 0:
        raise errors.UserError(f"channels must be 0 or more, got {channels}.")

    def panel(title: str, image: np.ndarray, heat: np.ndarray) -> tuple[str, Any]:
        return f"{title}\n{heat.min():.2f} to {heat.max():.2f}", overlay(image, heat)

    rows = []
    for i, image in enumerate(map(_enlarged, pixels)):
        row: list[tuple[str, Any]] = [(names[i] if names else "", image)]
        if layer is None:
            row += [panel(name, image, _float(w[i]).mean(-1)) for name, w in weights.items()]
        else:
            maps = _float(weights[layer][i])
            row.append(panel("mean", image, maps.mean(-1)))
            most = np.argsort(-maps.std((0, 1)), kind="stable")[:channels]
            row += [panel(f"channel {c}", image, maps[..., c]) for c in most]
        rows.append(row)
    what = "in every layer, averaged over the channels" if layer is None else f"in {layer}"
    return _grid(f"SimAM's weights {what}", rows, "weight, within each panel's range")


def grad_cam_figure(
    pixels: np.ndarray, heats: Mapping[str, np.ndarray], captions: Mapping[str, Sequence[str]], names: Sequence[str]
) -> "Figure":
    """The figure of one or more networks' Grad-CAM side by side (Fig. 1 and 4 of the paper).

    A panel of a map without positive evidence says so.

    Args:
        pixels: uint8 (N, S, S, 3), what the networks saw.
        heats: by the network's title, (N, H, W) in 0..1, of `grad_cam`.
        captions: by the same titles, what to say of each image, such as the class and its probability.
        names: of the images.
    """
    rows = []
    for i, image in enumerate(map(_enlarged, pixels)):
        row: list[tuple[str, Any]] = [(names[i], image)]
        row += [
            (_grad_cam_label(title, captions[title][i], heat[i]), overlay(image, heat[i]))
            for title, heat in heats.items()
        ]
        rows.append(row)
    return _grid("Grad-CAM", rows, "evidence for the class named above a panel, within that panel's range", side=2.2)


def _grad_cam_label(title: str, caption: str, heat: np.ndarray) -> str:
    return f"{title}\n{caption}" + ("" if heat.max() > 0 else "\nno positive evidence")


def curves_figure(runs: Mapping[str, Mapping[str, np.ndarray]]) -> "Figure":
    """The figure of top-1 error over epochs, training dashed, validation solid, or of AP, masks dashed, boxes solid.

    Args:
        runs: by their names in the legend, of `simam_jax.curves.read_curves`.

    Raises:
        UserError: they are classifiers' and detectors' runs.
    """
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    kinds = {"bbox_AP" in curves for curves in runs.values()}
    if len(kinds) > 1:
        raise errors.UserError("Some of these runs are classifiers', others detectors': draw them in two pictures.")
    quantity, styles = _AP if kinds == {True} else _ERROR
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.add_subplot()
    drawn = [part for part in styles if kinds == {False} or any(part in curves for curves in runs.values())]
    handles = [Line2D([], [], color="0.3", ls=styles[part][0], label=styles[part][1]) for part in drawn]
    for i, (name, curves) in enumerate(runs.items()):
        ends = []
        for part in drawn:
            if part in curves and len(curve := curves[part]):
                few = len(curve) <= 20
                style: dict[str, Any] = {
                    "color": f"C{i}",
                    "marker": "o" if few else "",
                    "markersize": 3,
                    "clip_on": False,
                }
                axes.plot(*curve.T, styles[part][0], **style)
                ends += [f"{curve[-1, 1]:.2f} %"] if part != "train" else []
        last = f" (ends at {', '.join(ends)})" if ends else ""
        handles.append(Line2D([], [], color=f"C{i}", linewidth=3, label=name + last))
    axes.set(xlabel="epoch", ylabel=quantity, ylim=(0, None))
    axes.set_xlim(left=0)
    axes.grid(color="0.9")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(handles=handles, edgecolor="none")
    return figure


def render(figure: "Figure") -> np.ndarray:
    """The figure as uint8 (H, W, 3)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def save(figure: "Figure", path: str | Path) -> None:
    """Writes the figure as PNG or SVG, by the path's ending. An older file stays until the new one is complete.

    Raises:
        UserError: another ending, or the path cannot be written.
    """
    path = check_ending(path)
    partial = path.with_name(f"{path.stem}.part{path.suffix}")
    try:
        figure.savefig(partial, dpi=160)
        os.replace(partial, path)
    except OSError as error:
        raise errors.UserError(f"{path} cannot be written: {error}.") from error
    finally:
        partial.unlink(missing_ok=True)


def check_ending(path: str | Path) -> Path:
    """The path.

    Raises:
        UserError: its ending is not in `ENDINGS`.
    """
    path = local(path)
    if path.suffix.lower() not in ENDINGS:
        raise errors.unknown("ending", path.suffix, ENDINGS)
    return path


def _float(x: np.ndarray | jax.Array) -> np.ndarray:
    return np.asarray(x, np.float32)


def _enlarged(image: np.ndarray) -> np.ndarray:
    """A small image with every pixel repeated as a square, because a map over it is to look smooth."""
    factor = max(1, 224 // len(image))
    return image.repeat(factor, 0).repeat(factor, 1)


def _grid(title: str, rows: Sequence[Sequence[tuple[str, Any]]], scale: str, side: float = 1.4) -> "Figure":
    """A figure of panels (text, image) of `side` inches, one line or more for each row, and a colour bar below.

    The panels are placed by hand because matplotlib's layout engines take seconds for so many.
    """
    from matplotlib.cm import ScalarMappable
    from matplotlib.figure import Figure

    lines = -(-len(rows[0]) // _COLUMNS)  # of panels, for one row
    columns = -(-len(rows[0]) // lines)
    gap, head, foot = 0.08, 0.3, 0.6  # inches
    text_height = 0.1 + 0.14 * max(2, *(1 + text.count("\n") for row in rows for text, _ in row))
    width = columns * (side + gap) + gap
    height = lines * len(rows) * (side + text_height) + head + foot
    figure = Figure(figsize=(width, height))
    figure.text(0.5, 1 - 0.1 / height, title, ha="center", va="top", fontsize=10)
    for i, row in enumerate(rows):
        for j, (text, image) in enumerate(row):
            left = gap + j % columns * (side + gap)
            bottom = height - head - (i * lines + j // columns + 1) * (side + text_height)
            place = left / width, bottom / height, side / width, side / height
            figure.add_axes(place, frameon=False, anchor="N").imshow(image)
            label = _shortened(text, int(16 * side))
            x, y = (left + side / 2) / width, (bottom + side + 0.04) / height
            figure.text(x, y, label, ha="center", va="bottom", fontsize=7, parse_math=False)
    for axes in figure.axes:
        axes.set_axis_off()
    bar = figure.add_axes((0.5 - 1.2 / width, 0.36 / height, 2.4 / width, 0.1 / height))
    figure.colorbar(ScalarMappable(cmap=COLOURS), cax=bar, orientation="horizontal", ticks=[0, 1])
    bar.set_xticklabels(["lowest", "highest"])
    bar.tick_params(labelsize=7, length=0)
    bar.set_xlabel(scale, fontsize=7, labelpad=3)
    return figure


def _shortened(text: str, length: int) -> str:
    """The text with at most `length` characters a line: longer lines lose their middle."""
    half = length // 2
    return "\n".join(x if len(x) <= length else f"{x[:half]}…{x[-half:]}" for x in text.splitlines())
