"""What the commands that use a trained network share: naming it, finding images, showing progress."""

import argparse
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from simam_jax import errors
from simam_jax.inference import Predictor
from simam_jax.progress import duration

ENDINGS = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")


def find_images(paths: list[str]) -> list[Path]:
    """The files named, and in folders (and theirs) all whose ending is an image's, sorted.

    Raises:
        UserError: a path that is not there, or a folder without images.
    """
    found = []
    for path in map(Path, paths):
        if not path.is_dir():
            if not path.exists():
                raise errors.UserError(f"There is no file or folder {path}.")
            found.append(path)
            continue
        inside = sorted(p for p in path.rglob("*") if p.suffix.lower() in ENDINGS and p.is_file())
        if not inside:
            raise errors.UserError(f"There are no images in the folder {path} (looked for {', '.join(ENDINGS)}).")
        found += inside
    return found


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `load_predictor`."""
    parser.add_argument("--checkpoint", required=True, help="a workdir, a checkpoint in it, or a .pth.tar")
    parser.add_argument("--model", help="of a .pth.tar: the network's name, such as resnet50")
    parser.add_argument("--attention", default="simam", help="of a .pth.tar: none, simam (default), se or cbam")
    parser.add_argument(
        "--attention-param", type=float, help="of a .pth.tar: lambda or reduction; default: the paper's"
    )
    parser.add_argument("--class-names", help="a text file with one name a line; default: the checkpoint's")
    parser.add_argument("--ema", action="store_true", help="the exponential moving average of the weights")


def load_predictor(args: argparse.Namespace, **options) -> Predictor:
    """The `Predictor` that the command line names."""
    names = None
    if args.class_names:
        try:
            names = Path(args.class_names).read_text().splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise errors.UserError(f"--class-names={args.class_names} cannot be read: {error}") from error
    return Predictor.load(
        args.checkpoint,
        name=args.model,
        attention=args.attention,
        attention_param=args.attention_param,
        class_names=names,
        ema=args.ema,
        **options,
    )


def with_progress(results: Iterator, total: int) -> Iterator:
    """The same, with a line on a terminal that says how far it is; none where the results themselves are seen."""
    shown = sys.stderr.isatty() and not sys.stdout.isatty()
    start = time.monotonic()
    for done, result in enumerate(results, 1):
        if shown:
            left = (time.monotonic() - start) / done * (total - done)
            print(f"\r\x1b[K{done}/{total}  ETA {duration(left)}", end="", file=sys.stderr, flush=True)
        yield result
    if shown:
        print(file=sys.stderr)


def skip(error: errors.UserError) -> None:
    """Names an image that cannot be read; the command goes on with the others."""
    print(f"skipped: {error}", file=sys.stderr)


def exit_code(skipped: int, total: int) -> int:
    """1, after saying so, if images had to be skipped."""
    if skipped:
        print(f"{skipped} of {total} images could not be read.", file=sys.stderr)
    return 1 if skipped else 0
