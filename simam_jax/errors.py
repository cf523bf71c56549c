"""Errors of the user's making: one message that names the value and the way out, and no traceback."""

import contextlib
import difflib
import logging
import os
import sys
from collections.abc import Callable, Iterable, Iterator

# What `pip install simam-jax` does not bring: the module, its package, the extra that brings it (see pyproject.toml).
_EXTRAS = {
    "PIL": ("pillow", "predict"),
    "clu": ("clu", "train"),
    "cv2": ("opencv-python-headless", "detection"),
    "gradio": ("gradio", "demo"),
    "matplotlib": ("matplotlib", "predict"),
    "ml_collections": ("ml-collections", "train"),
    "msgspec": ("msgspec", "detection"),
    "onnx": ("onnx", "export"),
    "onnxruntime": ("onnxruntime", "export"),
    "optax": ("optax", "train"),
    "orbax": ("orbax-checkpoint", "predict"),
    "pycocotools": ("pycocotools", "detection"),
    "safetensors": ("safetensors", "torch"),
    "sklearn": ("scikit-learn", "train"),
    "tensorflow": ("tensorflow", "train"),
    "tensorflow_datasets": ("tensorflow-datasets", "train"),
    "torch": ("torch", "torch"),
}


class UserError(ValueError):
    """A wrong input. The message says what was given, what is accepted and what to do."""


class MissingPackageError(UserError):
    """A package that only an extra brings is not installed."""


def unknown(kind: str, value: object, known: Iterable[str]) -> UserError:
    """The error for a name that is in no table: names the nearest known one, then all of them (or the first 50)."""
    known = list(known)
    near = difflib.get_close_matches(str(value), known, n=1, cutoff=0.5)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    more = f" and {len(known) - 50} more" if len(known) > 50 else ""
    return UserError(f"Unknown {kind} {value!r}.{hint} Known: {', '.join(known[:50])}{more}.")


def missing_package(package: str, extra: str, what: str = "This") -> MissingPackageError:
    """The error for a package that is not installed: names the extra that brings it. `what` needs it."""
    return MissingPackageError(
        f"{what} needs {package}: pip install 'simam-jax[{extra}]' (in a checkout: pip install '.[{extra}]')."
    )


@contextlib.contextmanager
def naming_extras() -> Iterator[None]:
    """Turns the failed import of an optional package inside the block into the error of `missing_package`."""
    try:
        yield
    except ModuleNotFoundError as error:
        module = (error.name or "").partition(".")[0]
        if module not in _EXTRAS:
            raise
        raise missing_package(*_EXTRAS[module]) from error


@contextlib.contextmanager
def as_message() -> Iterator[None]:
    """Ends the process with 2 and the bare message of a `UserError`, or of a missing package, inside the block."""
    try:
        with naming_extras():
            yield
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")  # in one piece: other threads may be writing there
        sys.exit(2)


@contextlib.contextmanager
def _until_nobody_reads() -> Iterator[None]:
    """Ends the process with 141 (128 + SIGPIPE), as the shell's own commands, where what reads the output inside the block is gone."""
    try:
        try:
            yield
        finally:
            if sys.stdout:
                sys.stdout.flush()  # the interpreter would do so at its end, and complain
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is left
        sys.exit(141)


def run_cli(main: Callable[[], int | None]) -> None:
    """Runs a command's `main` and exits: 0 or what it returns; 2 with the bare message for a `UserError`.

    Where the program behind a pipe is gone (`| head -1`) it ends without a word. TensorFlow's errors are shown, its notices at the start are not: TF_CPP_MIN_LOG_LEVEL=0 shows them.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    logging.basicConfig(format="%(levelname)s: %(message)s")
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")  # reading images does not use it, and it announces itself
    with _until_nobody_reads(), as_message():
        sys.exit(main() or 0)
