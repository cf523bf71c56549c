"""Which checkpoints of a run stay, and how it goes on from them."""

import contextlib
import logging
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as policies

from simam_jax import errors
from simam_jax.checkpoints import DamagedError, Meta, fingerprints, first_line, folder, newest_step, read
from simam_jax.training.state import TrainState, Tree


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


def split(state: TrainState) -> dict[str, Tree]:
    """The items of a checkpoint of `state`."""
    items = {"variables": state.variables, "ema": state.ema}
    items["training"] = {"step": state.step, "opt_state": state.opt_state, "key": state.key}
    return {name: item for name, item in items.items() if item is not None}


def join(items: dict[str, Tree]) -> TrainState:
    """The inverse of `split`."""
    return TrainState(variables=items["variables"], ema=items.get("ema"), **items["training"])


class Checkpointer:
    """The checkpoints of one run: the newest `keep_last` and the `keep_best` with the highest score stay."""

    def __init__(self, workdir: str | Path, *, keep_last: int, keep_best: int):
        self._folder = folder(workdir)
        self._manager = ocp.CheckpointManager(
            self._folder,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=policies.AnyPreservationPolicy(
                    [
                        policies.LatestN(keep_last),
                        policies.BestN(get_metric_fn=_score, n=keep_best, keep_checkpoints_without_metrics=False),
                    ]
                ),
                best_fn=_score,  # without it the manager forgets the metrics when it is opened again
                cleanup_tmp_directories=True,
            ),
        )

    def path(self, step: int) -> Path:
        return self._folder / str(step)

    def latest_step(self) -> int | None:
        return self._manager.latest_step()

    def best_step(self) -> int | None:
        return self._manager.best_step()

    def save(self, state: TrainState, meta: Meta, score: float | None = None) -> None:
        """Starts writing the checkpoint of `state.step`; returns when the state may be changed again.

        Args:
            state: the state.
            meta: JSON; the checksums are added.
            score: what "best" means, if known; higher is better.
        """
        step = int(state.step)
        if step in self._manager.all_steps():
            return
        items = split(state)
        meta = meta | {"step": step} | fingerprints(items)
        saved = {name: ocp.args.StandardSave(item) for name, item in items.items()}
        with self._writing():
            self._manager.save(
                step,
                args=ocp.args.Composite(meta=ocp.args.JsonSave(meta), **saved),
                metrics=None if score is None else {"score": score},
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
                f"A checkpoint could not be written, so the run has stopped: {first_line(error)}. {self.last_good()}. "
                f"Make room, then start the same command again."
            ) from error

    def last_good(self) -> str:
        """Where somebody whose run broke off goes on from."""
        step = newest_step(self._folder)
        return "There is no checkpoint yet" if step is None else f"The last complete checkpoint is {self.path(step)}"

    def restore(self, like: TrainState, spec: Mapping[str, Any]) -> tuple[TrainState, Meta] | None:
        """The newest complete and undamaged checkpoint, or None where there is none at all.

        A damaged one is reported, moved to `checkpoints/damaged/` and the one before is tried.

        Args:
            like: a state of the same shapes, whose shardings the result takes.
            spec: the model that the checkpoint must be of.

        Raises:
            UserError: it is of another model, every one is damaged, or it holds weights only.
        """
        steps = sorted(self._manager.all_steps(), reverse=True)
        for step in steps:
            try:
                items, meta = read(self.path(step), split(like), spec)
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


def _score(metrics: dict[str, float]) -> float:
    (score,) = metrics.values()  # by whatever name: older checkpoints have another
    return score
