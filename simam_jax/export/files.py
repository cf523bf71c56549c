"""What the exporters share: the formats, what they need, and files that are complete or not there."""

import contextlib
import importlib.util
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from simam_jax import errors
from simam_jax.paths import local

PLATFORMS = ("cpu", "cuda", "tpu")  # stablehlo and saved_model are lowered for each


class Format(NamedTuple):
    """Which packages writing and reading a format needs, and pip's extra with them."""

    packages: tuple[str, ...] = ()
    extra: str = "export"


FORMATS = {
    "stablehlo": Format(),
    "saved_model": Format(("tensorflow",), "train"),
    "onnx": Format(("onnx", "onnxruntime")),
}


def check(format: str, output: str | Path) -> None:
    """Checks what can be checked before the network is loaded.

    Raises:
        UserError: no such format, a package is missing, or `output` exists or has no folder.
    """
    if format not in FORMATS:
        raise errors.unknown("format", format, FORMATS)
    missing = [name for name in FORMATS[format].packages if importlib.util.find_spec(name) is None]
    if missing:
        raise errors.missing_package(" and ".join(missing), FORMATS[format].extra, f"The format {format}")
    output = local(output)
    if os.path.lexists(output):
        raise errors.UserError(f"{output} exists already: nothing was written. Name another output.")
    if not output.parent.is_dir():
        raise errors.UserError(f"There is no folder {output.parent} to write {output.name} into.")


@contextlib.contextmanager
def complete(output: str | Path) -> Iterator[Path]:
    """A path to write to, which becomes `output` at the end of the body; after an exception nothing is left.

    Raises:
        UserError: it cannot be written.
    """
    output = local(output)
    try:
        with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}.") as folder:
            written = Path(folder) / output.name
            yield written
            os.rename(written, output)
    except OSError as error:
        raise errors.UserError(f"{output} cannot be written: {error}") from error
