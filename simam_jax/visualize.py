"""Where a network looks: SimAM's weights, Grad-CAM, and the curves of runs. `python -m simam_jax.visualize --help`."""

import argparse
import functools
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.traverse_util import flatten_dict
from jax.typing import ArrayLike
from PIL import Image

from simam_jax import errors
from simam_jax.command_line import add_model_arguments, exit_code, find_images, load_predictor, skip
from simam_jax.inference import Predictor
from simam_jax.ops.moments import at_least_float32
from simam_jax.progress import Progress

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ENDINGS = (".png", ".svg")
MAX_IMAGES = 16  # in one picture; matplotlib ends at 65,536 pixels, the deepest networks have 81 layers
COLOURS = "inferno"  # perceptually uniform: equal steps of a value are equal steps for the eye
TITLES = {"simam": "SimAM", "none": "no attention", "se": "SE", "cbam": "CBAM"}

_COLUMNS = 10  # panels side by side, at most


# ---- what is seen


def attention_weights(model: nn.Module, variables: Any, images: jax.Array) -> dict[str, jax.Array]:
    """SimAM's weights in every layer that has them, from the first to the last; empty for networks without SimAM.

    Args:
        model, variables: any network with `SimAM` in it.
        images: (N, H, W, 3), normalised.

    Returns:
        By the layer's name, such as "layer3_1", the weights (N, H, W, C), in (0.62, 1] (Eq. 5).
    """
    return dict(sorted(_attention_weights(model, variables, images).items(), key=_natural))


@functools.partial(jax.jit, static_argnums=0)
def _attention_weights(model: nn.Module, variables: Any, images: jax.Array) -> dict[str, jax.Array]:
    outputs: Any = model.apply(variables, images, mutable=["intermediates"])
    sown: Any = flatten_dict(outputs[1].get("intermediates", {}))
    return {
        "/".join(path[:-1]).removesuffix("/attention"): calls[-1]
        for path, calls in sown.items()
        if path[-1] == "weights"
    }


def _natural(item: tuple[str, Any]) -> list[tuple[str, int]]:
    """Sorts layer10 behind layer9: JAX hands dictionaries back in the order of their letters."""
    return [(word, int(number or 0)) for word, number in re.findall(r"(\D*)(\d*)", item[0])]


def grad_cam(
    model: nn.Module, variables: Any, images: jax.Array, class_index: ArrayLike, layer: str | None = None
) -> jax.Array:
    """Grad-CAM: which positions of a stage's output speak for a class.

    Selvaraju et al.: "Grad-CAM: Visual Explanations from Deep Networks via Gradient-Based Localization", ICCV 2017,
    Eq. 1 and 2: the channels, weighted by the mean gradient of the class's logit, summed, and cut off at 0.

    Args:
        model, variables: one of `create_model`.
        images: (N, H, W, 3), normalised.
        class_index: one for all images, or (N,).
        layer: the stage, "layer1", "layer2", ...; None: the last.

    Returns:
        (N, H', W') in 0..1, each map divided by its maximum. All 0 where nothing speaks for the class.

    Raises:
        UserError: a class or a stage that the network does not have.
    """
    num_classes: int = model.num_classes  # pyright: ignore[reportAttributeAccessIssue]
    index = np.broadcast_to(class_index, len(images))
    if not np.isin(index, range(num_classes)).all():
        raise errors.UserError(f"class_index must be in 0..{num_classes - 1}, got {class_index}.")
    stages = _stages.eval_shape(model, variables, images)
    if layer is None:
        layer = max(stages.items(), key=_natural)[0]
    if layer not in stages:
        raise errors.unknown("layer", layer, stages)
    return _grad_cam(model, layer, variables, images, index, jnp.zeros_like(stages[layer]))


@functools.partial(jax.jit, static_argnums=0)
def _stages(model: nn.Module, variables: Any, images: jax.Array) -> dict[str, jax.Array]:
    outputs: Any = model.apply(variables, images, features=True)
    return outputs[1]


@functools.partial(jax.jit, static_argnums=(0, 1))
def _grad_cam(
    model: nn.Module, layer: str, variables: Any, images: jax.Array, index: jax.Array, zeros: jax.Array
) -> jax.Array:
    def score(shift: jax.Array) -> tuple[jax.Array, jax.Array]:
        outputs: Any = model.apply({**variables, "perturbations": {layer: shift}}, images, features=True)
        logits, stages = outputs
        return jnp.take_along_axis(logits, index[:, None], axis=1).sum(), stages[layer]

    gradient, maps = jax.grad(score, has_aux=True)(zeros)
    wide = at_least_float32(maps.dtype)
    importance = gradient.astype(wide).mean((1, 2), keepdims=True)
    heat = nn.relu((importance * maps.astype(wide)).sum(-1))
    highest = heat.max((1, 2), keepdims=True)
    return heat / jnp.where(highest > 0, highest, 1)


