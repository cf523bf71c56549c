"""Checkpoints: `WORKDIR/checkpoints/STEP/`, written by Orbax in the background, kept by policy, verified when read.

Each holds up to four items: `variables` (what inference needs), `ema` (their average, if the run keeps one), `training`
(what else an update changes) and `meta` (JSON: the model, the config, the classes, the clock, a checksum of every item).
"""

import contextlib
import logging
import shutil
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax import linen as nn
from orbax.checkpoint import checkpoint_managers as policies

from simam_jax import errors, models
from simam_jax.models.network import variable_shapes
from simam_jax.training.state import TrainState, Tree

FOLDER = "checkpoints"
Meta = dict[str, Any]


def folder(workdir: str | Path) -> Path:
    return Path(workdir).absolute() / FOLDER


def writable(workdir: str | Path) -> Path:
    """The folder `workdir`, made if it is not there.

    Raises:
        UserError: it cannot be made or written.
    """
    path = Path(workdir).absolute()
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise errors.UserError(f"--workdir={workdir} cannot be written: {error}. Name a folder that can.") from error
    return path


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


def split(state: TrainState) -> dict[str, Tree]:
    """The items of a checkpoint of `state`."""
    items = {"variables": state.variables, "ema": state.ema}
    items["training"] = {"step": state.step, "opt_state": state.opt_state, "key": state.key}
    return {name: item for name, item in items.items() if item is not None}


def join(items: dict[str, Tree]) -> TrainState:
    """The inverse of `split`."""
    return TrainState(variables=items["variables"], ema=items.get("ema"), **items["training"])


class Checkpoints:
    """The checkpoints of one run: the newest `keep_last` and the `keep_best` with the highest eval top-1 stay."""

    def __init__(self, workdir: str | Path, *, keep_last: int, keep_best: int):
        self._folder = folder(workdir)
        self._manager = ocp.CheckpointManager(
            self._folder,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=policies.AnyPreservationPolicy(
                    [
                        policies.LatestN(keep_last),
                        policies.BestN(get_metric_fn=_top1, n=keep_best, keep_checkpoints_without_metrics=False),
                    ]
                ),
                best_fn=_top1,  # without it the manager forgets the metrics when it is opened again
                cleanup_tmp_directories=True,
            ),
        )

    def path(self, step: int) -> Path:
        return self._folder / str(step)

    def latest_step(self) -> int | None:
        return self._manager.latest_step()

    def best_step(self) -> int | None:
        return self._manager.best_step()

    def save(self, state: TrainState, meta: Meta, top1: float | None = None) -> None:
        """Starts writing the checkpoint of `state.step`; returns when the state may be changed again.

        Args:
            state: the state.
            meta: JSON; the checksums are added.
            top1: eval top-1 in 0..1, if known: what "best" means.
        """
        step = int(state.step)
        if step in self._manager.all_steps():
            return
        items = split(state)
        meta = meta | {"step": step} | _seals(items)
        saved = {name: ocp.args.StandardSave(item) for name, item in items.items()}
        with self._writing():
            self._manager.save(
                step,
                args=ocp.args.Composite(meta=ocp.args.JsonSave(meta), **saved),
                metrics=None if top1 is None else {"top1": top1},
            )

    def check(self) -> None:
        """Raises `UserError` if a save in the background has failed."""
        with self._writing():
            self._manager.check_for_errors()

    def wait(self) -> None:
        """Returns when all saves are durable; raises `UserError` if one has failed."""
        with self._writing():
            self._manager.wait_until_finished()
            self._manager.check_for_errors()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # Orbax and TensorStore raise many kinds, also for a full disk
            # Orbax's other writes still run, fail too, and would each leave a traceback below the message.
            logging.getLogger("asyncio").setLevel(logging.CRITICAL)
            with contextlib.suppress(Exception):
                self._manager.wait_until_finished()
            raise errors.UserError(
                f"A checkpoint could not be written, so the run has stopped: {_first_line(error)}. {self.last_good()}. "
                f"Make room, then start the same command again."
            ) from error

    def last_good(self) -> str:
        """Where somebody whose run broke off goes on from."""
        step = newest_step(self._folder)
        return "There is no checkpoint yet" if step is None else f"The last complete checkpoint is {self.path(step)}"

    def restore(self, like: TrainState, model_spec: Meta) -> tuple[TrainState, Meta] | None:
        """The newest complete and undamaged checkpoint, or None where there is none at all.

        A damaged one is reported, moved to `checkpoints/damaged/` and the one before is tried.

        Args:
            like: a state of the same shapes, whose shardings the result takes.
            model_spec: the model that the checkpoint must be of.

        Raises:
            UserError: it is of another model, every one is damaged, or it holds weights only.
        """
        steps = sorted(self._manager.all_steps(), reverse=True)
        for step in steps:
            try:
                items, meta = _read(self.path(step), split(like), model_spec)
                return join(items), meta
            except DamagedError as error:
                logging.warning("Checkpoint %s is damaged (%s); trying the one before.", self.path(step), error)
                self._set_aside(step)
        if steps:
            raise errors.UserError(
                f"No checkpoint in {self._folder} can be read; they were moved to {self._folder / 'damaged'}. "
                f"Take another --workdir, or run the same command again to start from the beginning."
            )
        return None

    def _set_aside(self, step: int) -> None:
        if jax.process_index() == 0:
            target = self._folder / "damaged" / str(step)
            target.parent.mkdir(exist_ok=True)
            shutil.rmtree(target, ignore_errors=True)
            shutil.move(self.path(step), target)
        if jax.process_count() > 1:
            jax.experimental.multihost_utils.sync_global_devices("set aside")  # pyright: ignore
        self._manager.reload()

    def close(self) -> None:
        self._manager.close()


