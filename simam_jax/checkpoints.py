"""Checkpoints: `WORKDIR/checkpoints/STEP/`, written by Orbax in the background, kept by policy, verified when read.

Each holds up to four items: `variables` (what inference needs), `ema` (their average, if the run keeps one), `training`
(what else an update changes) and `meta` (JSON: the model, the config, the classes, the clock, a checksum of every item).
"""

import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from simam_jax import errors
from simam_jax.training.state import Tree

FOLDER = "checkpoints"
Meta = dict[str, Any]


def folder(workdir: str | Path) -> Path:
    return Path(workdir).absolute() / FOLDER


def checksum(tree: Tree) -> int:
    """CRC-32 of all leaves' bytes in the tree's order; the same on any number of devices."""
    crc = 0
    for leaf in jax.tree.leaves(jax.device_get(tree)):
        crc = zlib.crc32(np.asarray(leaf).tobytes(), crc)
    return crc


def layout(tree: Tree) -> int:
    """A fingerprint of the leaves' names, shapes and types: trees that differ in it cannot be exchanged."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    text = [f"{jax.tree_util.keystr(path)} {leaf.shape} {leaf.dtype}" for path, leaf in leaves]
    return zlib.crc32("\n".join(text).encode())


class DamagedError(Exception):
    """A checkpoint that cannot be read, or that reads differently from what was written."""


def fingerprints(items: dict[str, Tree]) -> Meta:
    return {
        "checksums": {name: checksum(item) for name, item in items.items()},
        "layouts": {name: layout(item) for name, item in items.items()},
    }


def read(path: Path, like: dict[str, Tree], spec: Mapping[str, Any] | None = None) -> tuple[dict[str, Tree], Meta]:
    """The items named in `like`, in its shapes and shardings, and the meta data of the checkpoint at `path`."""
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as reader:
        try:
            meta = reader.restore(path, ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"]
        except Exception as error:  # Orbax has no exception of its own for a damaged file
            raise DamagedError(f"its meta data cannot be read: {first_line(error)}") from error
        _check_fits(path, meta, like, spec)
        wanted = {name: ocp.args.StandardRestore(jax.tree.map(_abstract, item)) for name, item in like.items()}
        try:
            restored = reader.restore(path, ocp.args.Composite(**wanted)) if wanted else {}  # empty would mean: all
        except Exception as error:
            raise DamagedError(first_line(error)) from error
    items = {name: restored[name] for name in like}
    for name, item in items.items():
        if checksum(item) != meta["checksums"][name]:
            raise DamagedError(f"the checksum of its {name} differs")
    return items, meta


def _check_fits(path: Path, meta: Meta, like: dict[str, Tree], spec: Mapping[str, Any] | None) -> None:
    way_out = "Take another --workdir (with --config.init_from to start from these weights)."
    if spec is not None and meta["model"] != spec["model"]:
        names = sorted(key for key in spec["model"] if meta["model"].get(key) != spec["model"][key])
        held, asked = ({key: model.get(key) for key in names} for model in (meta["model"], spec["model"]))
        raise errors.UserError(
            f"The checkpoint {path} is of another model: it has {held}, the config says {asked}. {way_out}"
        )
    for name, item in like.items():
        if name not in meta["layouts"]:
            raise errors.UserError(
                f"The checkpoint {path} holds no {name!r}, only {sorted(meta['layouts'])}. {way_out}"
            )
        if meta["layouts"][name] != layout(item):
            raise errors.UserError(
                f"The {name!r} in the checkpoint {path} have other names or shapes than this config makes "
                f"(another optimizer, another EMA?). {way_out}"
            )


def _abstract(leaf: Any) -> jax.ShapeDtypeStruct:
    sharding = getattr(leaf, "sharding", None) or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"


def newest(path: str | Path) -> Path:
    """The checkpoint meant by `path`: a checkpoint itself, or the newest one of a workdir.

    Raises:
        UserError: there is none.
    """
    path = Path(path).absolute()
    if not path.exists():
        raise errors.UserError(f"There is no checkpoint at {path}: no such folder.")
    if (path / "meta").is_dir():
        return path
    inside = path if path.name == FOLDER else folder(path)
    step = newest_step(inside)
    if step is None:
        raise errors.UserError(
            f"There is no checkpoint in {path}. Give a --workdir of train.py, or a checkpoint in it."
        )
    return inside / str(step)


def newest_step(checkpoints: Path) -> int | None:
    """The last step of the complete checkpoints in that folder (Orbax renames a folder when it is complete)."""
    names = [child.name for child in checkpoints.iterdir()] if checkpoints.is_dir() else []
    return max((int(name) for name in names if name.isdigit()), default=None)


def read_meta(path: str | Path) -> Meta:
    """The meta data of the checkpoint that `path` means.

    Raises:
        UserError: there is none, or it cannot be read.
    """
    try:
        return read(newest(path), {})[1]
    except DamagedError as error:
        raise errors.UserError(f"The checkpoint {newest(path)} is damaged: {error}") from error


def write_weights(workdir: str | Path, spec: Mapping[str, Any], variables: Tree, **meta: Any) -> None:
    """Writes a workdir with `variables` as its only checkpoint, for `load`, `--mode eval` and `--config.init_from`.

    Args:
        workdir: a folder that is new or has no checkpoints.
        spec: what makes the network again: a `Task.spec`.
        variables: the model's.
        meta: what else is to be known: JSON.

    Raises:
        UserError: there are checkpoints already.
    """
    target = folder(workdir)
    if target.exists() and any(target.iterdir()):
        raise errors.UserError(f"{target} has checkpoints already: nothing was written. Name another folder.")
    contents = {"step": 0, **spec} | fingerprints({"variables": variables}) | meta
    items = ocp.args.Composite(variables=ocp.args.StandardSave(variables), meta=ocp.args.JsonSave(contents))
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as writer:
        writer.save(target / "0", items)
