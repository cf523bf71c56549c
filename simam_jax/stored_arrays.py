"""Arrays by name in a folder, as Orbax writes them, read by TensorStore alone.

Orbax answers one damaged file with a traceback for each array; TensorStore answers with one error.
"""

import contextlib
import re
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np


def read(folder: Path, names: Sequence[str]) -> list[np.ndarray]:
    """The arrays of these names, such as `params/conv1/kernel`; raises whatever TensorStore does."""
    import tensorstore

    with _open(folder) as store:
        keys = store.list().result()
        driver = "zarr3" if any(key.endswith(b"/zarr.json") for key in keys) else "zarr"
        places = [store.spec().to_json() | {"path": f"{name.replace('/', '.')}/"} for name in names]
        opening = [tensorstore.open({"driver": driver, "kvstore": place}, open=True, read=True) for place in places]
        reading = [each.result().read() for each in opening]
        return [each.result() for each in reading]


def count(folder: Path) -> int:
    """How many arrays the folder's index has. It reads none, and takes a millisecond."""
    with _open(folder) as store:
        return sum(key.endswith((b"/.zarray", b"/zarr.json")) for key in store.list().result())


@contextlib.contextmanager
def _open(folder: Path) -> Iterator[Any]:
    import tensorstore

    with plain_path(folder) as safe:
        base = {"driver": "file", "path": f"{safe}/"}
        yield tensorstore.KvStore.open({"driver": "ocdbt", "base": base}).result()


@contextlib.contextmanager
def plain_path(path: Path) -> Iterator[Path]:
    """A path to the folder `path` in which no character means anything: a link, where its own path is not so.

    Orbax and TensorStore take `[`, `*`, `?` and a backslash for patterns and `gs:/` for an address: what is written below
    a folder `lr[0.1]` would be incomplete.
    """
    if re.fullmatch(r"[\w/.,=+@-]{1,1000}", str(path), re.ASCII):
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="simam_jax-") as temporary:
        link = Path(temporary) / "folder"
        link.symlink_to(path, target_is_directory=True)
        yield link
