"""The command that draws where a network looks and how it learned: `python -m simam_jax.visualize --help`."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from simam_jax import curves, errors
from simam_jax.classification import explain, figures
from simam_jax.command_line import (
    add_checkpoint_arguments,
    exit_code,
    find_images,
    load_classifier,
    load_detector,
    load_predictor,
    run_compiling,
    skip,
    with_progress,
)
from simam_jax.detection.apply import padded, prepared
from simam_jax.models import MODELS
from simam_jax.models.detector import own_extent
from simam_jax.paths import local
from simam_jax.preprocessing import Resized
from simam_jax.progress import Progress

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from simam_jax.inference import ClassifierPredictor, DetectorPredictor, Predictor

Maps = dict[str, np.ndarray]  # SimAM's weights in an image, (h, w, C), by the layer's name
MAX_IMAGES = 16  # in one picture; matplotlib ends at 65,536 pixels, the deepest networks have 81 layers


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m simam_jax.visualize", description="Pictures of where a network looks, and of how it learned."
    )
    commands = parser.add_subparsers(required=True, metavar="attention | grad-cam | curves | detections")
    attention = commands.add_parser("attention", help="SimAM's weights over images, a detector's backbone's too")
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
    runs = commands.add_parser("curves", help="top-1 error, or a detector's AP, over epochs of one or more runs")
    runs.set_defaults(draw=_draw_curves)
    runs.add_argument("workdirs", nargs="+", help="what train.py wrote into")
    objects = commands.add_parser("detections", help="what detectors find beside the ground truth, the worst first")
    objects.set_defaults(draw=_draw_detections)
    add_checkpoint_arguments(objects, several=True)
    objects.add_argument("--annotations", required=True, help="the ground truth, a json in COCO's form")
    objects.add_argument("--images", required=True, help="the folder of its images")
    objects.add_argument("--score", type=float, default=0.3, help="the least score of an object that is shown (0.3)")
    objects.add_argument("--count", type=int, default=8, help=f"images that are shown, at most {MAX_IMAGES} (8)")
    objects.add_argument("--first", type=int, help="look at the first so many images only; default: all")
    for command in (attention, cam, runs, objects):
        command.add_argument("--output", required=True, help="the picture, .png or .svg")
    args = parser.parse_args(argv)
    figures.check_ending(args.output)
    return args.draw(args)


def _draw_attention(args: argparse.Namespace) -> int:
    paths = _find_images(args.images)
    predictor: Any = load_predictor(args)
    detects = MODELS[predictor.model.architecture].task == "detection"
    read, images = _read(predictor, paths)
    look = _weights_in_detector if detects else _weights_in_classifier
    maps = _one_by_one(lambda image: look(predictor, image, args.layer), images)
    weights = {name: [of_image[name] for of_image in maps] for name in maps[0]}
    pixels = [image.pixels for image in images] if detects else images
    figure = figures.attention_figure(pixels, weights, args.layer, args.channels, [path.name for path in read])
    return _finish(figure, args.output, paths, read)


def _weights_in_classifier(predictor: "ClassifierPredictor", image: np.ndarray, _layer: str | None) -> Maps:
    weights = explain.attention_weights(predictor.model, predictor.variables, predictor.normalized(image[None]))
    return {name: np.asarray(w)[0] for name, w in weights.items()}


def _weights_in_detector(predictor: "DetectorPredictor", image: Resized, layer: str | None) -> Maps:
    """The weights within the image. Of large images all channels take gigabytes: where no layer's are asked for, their mean."""
    preprocessing = predictor.preprocessing
    pixels, sizes, _ = padded([image], preprocessing.bucket(*image.pixels.shape[:2]), 1)
    images = prepared(pixels, sizes, preprocessing.mean, preprocessing.std, predictor.model.dtype)
    extent = own_extent(sizes)
    weights = explain.attention_weights(predictor.model, predictor.variables, images, extent, method="pyramid")
    maps = {}
    for full_name, w in weights.items():
        name, stride = full_name.removeprefix("backbone/"), images.shape[1] // w.shape[1]
        height, width = (-(-side // stride) for side in image.pixels.shape[:2])
        inside = np.asarray(w[0, :height, :width], np.float32)
        maps[name] = inside if name == layer else inside.mean(-1, keepdims=True)
    return maps


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
    pixels = np.stack(pixels)
    shares = {title: np.asarray(predictor.probabilities(pixels)) for title, predictor in networks.items()}
    likeliest = shares[figures.TITLES[first.model.attention]].argmax(1)
    classes = likeliest if index is None else np.full_like(likeliest, index)
    heats, captions = {}, {}
    for title, predictor in networks.items():

        def look(image: jax.Array, index: np.ndarray, predictor: "ClassifierPredictor" = predictor) -> jax.Array:
            return explain.grad_cam(predictor.model, predictor.variables, image, index, args.layer)

        heats[title] = np.concatenate(
            _one_by_one(lambda *each: look(*(x[None] for x in each)), predictor.normalized(pixels), classes)
        )
        captions[title] = [
            f"{predictor.class_names[c]}: {100 * row[c]:.1f} %" for c, row in zip(classes, shares[title], strict=True)
        ]
    figure = figures.grad_cam_figure(pixels, heats, captions, [path.name for path in read])
    return _finish(figure, args.output, paths, read)


def _draw_curves(args: argparse.Namespace) -> int:
    runs = {name: curves.read_curves(path) for name, path in _by_name(args.workdirs).items()}
    return _finish(figures.curves_figure(runs), args.output, [], [])


def _draw_detections(args: argparse.Namespace) -> int:
    from simam_jax.detection import comparison
    from simam_jax.detection import figures as detection_figures

    if not 1 <= args.count <= MAX_IMAGES:
        raise errors.UserError(f"--count must be in 1..{MAX_IMAGES}, got {args.count}.")
    output = figures.check_ending(args.output)
    truth, paths = comparison.read_truth(args.annotations, args.images, args.first)
    found, unread = {}, set()
    for name, checkpoint in _by_name(args.checkpoint).items():
        predictor = load_detector(argparse.Namespace(**vars(args) | {"checkpoint": checkpoint}))
        ids = comparison.category_ids(truth, predictor.class_names, checkpoint)
        found[name] = []
        results = (result for _, result in predictor.stream(comparison.images(truth, paths)))
        for result, path, image in zip(
            with_progress(results, len(paths)), paths, truth.image_ids.tolist(), strict=True
        ):
            if isinstance(result, errors.UserError):
                if path not in unread:
                    skip(result)
                unread.add(path)
            else:
                found[name] += result.results(image, ids)
    read = np.array([path not in unread for path in paths])
    truth, shown = comparison.subset(truth, read), [path for path in paths if path not in unread]
    if not shown:
        raise errors.UserError("None of the images could be read: there is nothing to show.")
    scores = comparison.scores(truth, found)
    examples = comparison.examples(truth, shown, found, score=args.score, count=args.count)
    curves_output = output.with_name(f"{output.stem}_scores{output.suffix}")
    figures.save(detection_figures.scores_figure(scores, truth.class_names), curves_output)
    Progress(None).say(f"Wrote {curves_output}")
    return _finish(examples, args.output, paths, shown)


def _by_name(paths: list[str]) -> dict[str, str]:
    """The paths by their last parts, or by themselves where two end alike."""
    names = [local(path).resolve().name for path in paths]
    return dict(zip(names if len(set(names)) == len(names) else paths, paths, strict=True))


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


def _read(predictor: "Predictor", paths: list[Path]) -> tuple[list[Path], list[Any]]:
    """The paths that can be read and what the preprocessing makes of them; the others are named on standard error."""
    read, pixels = [], []
    for path in paths:
        try:
            pixels.append(predictor.preprocessing(path))
            read.append(path)
        except errors.UserError as error:
            skip(error)
    if not read:
        raise errors.UserError("None of the images could be read: there is nothing to show.")
    return read, pixels


def _one_by_one(look: Callable[..., Any], *columns: Any) -> list[Any]:
    """`look` at each row of the columns, image by image to say on a terminal how far it is."""
    progress, count = Progress(None), len(columns[0])
    results = []
    for i, row in enumerate(zip(*columns, strict=True)):
        progress.show(f"image {i + 1}/{count}")
        results.append(jax.device_get(look(*row)))
    return results


def _finish(figure: "Figure", output: str, paths: list[Path], read: list[Path]) -> int:
    """Writes the picture; the exit code, 1 where images were skipped."""
    figures.save(figure, output)
    Progress(None).say(f"Wrote {output}")
    return exit_code(len(paths) - len(read), len(paths))


if __name__ == "__main__":
    run_compiling(main)
