"""The format of checkpoints: written by Orbax, sealed with checksums, verified when they are read.

A checkpoint is a folder, in a run `WORKDIR/checkpoints/STEP/`. It holds items, which are trees of arrays (`variables`, which
inference needs; `ema`, their average, if the run keeps one; `training`, what else an update changes), and `meta`, JSON in
`meta/metadata`: the spec of what was trained, the step, of every item the names and shapes of its leaves, and checksums of
the items and of itself. This file knows no model and no task.
"""

import contextlib
import json
import re
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
from absl import logging

from simam_jax import stored_arrays
from simam_jax.errors import UserError
from simam_jax.fingerprints import checksum, differences, layout, layout_number
from simam_jax.paths import local
from simam_jax.task import Tree

FOLDER = "checkpoints"
WAY_OUT = "Take another --workdir (with --config.init_from to start from these weights)."
Meta = dict[str, Any]
T = TypeVar("T")


class DamagedError(UserError):
    """A checkpoint that cannot be read, that is not the one its name says, or that differs from what was written."""

    def __init__(self, path: Path, reason: str):
        super().__init__(f"The checkpoint {path} is damaged: {reason}.")
        self.reason = reason


# ---- meta data


def sealed(meta: Mapping[str, Any], items: Mapping[str, Tree]) -> Meta:
    """`meta` as plain JSON, with the layouts and checksums of `items` and the checksum of all that."""
    sums = {name: checksum(item) for name, item in items.items()}
    layouts = {name: layout(item) for name, item in items.items()}
    plain: Meta = json.loads(json.dumps({**meta, "layouts": layouts, "checksums": sums}))
    plain["checksums"]["meta"] = _checksum_of_json(plain)
    return plain


def _checksum_of_json(meta: Meta) -> int:
    return zlib.crc32(json.dumps(meta, sort_keys=True).encode())


# ---- where they are


def folder(workdir: str | Path) -> Path:
    """The folder of a run's checkpoints."""
    return Path(workdir).absolute() / FOLDER


def steps(checkpoints: Path) -> list[int]:
    """The steps of the checkpoints in that folder, ascending. Whatever else lies there is left out.

    Orbax gives a folder its name when it is complete.
    """
    children = checkpoints.iterdir() if checkpoints.is_dir() else ()
    return sorted(
        int(child.name) for child in children if re.fullmatch(r"0|[1-9][0-9]*", child.name) and child.is_dir()
    )


def newest_step(checkpoints: Path) -> int | None:
    """The last step of the checkpoints in that folder."""
    return max(steps(checkpoints), default=None)


def first_readable(path: str | Path, read_one: Callable[[Path], T]) -> T:
    """What `read_one` gives for the checkpoint that `path` means: a checkpoint itself, or the newest one of a workdir.

    In a workdir a damaged checkpoint is warned of, and the one before is read.

    Args:
        path: a workdir, its folder `checkpoints`, or a checkpoint.
        read_one: reads the checkpoint at a path; raises `DamagedError`.

    Raises:
        UserError: there is no checkpoint, or all are damaged.
    """
    path = local(path).absolute()
    if not path.exists():
        raise UserError(f"There is no checkpoint at {path}: no such folder.")
    inside = next((each for each in (folder(path), path) if each.name == FOLDER and each.is_dir()), None)
    if inside is None and (path / "meta").exists():
        return read_one(path)
    found = steps(inside) if inside else []
    if inside is None or not found:
        runs = sorted(each.name for each in path.iterdir() if folder(each).is_dir()) if path.is_dir() else []
        known = f" There are some in {', '.join(runs)}." if runs else ""
        raise UserError(f"There is no checkpoint in {path}.{known} Give the workdir of a run, or a checkpoint in it.")
    damaged: list[DamagedError] = []
    for step in reversed(found):
        try:
            check_name(inside / str(step))
            value = read_one(inside / str(step))
        except DamagedError as error:
            damaged.append(error)
            continue
        for error in damaged:
            logging.warning("%s Reading the one before.", error)
        return value
    raise UserError(f"No checkpoint in {inside} can be read. {damaged[0]}")


def newest(path: str | Path) -> Path:
    """The checkpoint meant by `path`, as in `first_readable`: the newest whose meta data are in order.

    Raises:
        UserError: there is none.
    """

    def read_one(checkpoint: Path) -> Path:
        _read_meta(checkpoint)
        return checkpoint

    return first_readable(path, read_one)


def check_name(path: Path) -> None:
    """Raises `DamagedError` unless the step inside the checkpoint is the one that its name says."""
    step = _read_meta(path).get("step", int(path.name))
    if step != int(path.name):
        raise DamagedError(path, f"it is that of step {step} under another name")


# ---- reading


def read_meta(path: str | Path) -> Meta:
    """The meta data of the checkpoint that `path` means, as in `first_readable`.

    Raises:
        UserError: there is none, or it cannot be read.
    """
    return first_readable(path, _read_meta)


def _read_meta(path: Path) -> Meta:
    try:
        meta = json.loads((path / "meta" / "metadata").read_bytes())
    except PermissionError as error:
        raise UserError(f"The checkpoint {path} cannot be read: {error}.") from error
    except (OSError, ValueError) as error:
        raise DamagedError(path, f"its meta data cannot be read: {first_line(error)}") from error
    fields = {"checksums": dict, "layouts": dict, "model": dict}
    if not isinstance(meta, dict) or any(not isinstance(meta.get(name), kind) for name, kind in fields.items()):
        raise DamagedError(path, "its meta data are not those of a checkpoint")
    sums = dict(meta["checksums"])
    if "meta" in sums:  # older checkpoints lack it
        seal = sums.pop("meta")
        if seal != _checksum_of_json(meta | {"checksums": sums}):
            raise DamagedError(path, "the checksum of its meta data differs")
    return meta


