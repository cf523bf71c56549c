"""The command that draws where a network looks and how it learned: `python -m simam_jax.visualize --help`."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from simam_jax import errors
from simam_jax.classification import curves, explain, figures
from simam_jax.command_line import add_checkpoint_arguments, exit_code, find_images, load_classifier, skip
from simam_jax.paths import local
from simam_jax.progress import Progress

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from simam_jax.inference import ClassifierPredictor

MAX_IMAGES = 16  # in one picture; matplotlib ends at 65,536 pixels, the deepest networks have 81 layers


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m simam_jax.visualize", description="Pictures of where a network looks, and of how it learned."
    )
    commands = parser.add_subparsers(required=True, metavar="attention | grad-cam | curves")
    attention = commands.add_parser("attention", help="SimAM's weights over images")
    attention.set_defaults(draw=_draw_attention)
    add_checkpoint_arguments(attention)
    attention.add_argument(
        "--layer", help="one layer, such as layer3_1, channel by channel; default: all layers' means"
    )
    attention.add_argument("--channels", type=int, default=6, help="with --layer: so many, those that vary most (6)")
    cam = commands.add_parser("grad-cam", help="what speaks for a class in images")
    cam.set_defaults(draw=_draw_grad_cam)
    add_checkpoint_arguments(cam)
    cam.add_argument("--baseline", help="a second checkpoint beside the first; of a .pth.tar: without attention")
    cam.add_argument(
        "--class", dest="class_name", help="a class's name or index; default: the first network's likeliest"
    )
    cam.add_argument("--layer", help="the stage, such as layer3; default: the last")
    for command in (attention, cam):
        command.add_argument("images", nargs="+", help="image files and folders of them")
    runs = commands.add_parser("curves", help="top-1 error over epochs of one or more runs")
    runs.set_defaults(draw=_draw_curves)
    runs.add_argument("workdirs", nargs="+", help="what train.py wrote into")
    for command in (attention, cam, runs):
        command.add_argument("--output", required=True, help="the picture, .png or .svg")
    args = parser.parse_args(argv)
    figures.check_ending(args.output)
    return args.draw(args)


def _draw_attention(args: argparse.Namespace) -> int:
    paths = _find_images(args.images)
    predictor = load_classifier(args)
    read, pixels = _read(predictor, paths)
    images = predictor.normalized(pixels)
    weights = _one_by_one(lambda image: explain.attention_weights(predictor.model, predictor.variables, image), images)
    figure = figures.attention_figure(pixels, weights, args.layer, args.channels, [path.name for path in read])
    return _finish(figure, args.output, paths, read)


def _draw_grad_cam(args: argparse.Namespace) -> int:
    paths = _find_images(args.images)
    first = load_classifier(args)
    networks = {figures.TITLES[first.model.attention]: first}
    if args.baseline:
        second = _load_baseline(args, first)
        title = figures.TITLES[second.model.attention]
        networks[title if title not in networks else f"{title}, baseline"] = second
    index = None if args.class_name is None else _class_index(first, args.class_name)
    read, pixels = _read(first, paths)
    shares = {title: np.asarray(predictor.probabilities(pixels)) for title, predictor in networks.items()}
    likeliest = shares[figures.TITLES[first.model.attention]].argmax(1)
    classes = likeliest if index is None else np.full_like(likeliest, index)
    heats, captions = {}, {}
    for title, predictor in networks.items():

        def look(image: jax.Array, index: np.ndarray, predictor: "ClassifierPredictor" = predictor) -> jax.Array:
            return explain.grad_cam(predictor.model, predictor.variables, image, index, args.layer)

        heats[title] = _one_by_one(look, predictor.normalized(pixels), classes)
        captions[title] = [
            f"{predictor.class_names[c]}: {100 * row[c]:.1f} %" for c, row in zip(classes, shares[title], strict=True)
        ]
    figure = figures.grad_cam_figure(pixels, heats, captions, [path.name for path in read])
    return _finish(figure, args.output, paths, read)


def _draw_curves(args: argparse.Namespace) -> int:
    names = [local(workdir).resolve().name for workdir in args.workdirs]
    if len(set(names)) < len(names):
        names = args.workdirs
    runs = {name: curves.read_curves(path) for name, path in zip(names, args.workdirs, strict=True)}
    return _finish(figures.curves_figure(runs), args.output, [], [])


def _load_baseline(args: argparse.Namespace, first: "ClassifierPredictor") -> "ClassifierPredictor":
    """The network of `--baseline`, with the classes and the part of an image that the first network has."""
    given = vars(args) | {"checkpoint": args.baseline, "attention": "none", "attention_param": None}
    second = load_classifier(argparse.Namespace(**given))
    if second.class_names != first.class_names:
        raise errors.UserError(f"--baseline={args.baseline} has other classes than --checkpoint={args.checkpoint}.")
    seen = [(p.preprocessing.image_size, p.preprocessing.eval_resize) for p in (first, second)]
    if seen[0] != seen[1]:
        raise errors.UserError(
            f"--baseline={args.baseline} sees images at (image_size, eval_resize) = {seen[1]}, "
            f"--checkpoint={args.checkpoint} at {seen[0]}: they cannot be compared position by position."
        )
    return second


def _class_index(predictor: "ClassifierPredictor", name: str) -> int:
    """The index of the class with that name, else with that number."""
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


def _read(predictor: "ClassifierPredictor", paths: list[Path]) -> tuple[list[Path], np.ndarray]:
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
    figures.save(figure, output)
    Progress(None).say(f"Wrote {output}")
    return exit_code(len(paths) - len(read), len(paths))


if __name__ == "__main__":
    errors.run_cli(main)
