"""Paths as people write them: `~` is their home, and an address of the network is no path."""

import os
from pathlib import Path

from simam_jax.errors import UserError


def local(path: str | os.PathLike[str]) -> Path:
    """The path with `~` expanded.

    Raises:
        UserError: it is an address such as gs://bucket/run, which would be made a folder `gs:` here.
    """
    if "://" in str(path):
        raise UserError(
            f"{path} is an address: name a path of this machine's file systems (a bucket can be mounted or copied)."
        )
    return Path(path).expanduser()