def read(path: Path, like: Mapping[str, Tree], spec: Mapping[str, Any] | None = None) -> tuple[dict[str, Tree], Meta]:
    """The items named in `like` and the meta data of a checkpoint.

    Args:
        path: the checkpoint.
        like: an item's name -> a tree of arrays or shapes, whose shapes, types and shardings the result has.
        spec: what the checkpoint must be of: `spec["model"]` is compared, and `spec["task"]` where both have one.

    Raises:
        DamagedError: it cannot be read, or it reads differently from what was written.
        UserError: it is of another spec, or its items are not like `like`.
    """
    meta = _read_meta(path)
    if spec is not None:
        _check_spec(path, meta, spec)
    _check_layouts(path, meta, like)
    items = {}
    for name, item in like.items():
        with _damage(path, name):
            arrays = stored_arrays.read(path / name, list(layout(item)))
        if checksum(arrays) != meta["checksums"].get(name):
            raise DamagedError(path, f"the checksum of its {name} differs")
        leaves, tree = jax.tree.flatten(item)
        items[name] = jax.tree.unflatten(tree, map(_placed, arrays, leaves))
    return items, meta


@contextlib.contextmanager
def _damage(path: Path, item: str) -> Iterator[None]:
    """Turns what TensorStore raises for an item into `DamagedError`, or `UserError` where the files are not to blame."""
    try:
        yield
    except Exception as error:  # of several kinds
        if isinstance(error, MemoryError) or re.search("RESOURCE_EXHAUSTED|PERMISSION_DENIED", str(error)):
            raise UserError(f"The checkpoint {path} cannot be read here: {first_line(error)}.") from error
        raise DamagedError(path, f"its {item} cannot be read: {first_line(error)}") from error


def _placed(array: np.ndarray, like: Any) -> jax.Array:
    sharding = getattr(like, "sharding", None) or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.make_array_from_callback(array.shape, sharding, lambda part: array[part])


def _check_spec(path: Path, meta: Meta, spec: Mapping[str, Any]) -> None:
    wanted = json.loads(json.dumps(dict(spec)))
    if "task" in meta and "task" in wanted and meta["task"] != wanted["task"]:
        raise UserError(
            f"The checkpoint {path} is of the task {meta['task']!r}, the config's is {wanted['task']!r}. {WAY_OUT}"
        )
    names = sorted(key for key in wanted["model"] if meta["model"].get(key) != wanted["model"][key])
    if names:
        held, asked = ({key: model.get(key) for key in names} for model in (meta["model"], wanted["model"]))
        raise UserError(f"The checkpoint {path} is of another model: it has {held}, the config says {asked}. {WAY_OUT}")


def _check_layouts(path: Path, meta: Meta, like: Mapping[str, Tree]) -> None:
    for name, item in like.items():
        if name not in meta["layouts"]:
            raise UserError(f"The checkpoint {path} holds no {name!r}, only {sorted(meta['layouts'])}. {WAY_OUT}")
        held, wanted = meta["layouts"][name], layout(item)
        if isinstance(held, int):  # older checkpoints have a number in place of the names
            same, which = held == layout_number(item), "other names or shapes (another optimizer, another EMA?)"
        else:
            same, which = held == wanted, differences(held, wanted)
        if not same:
            raise UserError(f"The {name!r} in the checkpoint {path} does not fit this config: {which}. {WAY_OUT}")


# ---- writing


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
    import orbax.checkpoint as ocp

    target = folder(workdir)
    if target.exists() and any(target.iterdir()):
        raise UserError(f"{target} has checkpoints already: nothing was written. Name another folder.")
    target.mkdir(parents=True, exist_ok=True)
    items = {"variables": variables}
    with stored_arrays.plain_path(target) as safe, ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as writer:
        writer.save(safe / "0", arguments({"step": 0, **spec, **meta}, items))
    check_complete(target / "0")


def arguments(meta: Mapping[str, Any], items: Mapping[str, Tree]) -> Any:
    """What Orbax is to write for a checkpoint: `items`, and `meta` sealed."""
    import orbax.checkpoint as ocp

    saved = {name: ocp.args.StandardSave(item) for name, item in items.items()}
    return ocp.args.Composite(meta=ocp.args.JsonSave(sealed(meta, items)), **saved)


def check_complete(path: Path) -> None:
    """Raises `DamagedError` unless what was written is there: the meta data, and each leaf in the index of its item.

    It costs milliseconds, because it reads no array.
    """
    check_name(path)
    for item, leaves in _read_meta(path)["layouts"].items():
        with _damage(path, item):
            found = stored_arrays.count(path / item)
        if found < len(leaves):
            raise DamagedError(path, f"its {item} has {found} of {len(leaves)} arrays")


def first_line(error: BaseException) -> str:
    """The error in one short line."""
    text = next(iter(str(error).strip().splitlines()), "").partition(" [source locations=")[0]
    if len(text) > 250:  # TensorStore gives the place first and the reason last
        text = f"{text[:120]} ... {text[-120:]}"
    return f"{type(error).__name__}: {text}".rstrip(". ")