def read_curves(workdir: str | Path) -> dict[str, np.ndarray]:
    """A run's top-1 error over its length, from `metrics.jsonl`.

    Returns:
        "train" and "eval", each (K, 2) of epochs and percent. The training error, measured on the way, is the mean of
        every epoch; an update that was repeated after an interruption counts once.

    Raises:
        UserError: there are no metrics.
    """
    path = Path(workdir) / "metrics.jsonl"
    try:
        lines = path.read_text().splitlines()
    except OSError as error:
        raise errors.UserError(f"{workdir} is no workdir with metrics: {error}.") from error
    last: dict[str, dict[int, tuple[float, float]]] = {"train": {}, "eval": {}}
    for line in lines:
        try:
            row = json.loads(line)
        except json.JSONDecodeError:  # a line that the end of the process cut off
            continue
        for part, rows in last.items():
            if f"{part}/top1" in row:
                rows[row["step"]] = row["epoch"], 100 * (1 - row[f"{part}/top1"])
    if not any(last.values()):
        raise errors.UserError(f"{path} holds no top-1 accuracy yet: the run has not reported one.")
    evals = [row for _, row in sorted(last["eval"].items())]
    return {"train": _by_epoch(last["train"]), "eval": np.array(evals).reshape(-1, 2)}


def _by_epoch(reports: Mapping[int, tuple[float, float]]) -> np.ndarray:
    """(K, 2) from the reports (epoch, error) by step, each the mean of the updates since the one before."""
    steps = np.array(sorted(reports))
    epochs, percent = np.array([reports[step] for step in steps]).reshape(-1, 2).T
    updates = np.diff(steps, prepend=0)
    began = np.floor(epochs * (steps - 1) / steps)  # an update belongs to the epoch in which it began
    rows = [(epochs[began == k][-1], np.average(percent[began == k], weights=updates[began == k])) for k in set(began)]
    return np.array(sorted(rows)).reshape(-1, 2)


# ---- how it is shown


def overlay(pixels: np.ndarray, heat: np.ndarray) -> Image.Image:
    """A heat map over its image, in colours from the map's lowest value (dark) to its highest (bright).

    Args:
        pixels: uint8 (S, S, 3).
        heat: floating (H, W), of any range; it is resized smoothly.

    Returns:
        An RGB image of S x S pixels.

    Raises:
        UserError: other shapes or dtypes.
    """
    import matplotlib

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
    pixels: np.ndarray,
    weights: Mapping[str, jax.Array],
    layer: str | None = None,
    channels: int = 6,
    names: Sequence[str] = (),
) -> "Figure":
    """SimAM's weights over their images: the mean over the channels in every layer, or one layer and its channels.

    Args:
        pixels: uint8 (N, S, S, 3), what the network saw.
        weights: of `attention_weights`, of the same images.
        layer: the one to show channel by channel; None: all layers.
        channels: of `layer`, how many: those whose weights vary most over the image.
        names: of the images.

    Raises:
        UserError: there are no weights, or none of that layer.
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
    """Grad-CAM of one or more networks side by side (Fig. 1 and 4 of the paper).

    Args:
        pixels: uint8 (N, S, S, 3), what the networks saw.
        heats: by the network's title, (N, H, W) in 0..1, of `grad_cam`.
        captions: by the same titles, what to say of each image, such as the class and its probability.
        names: of the images.
    """
    rows = []
    for i, image in enumerate(map(_enlarged, pixels)):
        row: list[tuple[str, Any]] = [(names[i], image)]
        row += [(f"{title}\n{captions[title][i]}", overlay(image, heat[i])) for title, heat in heats.items()]
        rows.append(row)
    return _grid("Grad-CAM", rows, "evidence for the class named above a panel, within that panel's range", side=2.2)


def curves_figure(runs: Mapping[str, Mapping[str, np.ndarray]]) -> "Figure":
    """Top-1 error over epochs: training dashed, validation solid, a colour for each run.

    Args:
        runs: by their names in the legend, of `read_curves`.
    """
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.add_subplot()
    styles = {"train": ("--", "training"), "eval": ("-", "validation")}
    handles = [Line2D([], [], color="0.3", ls=line, label=label) for line, label in styles.values()]
    for i, (name, curves) in enumerate(runs.items()):
        for part, (line, _) in styles.items():
            if len(curves[part]):
                few = len(curves[part]) <= 20
                axes.plot(*curves[part].T, line, color=f"C{i}", marker="o" if few else "", markersize=3)
        last = f" (ends at {curves['eval'][-1, 1]:.2f} %)" if len(curves["eval"]) else ""
        handles.append(Line2D([], [], color=f"C{i}", linewidth=3, label=name + last))
    axes.set(xlabel="epoch", ylabel="top-1 error (%)", ylim=(0, None))
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
    """Writes the figure, as PNG or SVG by the path's ending; what was there stays until the new one is whole.

    Raises:
        UserError: another ending, or a place that cannot be written.
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
    """The path; raises `UserError` if its ending is none of a picture's that can be written."""
    if Path(path).suffix.lower() not in ENDINGS:
        raise errors.unknown("ending", Path(path).suffix, ENDINGS)
    return Path(path)


