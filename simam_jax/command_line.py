"""What the commands share: arguments that name a network, the search for images, progress, skipped images."""

import argparse
import collections
import glob
import itertools
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from simam_jax import errors
from simam_jax.compilation_cache import use_compilation_cache
from simam_jax.paths import local
from simam_jax.progress import duration

if TYPE_CHECKING:
    from simam_jax.inference import ClassifierPredictor, DetectorPredictor, Predictor

ENDINGS = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")


def add_network_arguments(parser: argparse.ArgumentParser, *, required: bool = False, of: str = "") -> None:
    """Adds `--model`, `--attention` and `--attention-param`, the first three arguments of `create_model`.

    Args:
        parser: takes the arguments.
        required: whether `--model` must be given.
        of: the help's first words, such as "of a .pth.tar: ".
    """
    parser.add_argument("--model", required=required, help=f"{of}the network's name, such as resnet50")
    parser.add_argument("--attention", default="simam", help=f"{of}none, simam (default), se or cbam")
    parser.add_argument(
        "--attention-param", type=float, help=f"{of}lambda of simam, reduction of se and cbam; default: the paper's"
    )


def add_checkpoint_arguments(
    parser: argparse.ArgumentParser, *, several: bool = False, default: str | None = None
) -> None:
    """Adds the arguments of `load_predictor`.

    Args:
        parser: takes the arguments.
        several: whether there may be more than one checkpoint.
        default: the checkpoint where none is named; None: one must be named.
    """
    more, action = ("; again for a second one", "append") if several else ("", "store")
    parser.add_argument(
        "--checkpoint",
        required=default is None,
        default=default,
        action=action,
        help=f"a workdir, a checkpoint in it, or a .pth.tar{more}",
    )
    add_network_arguments(parser, of="of a .pth.tar: ")
    parser.add_argument("--class-names", help="a text file with one name a line; default: the checkpoint's")
    parser.add_argument("--ema", action="store_true", help="the exponential moving average of the weights")
    parser.add_argument("--key", help="of a file with several: under which key the weights are")


def load_predictor(args: argparse.Namespace, **options) -> "Predictor":
    """The `Predictor` that the command line names.

    Raises:
        UserError: as `Predictor.load`, or `--class-names` cannot be read.
    """
    import PIL  # noqa: F401 - reads the images: if it is missing, say so before the weights are read

    from simam_jax.inference import Predictor

    names = read_class_names(args.class_names) if args.class_names else None
    return Predictor.load(
        args.checkpoint,
        name=args.model,
        attention=args.attention,
        attention_param=args.attention_param,
        class_names=names,
        ema=args.ema,
        key=args.key,
        **options,
    )


def load_classifier(args: argparse.Namespace) -> "ClassifierPredictor":
    """The classifier that the command line names.

    Raises:
        UserError: as `load_predictor`, or it is a detector.
    """
    from simam_jax.inference import ClassifierPredictor

    predictor = load_predictor(args)
    if not isinstance(predictor, ClassifierPredictor):
        raise errors.UserError(f"{args.checkpoint} is a detector, and this command is for classifiers.")
    return predictor


def load_detector(args: argparse.Namespace) -> "DetectorPredictor":
    """The detector that the command line names.

    Raises:
        UserError: as `load_predictor`, or it is a classifier.
    """
    from simam_jax.inference import DetectorPredictor

    predictor = load_predictor(args)
    if not isinstance(predictor, DetectorPredictor):
        raise errors.UserError(f"{args.checkpoint} is a classifier, and this command is for detectors.")
    return predictor


def read_class_names(path: str, count: int | None = None) -> list[str]:
    """The names in a text file, one a line.

    Raises:
        UserError: it cannot be read, or does not hold `count` names.
    """
    try:
        names = local(path).read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise errors.UserError(f"--class-names={path} cannot be read: {error}") from error
    if count is not None and len(names) != count:
        raise errors.UserError(f"--class-names={path} holds {len(names)} names for {count} classes.")
    return names