class DamagedError(Exception):
    """A checkpoint that cannot be read, or that reads differently from what was written."""


def _seals(items: dict[str, Tree]) -> Meta:
    return {
        "checksums": {name: checksum(item) for name, item in items.items()},
        "layouts": {name: layout(item) for name, item in items.items()},
    }


def _top1(metrics: dict[str, float]) -> float:
    return metrics["top1"]


def _read(path: Path, like: dict[str, Tree], model_spec: Meta | None = None) -> tuple[dict[str, Tree], Meta]:
    """The items named in `like`, in its shapes and shardings, and the meta data of the checkpoint at `path`."""
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as reader:
        try:
            meta = reader.restore(path, ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"]
        except Exception as error:  # Orbax has no exception of its own for a damaged file
            raise DamagedError(f"its meta data cannot be read: {_first_line(error)}") from error
        _check_fits(path, meta, like, model_spec)
        wanted = {name: ocp.args.StandardRestore(jax.tree.map(_abstract, item)) for name, item in like.items()}
        try:
            restored = reader.restore(path, ocp.args.Composite(**wanted)) if wanted else {}  # empty would mean: all
        except Exception as error:
            raise DamagedError(_first_line(error)) from error
    items = {name: restored[name] for name in like}
    for name, item in items.items():
        if checksum(item) != meta["checksums"][name]:
            raise DamagedError(f"the checksum of its {name} differs")
    return items, meta


def _check_fits(path: Path, meta: Meta, like: dict[str, Tree], model_spec: Meta | None) -> None:
    way_out = "Take another --workdir (with --config.init_from to start from these weights)."
    if model_spec is not None and meta["model"] != model_spec:
        names = sorted(key for key in model_spec if meta["model"].get(key) != model_spec[key])
        held, asked = ({key: spec.get(key) for key in names} for spec in (meta["model"], model_spec))
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


def _first_line(error: Exception) -> str:
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
        return _read(newest(path), {})[1]
    except DamagedError as error:
        raise errors.UserError(f"The checkpoint {newest(path)} is damaged: {error}") from error


def load(path: str | Path, *, ema: bool = False, model_spec: Meta | None = None) -> tuple[nn.Module, Tree]:
    """A trained network: `model, variables = load(path)`, then `model.apply(variables, images)`.

    Args:
        path: a workdir of train.py (its newest checkpoint) or a checkpoint in it (`WORKDIR/checkpoints/STEP`), written on
            any number of devices. The optimizer's state is not read.
        ema: the exponential moving average of the variables, where the run kept one.
        model_spec: what the checkpoint's meta data must say of its model, if that is known already.

    Returns:
        The linen module, and `{"params": ..., "batch_stats": ...}` on the first device of this process.

    Raises:
        UserError: there is no checkpoint, it is damaged or of another model, or `ema` is asked of a run without one.
    """
    path = newest(path)
    model = models.create_model(**read_meta(path)["model"])
    like = variable_shapes(model)
    item = "ema" if ema else "variables"
    try:
        items, _ = _read(path, {item: like}, model_spec)
    except DamagedError as error:
        raise errors.UserError(f"The checkpoint {path} is damaged: {error}") from error
    return model, items[item]


def save_weights(workdir: str | Path, model_spec: Meta, variables: Tree, **meta: Any) -> None:
    """Writes a workdir with `variables` as its only checkpoint, for `load`, `--mode eval` and `--config.init_from`.

    Args:
        workdir: a folder that is new or has no checkpoints.
        model_spec: name, num_classes, attention, attention_param and dtype (as text), as `create_model` takes them.
        variables: the model's.
        meta: what else is to be known: JSON.

    Raises:
        UserError: there are checkpoints already.
    """
    target = folder(workdir)
    if target.exists() and any(target.iterdir()):
        raise errors.UserError(f"{target} has checkpoints already: nothing was written. Name another folder.")
    contents = {"step": 0, "model": model_spec} | _seals({"variables": variables}) | meta
    items = ocp.args.Composite(variables=ocp.args.StandardSave(variables), meta=ocp.args.JsonSave(contents))
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as writer:
        writer.save(target / "0", items)
