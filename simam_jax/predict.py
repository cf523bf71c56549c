"""What a trained network sees in images and videos, as a table, as JSON or as pictures: `python -m simam_jax.predict`."""

import argparse
import contextlib
import itertools
import json
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from simam_jax import errors, video
from simam_jax.classification.predictions import Predictions
from simam_jax.command_line import (
    ENDINGS,
    add_checkpoint_arguments,
    exit_code,
    find_images,
    load_predictor,
    run_compiling,
    skip,
    with_progress,
)
from simam_jax.detection.detections import HEADER
from simam_jax.detection.drawing import SHOWN
from simam_jax.paths import local
from simam_jax.preprocessing import read_upright

if TYPE_CHECKING:
    from PIL import Image

    from simam_jax.inference import Predictor

SCORE = 0.3  # from which on objects are shown


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m simam_jax.predict",
        description="The likeliest classes of images and of videos' frames, or a detector's objects. Unreadable files are named, skipped, and make the exit code 1.",
    )
    add_checkpoint_arguments(parser)
    parser.add_argument(
        "images", nargs="+", help="image and video files, folders of them, and patterns such as 'photos/*.jpg'"
    )
    parser.add_argument("--every", type=int, default=1, help="of a video only every so many frames (default 1)")
    parser.add_argument("--top", type=int, help="a classifier's: classes for each image (default 5)")
    parser.add_argument(
        "--json",
        action="store_true",
        help="JSON instead of a table: of a classifier one object a line, of a detector one list in COCO's results form",
    )
    parser.add_argument("--output", help="a detector's: a folder for pictures and videos with its objects")
    parser.add_argument(
        "--score", type=float, help=f"a detector's: the least of an object (default {SCORE}, and 0 in --json)"
    )
    parser.add_argument("--classes", help="a detector's: only these, such as person,dog")
    parser.add_argument("--batch-size", type=int, help="images computed at once (default 32, and 2 of a detector)")
    args = parser.parse_args(argv)
    if args.top is not None and args.top < 1:
        raise errors.UserError(f"--top must be at least 1, got {args.top}.")
    if args.every < 1:
        raise errors.UserError(f"--every must be at least 1, got {args.every}.")
    if args.score is not None and not 0 <= args.score <= 1:
        raise errors.UserError(f"--score must be in 0..1, got {args.score}.")
    output = local(args.output) if args.output else None
    if output and output.exists() and not output.is_dir():
        raise errors.UserError(f"--output={output} is a file: name a folder for the pictures.")
    paths = find_images(args.images, output=output, endings=ENDINGS + video.ENDINGS)
    if any(map(video.is_video, paths)):
        with errors.naming_extras():  # before the weights are read
            import cv2  # noqa: F401
    places = _places(paths, output) if output else {}
    predictor = load_predictor(args, batch_size=args.batch_size)
    from simam_jax.inference import DetectorPredictor  # loads JAX

    show = _show_objects if isinstance(predictor, DetectorPredictor) else _show_classes
    return exit_code(show(args, predictor, paths, places), len(paths))


class Seen(NamedTuple):
    """What the network sees in an image, or in a frame of a video.

    Attributes:
        path: the file.
        frame: its number in a video, from 0; None of an image.
        image: what `Preprocessing` takes.
        result: as `Predictor.stream` gives it, or why the file cannot be read.
    """

    path: Path
    frame: int | None
    image: Any
    result: Any

    @property
    def name(self) -> str:
        """`cat.jpg`, or `street.mp4#25`."""
        return str(self.path) if self.frame is None else f"{self.path}#{self.frame}"

    def json(self) -> dict[str, Any]:
        """The file and the frame."""
        return {"file_name": str(self.path)} | ({} if self.frame is None else {"frame": self.frame})


def _look(args: argparse.Namespace, predictor: "Predictor", paths: Sequence[Path]) -> Iterator[Seen]:
    """What is seen in the images and, frame by frame, in the videos, in their order; how far it is on a terminal."""

    def seen() -> Iterator[Seen]:
        for are_videos, some in itertools.groupby(paths, video.is_video):
            if not are_videos:
                yield from (Seen(path, None, path, result) for path, result in predictor.stream(some))
                continue
            for path in some:
                try:
                    frames = predictor.stream(video.frames(path, args.every))
                    yield from (Seen(path, i * args.every, *each) for i, each in enumerate(frames))
                except errors.UserError as error:
                    yield Seen(path, None, path, error)

    def count(path: Path) -> int:
        with contextlib.suppress(errors.UserError):
            return math.ceil(video.about(path).count / args.every) if video.is_video(path) else 1
        return 1

    return with_progress(seen(), sum(map(count, paths)))