def find_images(paths: list[str], *, output: Path | None = None, endings: Sequence[str] = ENDINGS) -> list[Path]:
    """The files named, and of folders every file below whose ending is an image's, 2.jpg before 10.jpg.

    Args:
        paths: files, folders, and patterns such as `photos/*.jpg` or `photos/**/*.png`.
        output: a folder for pictures; where it lies within a folder that is named, its files are no images to look at.
        endings: of what is looked for in folders.

    Raises:
        UserError: a path is not there, or a folder has no images.
    """
    found = []
    left_out: collections.Counter[str] = collections.Counter()
    for path in itertools.chain.from_iterable(map(_expanded, paths)):
        if not path.is_dir():
            found.append(path)
            continue
        files = [file for file in path.rglob("*") if file.is_file() and not _is_hidden(file.relative_to(path))]
        if output and path.resolve() in output.resolve().parents:
            files = [file for file in files if output.resolve() not in file.resolve().parents]
        inside = sorted((file for file in files if file.suffix.lower() in endings), key=_natural)
        left_out.update(file.suffix or "without an ending" for file in set(files) - set(inside))
        if not inside:
            raise errors.UserError(f"There are no images in the folder {path} (looked for {', '.join(endings)}).")
        found += inside
    if left_out:
        kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(left_out.items()))
        print(f"left out: {kinds}", file=sys.stderr)
    return found


def _expanded(named: str) -> list[Path]:
    """The path, or where there is none what it is a pattern of."""
    path = local(named)
    if path.exists():
        return [path]
    if matches := glob.glob(str(path), recursive=True):
        return sorted(map(Path, matches), key=_natural)
    if glob.escape(named) != named:
        raise errors.UserError(f"There is no file or folder that the pattern {path} names.")
    raise errors.UserError(f"There is no file or folder {path}.")


def _natural(path: Path) -> list[list[str | int]]:
    """A key that sorts frame2 before frame10, folder by folder."""
    return [[int(x) if x.isdecimal() else x for x in re.split(r"(\d+)", part)] for part in path.parts]


def _is_hidden(path: Path) -> bool:
    """Whether a file, or a folder that it is in, has a name that begins with a dot."""
    return any(part.startswith(".") for part in path.parts)


def with_progress(results: Iterator, total: int) -> Iterator:
    """The same results, with a line that counts them on a terminal, unless the results themselves are printed there.

    A last line says how many there were and how long it took, with what had to be compiled first. `total` may be a guess.
    """
    shown = sys.stderr.isatty() and not sys.stdout.isatty()
    start, done = time.monotonic(), 0
    for done, result in enumerate(results, 1):
        if shown:
            passed, total = max(time.monotonic() - start, 1e-9), max(total, done)
            line = f"{done}/{total}  {done / passed:.1f} images/s  ETA {duration(passed / done * (total - done))}"
            print(f"\r\x1b[K{line}", end="", file=sys.stderr, flush=True)
        yield result
    if shown:
        print("\r\x1b[K", end="", file=sys.stderr)
    passed = max(time.monotonic() - start, 1e-9)
    images = "image" if done == 1 else "images"
    print(f"{done} {images} in {duration(passed)}, {done / passed:.1f} images/s", file=sys.stderr)


def run_compiling(main: Callable[[], int | None]) -> None:
    """Runs a command's `main` as `errors.run_cli` does, and keeps what it compiles for the next start."""
    use_compilation_cache()
    errors.run_cli(main)


def skip(error: errors.UserError) -> None:
    """Prints which image is skipped and why."""
    print(f"skipped: {error}", file=sys.stderr)


def exit_code(skipped: int, total: int) -> int:
    """1, after a line that counts them, if files were skipped; else 0."""
    if skipped:
        print(f"{skipped} of {total} files could not be read.", file=sys.stderr)
    return 1 if skipped else 0
