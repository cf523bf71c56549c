"""What a trained network sees in images, as a table, as JSON or as pictures: `python -m simam_jax.predict`."""

import argparse
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from simam_jax import errors
from simam_jax.classification.predictions import Predictions
from simam_jax.command_line import (
    add_checkpoint_arguments,
    exit_code,
    find_images,
    load_predictor,
    skip,
    with_progress,
)
from simam_jax.paths import local
from simam_jax.preprocessing import read_rgb

if TYPE_CHECKING:
    from PIL import Image

    from simam_jax.inference import Predictor

SCORE = 0.3  # from which on objects are shown


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m simam_jax.predict",
        description="The likeliest classes of images, or a detector's objects. Unreadable ones are named, skipped, and make the exit code 1.",
    )
    add_checkpoint_arguments(parser)
    parser.add_argument("images", nargs="+", help="image files, folders of them, and patterns such as 'photos/*.jpg'")
    parser.add_argument("--top", type=int, help="a classifier's: classes for each image (default 5)")
    parser.add_argument(
        "--json",
        action="store_true",
        help="JSON instead of a table: of a classifier one object a line, of a detector one list in COCO's results form",
    )
    parser.add_argument("--output", help="a detector's: a folder for pictures with its objects")
    parser.add_argument(
        "--score", type=float, help=f"a detector's: the least of an object (default {SCORE}, and 0 in --json)"
    )
    parser.add_argument("--classes", help="a detector's: only these, such as person,dog")
    parser.add_argument("--batch-size", type=int, help="images computed at once (default 32, and 2 of a detector)")
    args = parser.parse_args(argv)
    if args.top is not None and args.top < 1:
        raise errors.UserError(f"--top must be at least 1, got {args.top}.")
    if args.score is not None and not 0 <= args.score <= 1:
        raise errors.UserError(f"--score must be in 0..1, got {args.score}.")
    output = local(args.output) if args.output else None
    paths = find_images(args.images, output=output)
    places = _places(paths, output) if output else {}
    predictor = load_predictor(args, batch_size=args.batch_size)
    from simam_jax.inference import DetectorPredictor  # loads JAX

    show = _show_objects if isinstance(predictor, DetectorPredictor) else _show_classes
    return exit_code(show(args, predictor, paths, places), len(paths))


def _show_classes(args: argparse.Namespace, predictor: "Predictor", paths: list[Path], _places: Any) -> int:
    """Prints the likeliest classes of images; returns how many could not be read."""
    if given := [name for name in ("output", "score", "classes") if getattr(args, name) is not None]:
        raise errors.UserError(f"--{given[0]} is for detectors, and {args.checkpoint} is a classifier.")
    top, skipped = args.top or 5, 0
    for path, result in with_progress(predictor.stream(paths), len(paths)):
        if isinstance(result, errors.UserError):
            skipped += 1
            skip(result)
            continue
        results = Predictions(result[None], predictor.class_names)
        if args.json:
            print(json.dumps({"image": str(path), "top": results.rows(top)[0]}))
        else:
            print(path, *(f"  {line}" for line in results.lines(top)[0]), sep=os.linesep)
    return skipped


def _show_objects(
    args: argparse.Namespace, predictor: "Predictor", paths: list[Path], places: Mapping[Path, Path]
) -> int:
    """Prints the objects in images and draws them at their places; returns how many images could not be read."""
    if args.top is not None:
        raise errors.UserError(f"--top is for classifiers, and {args.checkpoint} is a detector: see --score.")
    classes = args.classes.split(",") if args.classes else None
    for name in classes or ():
        if name not in predictor.class_names:
            raise errors.unknown("class", name, predictor.class_names)
    if args.json and getattr(predictor.model, "masks", False):
        with errors.naming_extras():  # before the first image
            import pycocotools  # noqa: F401
    skipped, rows = 0, 0
    for path, result in with_progress(predictor.stream(paths), len(paths)):
        if isinstance(result, errors.UserError):
            skipped += 1
            skip(result)
            continue
        shown = result.chosen(SCORE if args.score is None else args.score, classes)
        if args.output:
            _write(shown.draw(np.asarray(read_rgb(path)), threshold=0), places[path])
        if not args.json:
            print(path, *(f"  {line}" for line in shown.lines() or ["nothing found"]), sep=os.linesep)
            continue
        for row in result.chosen(args.score or 0.0, classes).results(_name_in_results(path), predictor.category_ids):
            print(",\n" if rows else "[", json.dumps({**row, "file_name": str(path)}), sep="", end="")
            rows += 1
    if args.json:
        print("]" if rows else "[]")
    return skipped


def _name_in_results(path: Path) -> str | int:
    """An image's number where its file is called by it, as COCO's are; else the file's name."""
    return int(path.stem) if path.stem.isdecimal() else path.name


def _places(paths: list[Path], folder: Path) -> dict[Path, Path]:
    """Where the picture of each image is written: as the image is called; in sub-folders where two are called the same.

    Raises:
        UserError: it would be written over an image.
    """
    whole = [path.resolve() for path in paths]
    top = Path(os.path.commonpath([path.parent for path in whole]))
    flat = len({path.name for path in whole}) == len(set(whole))
    places = {}
    for path, resolved in zip(paths, whole, strict=True):
        place = folder / (resolved.name if flat else resolved.relative_to(top))
        places[path] = place if place.suffix.lower() in _WRITTEN else place.with_name(f"{place.name}.png")
    if over := {place.resolve() for place in places.values()} & set(whole):
        raise errors.UserError(f"--output={folder} would write over the image {min(over)}: name another folder.")
    return places


_JPEG = {"format": "JPEG", "quality": 92}
_WRITTEN = {".jpg": _JPEG, ".jpeg": _JPEG, ".png": {"format": "PNG", "compress_level": 1}}


def _write(picture: "Image.Image", place: Path) -> None:
    """Writes a picture, whole or not at all."""
    partial = place.with_name(f"{place.name}.part")
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        picture.save(partial, **_WRITTEN[place.suffix.lower()])
        partial.replace(place)
    except OSError as error:
        raise errors.UserError(f"{place} cannot be written: {error}.") from error
    finally:
        partial.unlink(missing_ok=True)


if __name__ == "__main__":
    errors.run_cli(main)
