"""What a trained network sees in images, as a table or as JSON: `python -m simam_jax.predict`."""

import argparse
import json
import os

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
from simam_jax.detection.detections import Detections


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m simam_jax.predict",
        description="The likeliest classes of images, or a detector's objects. Unreadable ones are named, skipped, and make the exit code 1.",
    )
    add_checkpoint_arguments(parser)
    parser.add_argument("images", nargs="+", help="image files and folders of them")
    parser.add_argument(
        "--top", type=int, default=5, help="classes for each image (default 5); a detector shows all objects"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object a line instead of a table")
    parser.add_argument("--batch-size", type=int, help="images computed at once (default 32, and 2 of a detector)")
    args = parser.parse_args(argv)
    if args.top < 1:
        raise errors.UserError(f"--top must be at least 1, got {args.top}.")
    paths = find_images(args.images)
    predictor = load_predictor(args, batch_size=args.batch_size)

    skipped = 0
    for path, result in with_progress(predictor.stream(paths), len(paths)):
        if isinstance(result, errors.UserError):
            skipped += 1
            skip(result)
            continue
        if isinstance(result, Detections):
            row, lines = {"image": str(path), "objects": result.rows()}, result.lines()
        else:
            results = Predictions(result[None], predictor.class_names)
            row, lines = {"image": str(path), "top": results.rows(args.top)[0]}, results.lines(args.top)[0]
        if args.json:
            print(json.dumps(row))
        else:
            print(path, *(f"  {line}" for line in lines), sep=os.linesep)
    return exit_code(skipped, len(paths))


if __name__ == "__main__":
    errors.run_cli(main)