def _float(x: jax.Array) -> np.ndarray:
    return np.asarray(x, np.float32)


def _enlarged(image: np.ndarray) -> np.ndarray:
    """Small images with every pixel as a square, so that a map over them can be smooth."""
    factor = max(1, 224 // len(image))
    return image.repeat(factor, 0).repeat(factor, 1)


def _grid(title: str, rows: Sequence[Sequence[tuple[str, Any]]], scale: str, side: float = 1.4) -> "Figure":
    """Panels (text, image) of `side` inches, a row for each image, or several where it has too many; a colour bar below.

    Placed by hand: matplotlib's layout engines take seconds for so many panels.
    """
    from matplotlib.cm import ScalarMappable
    from matplotlib.figure import Figure

    lines = -(-len(rows[0]) // _COLUMNS)  # that one image takes
    columns = -(-len(rows[0]) // lines)
    gap, text_height, head, foot = 0.08, 0.38, 0.3, 0.6  # inches
    width = columns * (side + gap) + gap
    height = lines * len(rows) * (side + text_height) + head + foot
    figure = Figure(figsize=(width, height))
    figure.text(0.5, 1 - 0.1 / height, title, ha="center", va="top", fontsize=10)
    for i, row in enumerate(rows):
        for j, (text, image) in enumerate(row):
            left = gap + j % columns * (side + gap)
            bottom = height - head - (i * lines + j // columns + 1) * (side + text_height)
            figure.add_axes((left / width, bottom / height, side / width, side / height), frameon=False).imshow(image)
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
    """Each line with at most so many characters, its middle left out."""
    half = length // 2
    return "\n".join(x if len(x) <= length else f"{x[:half]}…{x[-half:]}" for x in text.splitlines())


# ---- the commands


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m simam_jax.visualize", description="Pictures of where a network looks, and of how it learned."
    )
    commands = parser.add_subparsers(required=True, metavar="attention | grad-cam | curves")
    attention = commands.add_parser("attention", help="SimAM's weights over images")
    attention.set_defaults(draw=_draw_attention)
    add_model_arguments(attention)
    attention.add_argument(
        "--layer", help="one layer, such as layer3_1, channel by channel; default: all layers' means"
    )
    attention.add_argument("--channels", type=int, default=6, help="with --layer: so many, those that vary most (6)")
    cam = commands.add_parser("grad-cam", help="what speaks for a class in images")
    cam.set_defaults(draw=_draw_grad_cam)
    add_model_arguments(cam)
    cam.add_argument("--baseline", help="a second checkpoint beside the first; of a .pth.tar: without attention")
    cam.add_argument(
        "--class", dest="class_name", help="a class's name or index; default: the first network's likeliest"
    )
    cam.add_argument("--layer", help="the stage, such as layer3; default: the last")
    for command in (attention, cam):
        command.add_argument("images", nargs="+", help="image files and folders of them")
    curves = commands.add_parser("curves", help="top-1 error over epochs of one or more runs")
    curves.set_defaults(draw=_draw_curves)
    curves.add_argument("workdirs", nargs="+", help="what train.py wrote into")
    for command in (attention, cam, curves):
        command.add_argument("--output", required=True, help="the picture, .png or .svg")
    args = parser.parse_args(argv)
    check_ending(args.output)
    return args.draw(args)


def _draw_attention(args: argparse.Namespace) -> int:
    paths = _find_images(args.images)
    predictor = load_predictor(args)
    read, pixels = _read(predictor, paths)
    images = predictor.normalized(pixels)
    weights = _one_by_one(lambda image: attention_weights(predictor.model, predictor.variables, image), images)
    figure = attention_figure(pixels, weights, args.layer, args.channels, [path.name for path in read])
    return _finish(figure, args.output, paths, read)


def _draw_grad_cam(args: argparse.Namespace) -> int:
    paths = _find_images(args.images)
    first = load_predictor(args)
    networks = {TITLES[first.model.attention]: first}
    if args.baseline:
        second = _load_baseline(args, first)
        title = TITLES[second.model.attention]
        networks[title if title not in networks else f"{title}, baseline"] = second
    index = None if args.class_name is None else _class_index(first, args.class_name)
    read, pixels = _read(first, paths)
    shares = {title: np.asarray(predictor.probabilities(pixels)) for title, predictor in networks.items()}
    likeliest = shares[TITLES[first.model.attention]].argmax(1)
    classes = likeliest if index is None else np.full_like(likeliest, index)
    heats, captions = {}, {}
    for title, predictor in networks.items():

        def look(image: jax.Array, index: np.ndarray, predictor: Predictor = predictor) -> jax.Array:
            return grad_cam(predictor.model, predictor.variables, image, index, args.layer)

        heats[title] = _one_by_one(look, predictor.normalized(pixels), classes)
        captions[title] = [
            f"{predictor.class_names[c]}: {100 * row[c]:.1f} %" for c, row in zip(classes, shares[title], strict=True)
        ]
    figure = grad_cam_figure(pixels, heats, captions, [path.name for path in read])
    return _finish(figure, args.output, paths, read)


def _draw_curves(args: argparse.Namespace) -> int:
    names = [Path(workdir).resolve().name for workdir in args.workdirs]
    if len(set(names)) < len(names):
        names = args.workdirs
    curves = curves_figure({name: read_curves(path) for name, path in zip(names, args.workdirs, strict=True)})
    return _finish(curves, args.output, [], [])


def _load_baseline(args: argparse.Namespace, first: Predictor) -> Predictor:
    """The second network, which must tell the same classes apart and see the same part of an image."""
    given = vars(args) | {"checkpoint": args.baseline, "attention": "none", "attention_param": None}
    second = load_predictor(argparse.Namespace(**given))
    if second.class_names != first.class_names:
        raise errors.UserError(f"--baseline={args.baseline} has other classes than --checkpoint={args.checkpoint}.")
    seen = [(p.preprocessing.image_size, p.preprocessing.eval_resize) for p in (first, second)]
    if seen[0] != seen[1]:
        raise errors.UserError(
            f"--baseline={args.baseline} sees images at (image_size, eval_resize) = {seen[1]}, "
            f"--checkpoint={args.checkpoint} at {seen[0]}: they cannot be compared position by position."
        )
    return second


def _class_index(predictor: Predictor, name: str) -> int:
    """The class with that name, else with that number."""
    if name in predictor.class_names:
        return predictor.class_names.index(name)
    if name.isdecimal() and int(name) < len(predictor.class_names):
        return int(name)
    raise errors.unknown("class", name, predictor.class_names)


def _find_images(named: list[str]) -> list[Path]:
    paths = find_images(named)
    if len(paths) > MAX_IMAGES:
        raise errors.UserError(f"{len(paths)} images are too many for one picture: name at most {MAX_IMAGES}.")
    return paths


def _read(predictor: Predictor, paths: list[Path]) -> tuple[list[Path], np.ndarray]:
    """The paths that can be read and their pixels, uint8 (N, S, S, 3); the others are named on standard error."""
    read, pixels = [], []
    for path in paths:
        try:
            pixels.append(predictor.preprocessing(path))
            read.append(path)
        except errors.UserError as error:
            skip(error)
    if not read:
        raise errors.UserError("None of the images could be read: there is nothing to show.")
    return read, np.stack(pixels)


def _one_by_one(look: Callable[..., Any], *columns: Any) -> Any:
    """`look(*columns)`, computed image by image to say on a terminal how far it is."""
    progress, count = Progress(None), len(columns[0])
    results = []
    for i in range(count):
        progress.show(f"image {i + 1}/{count}")
        results.append(jax.device_get(look(*(column[i : i + 1] for column in columns))))
    return jax.tree.map(lambda *parts: np.concatenate(parts), *results)


def _finish(figure: "Figure", output: str, paths: list[Path], read: list[Path]) -> int:
    """Writes the picture; the exit code, 1 where images were skipped."""
    save(figure, output)
    Progress(None).say(f"Wrote {output}")
    return exit_code(len(paths) - len(read), len(paths))


if __name__ == "__main__":
    errors.run_cli(main)
