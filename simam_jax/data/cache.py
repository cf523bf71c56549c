"""Arrays kept between runs in the user's cache folder."""

import contextlib
import hashlib
import os
import zipfile
from pathlib import Path

import numpy as np


def folder() -> Path:
    """The user's own cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "simam_jax" / "data"


def file(kind: str, key: str) -> Path:
    """The cache file of what `key` names; of another key it is another file."""
    return folder() / f"{kind}-{hashlib.sha256(os.fsencode(key)).hexdigest()[:32]}.npz"


def load(path: Path) -> dict[str, np.ndarray] | None:
    """What `save` wrote, if it is there and whole."""
    try:
        with path.open("rb") as file, np.load(file) as arrays:
            return dict(arrays)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile):
        return None


def save(path: Path, **arrays: np.ndarray) -> None:
    """Writes a cache file, whole or not at all; without a place to write there is just no cache."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.npz")
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez(partial, **arrays)  # pyright: ignore[reportArgumentType] (taken for its own arguments)
        partial.replace(path)