def _show_classes(args: argparse.Namespace, predictor: "Predictor", paths: list[Path], _places: Any) -> int:
    """Prints the likeliest classes of images; returns how many files could not be read."""
    if given := [name for name in ("output", "score", "classes") if getattr(args, name) is not None]:
        raise errors.UserError(f"--{given[0]} is for detectors, and {args.checkpoint} is a classifier.")
    top, skipped = args.top or 5, 0
    for seen in _look(args, predictor, paths):
        if isinstance(seen.result, errors.UserError):
            skipped += 1
            skip(seen.result)
            continue
        results = Predictions(seen.result[None], predictor.class_names)
        if args.json:
            print(json.dumps({"image": seen.name, "top": results.rows(top)[0]}))
        else:
            print(seen.name, *(f"  {line}" for line in results.lines(top)[0]), sep=os.linesep)
    return skipped


def _show_objects(
    args: argparse.Namespace, predictor: "Predictor", paths: list[Path], places: Mapping[Path, Path]
) -> int:
    """Prints the objects in images and draws them at their places; returns how many files could not be read."""
    if args.top is not None:
        raise errors.UserError(f"--top is for classifiers, and {args.checkpoint} is a detector: see --score.")
    classes = args.classes.split(",") if args.classes else None
    for name in classes or ():
        if name not in predictor.class_names:
            raise errors.unknown("class", name, predictor.class_names)
    if args.json and getattr(predictor.model, "masks", False):
        with errors.naming_extras():  # before the first image
            import pycocotools  # noqa: F401
    skipped, printed = 0, 0
    drawn: set[Path] = set()
    with _pictures(places, args.every) as write:
        for seen in _look(args, predictor, paths):
            if isinstance(seen.result, errors.UserError):
                skipped += 1
                skip(seen.result)
                continue
            shown = seen.result.chosen(SCORE if args.score is None else args.score, classes)
            if args.output:
                pixels = np.asarray(read_upright(seen.image))
                longest = None if seen.frame is None else max(*pixels.shape[:2], SHOWN)  # all frames of one size
                write(seen, shown.draw(pixels, threshold=0, longest=longest))
                drawn.add(seen.path)
            if not args.json:
                if not printed:
                    print(f"  {HEADER}")
                printed += 1
                print(seen.name, *(f"  {line}" for line in shown.lines() or ["nothing found"]), sep=os.linesep)
                continue
            listed = seen.result.chosen(args.score or 0.0, classes)
            for row in listed.results(_name_in_results(seen), predictor.category_ids):
                print(",\n" if printed else "[", json.dumps(row | seen.json()), sep="", end="")
                printed += 1
    if args.json:
        print("]" if printed else "[]")
    if drawn:
        print(f"drawn in {args.output}: {len(drawn)}", file=sys.stderr)
    return skipped


def _name_in_results(seen: Seen) -> str | int:
    """An image's number where its file is called by it, as COCO's are; else the file's name, and of a video the frame."""
    own = Path(seen.name)
    return int(own.stem) if own.stem.isdecimal() else own.name


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
        kinds, usual = ((".mp4",), ".mp4") if video.is_video(path) else (tuple(_WRITTEN), ".png")
        places[path] = place if place.suffix.lower() in kinds else place.with_name(f"{place.name}{usual}")
    if over := {place.resolve() for place in places.values()} & set(whole):
        raise errors.UserError(f"--output={folder} would write over the image {min(over)}: name another folder.")
    return places


_JPEG = {"format": "JPEG", "quality": 92}
_WRITTEN = {".jpg": _JPEG, ".jpeg": _JPEG, ".png": {"format": "PNG", "compress_level": 1}}


@contextlib.contextmanager
def _pictures(places: Mapping[Path, Path], every: int) -> Iterator[Callable[[Seen, "Image.Image"], None]]:
    """Writes each picture to its place; those of a video's frames become a video that lasts as long."""
    with contextlib.ExitStack() as opened:
        current, add = None, None

        def write(seen: Seen, picture: "Image.Image") -> None:
            nonlocal current, add
            if seen.frame is None:
                _write(picture, places[seen.path])
                return
            if add is None or seen.path is not current:
                opened.close()
                rate = video.about(seen.path).rate / every
                current, add = seen.path, opened.enter_context(video.written(places[seen.path], rate))
            add(np.asarray(picture))

        yield write


def _write(picture: "Image.Image", place: Path) -> None:
    """Writes a picture, whole or not at all."""
    partial = place.with_name(f"{place.name}.part")
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        try:
            picture.save(partial, **_WRITTEN[place.suffix.lower()])
            partial.replace(place)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        raise errors.UserError(f"{place} cannot be written: {error}.") from error


if __name__ == "__main__":
    run_compiling(main)
