"""Which checkpoints of a run stay, and how it goes on from them."""

import contextlib
import itertools
import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from absl import logging
from jax.experimental import multihost_utils

from simam_jax import checkpoints, stored_arrays
from simam_jax.checkpoints import DamagedError, Meta
from simam_jax.errors import UserError
from simam_jax.training.quiet import quiet_orbax
from simam_jax.training.state import TrainState, Tree

TEMPORARY = ".orbax-checkpoint-tmp"  # in the name of a folder that Orbax has not completed


def split(state: TrainState) -> dict[str, Tree]:
    """The items of a checkpoint of `state`."""
    items = {"variables": state.variables, "ema": state.ema}
    items["training"] = {"step": state.step, "opt_state": state.opt_state, "key": state.key}
    return {name: item for name, item in items.items() if item is not None}


def join(items: dict[str, Tree]) -> TrainState:
    """The inverse of `split`."""
    return TrainState(variables=items["variables"], ema=items.get("ema"), **items["training"])


class Checkpointer:
    """The checkpoints of one run: the newest `keep_last` and the `keep_best` with the highest score stay.

    It writes in the background. The workdir is this run's alone: see `workdir.lock`.
    """

    def __init__(self, workdir: str | Path, *, keep_last: int, keep_best: int):
        self._folder = checkpoints.folder(workdir)
        self._keep_last, self._keep_best = max(keep_last, 1), keep_best
        self._first = jax.process_index() == 0  # the one that moves and removes
        self._folder.mkdir(parents=True, exist_ok=True)
        self._clear()
        self._scores = {step: _stored_score(self.path(step)) for step in checkpoints.steps(self._folder)}
        self._unchecked: int | None = None  # the step whose checkpoint is being written
        self._resources = contextlib.ExitStack()
        self._safe = self._resources.enter_context(stored_arrays.plain_path(self._folder))
        quiet_orbax()
        self._writer = ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler())

    def _clear(self) -> None:
        """Removes what was begun and not completed."""
        if self._first:
            for left_over in self._folder.glob(f"*{TEMPORARY}*"):
                shutil.rmtree(left_over, ignore_errors=True)

    def path(self, step: int) -> Path:
        """The folder of that step's checkpoint."""
        return self._folder / str(step)

    def latest_step(self) -> int | None:
        """The last step that has a checkpoint."""
        return checkpoints.newest_step(self._folder)

    def best_step(self) -> int | None:
        """The step of the checkpoint with the highest score; of equal ones the latest."""
        return next(reversed(self._by_score()), None)

    def save(self, state: TrainState, meta: Meta, score: float | None = None) -> None:
        """Starts writing the checkpoint of `state.step`; returns when the state may be changed again.

        Args:
            state: the state.
            meta: JSON; the step, the score, layouts and checksums are added.
            score: the value of `Task.best`, higher is better; None where no evaluation was made of this step.

        Raises:
            UserError: this save, or the one before, cannot be written.
        """
        self.wait()
        step = int(state.step)
        if os.path.lexists(self.path(step)):
            logging.warning("%s was in the way of a checkpoint and is now %s.", self.path(step), self._set_aside(step))
        contents = {**meta, "step": step, "score": score}
        with self._writing():
            self._writer.save(self._safe / str(step), args=checkpoints.arguments(contents, split(state)))
        self._unchecked, self._scores[step] = step, score

    def check(self) -> None:
        """Looks after the save in the background, without waiting for it.

        Raises:
            UserError: it has failed, or what it wrote is not complete.
        """
        if self._unchecked is None:
            return
        with self._writing():
            self._writer.check_for_errors()
        if self.path(self._unchecked).exists():
            self.wait()

    def wait(self) -> None:
        """Returns when all saves are written and found complete.

        Raises:
            UserError: one has failed.
        """
        if self._unchecked is None:
            return
        with self._writing():
            self._writer.wait_until_finished()
            if self._first:
                checkpoints.check_complete(self.path(self._unchecked))
        self._unchecked = None
        if self._first:
            self._remove_old()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # Orbax and TensorStore raise many kinds, also for a full disk
            with contextlib.suppress(Exception):
                self._writer.wait_until_finished()
            reason = error.reason if isinstance(error, DamagedError) else checkpoints.first_line(error)
            step, self._unchecked = self._unchecked, None
            if isinstance(error, DamagedError) and step is not None and self.path(step).exists():
                self.path(step).rename(self._aside(step))
            self._clear()
            raise UserError(
                f"A checkpoint could not be written, so the run has stopped: {reason}. {self._way_out()}"
            ) from error

    def _way_out(self) -> str:
        return f"{self.last_good()}. Make room, then start the same command again."

    def last_good(self) -> str:
        """Message naming the last complete checkpoint."""
        step = self.latest_step()
        return "There is no checkpoint yet" if step is None else f"The last complete checkpoint is {self.path(step)}"

    def restore(self, like: TrainState, spec: Mapping[str, Any]) -> tuple[TrainState, Meta] | None:
        """The newest complete and undamaged checkpoint, or None where there is none at all.

        A damaged one is reported, moved to `checkpoints/damaged/` and the one before is tried.

        Args:
            like: a state of the same shapes, whose shardings the result takes.
            spec: what the checkpoint must be of.

        Raises:
            UserError: it is of another spec, every one is damaged, or it holds weights only.
        """
        steps = checkpoints.steps(self._folder)
        for step in reversed(steps):
            path = self.path(step)
            try:
                checkpoints.check_name(path)
                items, meta = checkpoints.read(path, split(like), spec)
                return join(items), meta
            except DamagedError as error:
                aside = self._set_aside(step)
                logging.warning("%s It is now %s; going on from the one before.", error, aside)
        if steps:
            raise UserError(
                f"No checkpoint in {self._folder} can be read, because they are damaged; they are now in "
                f"{self._folder / 'damaged'}. Take another --workdir, or run the same command again to start from the "
                f"beginning."
            )
        return None

    def _aside(self, step: int) -> Path:
        """A name in `checkpoints/damaged/` that is free."""
        parent = self._folder / "damaged"
        parent.mkdir(exist_ok=True)
        names = itertools.chain([str(step)], (f"{step}-{number}" for number in itertools.count(1)))
        return next(parent / name for name in names if not os.path.lexists(parent / name))

    def _set_aside(self, step: int) -> Path:
        target = self._aside(step)
        self._everyone_is_here(f"set aside {step}")  # all have taken the same name
        if self._first:
            self.path(step).rename(target)
        self._everyone_is_here(f"have set aside {step}")
        self._scores.pop(step, None)
        return target

    @staticmethod
    def _everyone_is_here(name: str) -> None:
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices(name)

    def _by_score(self) -> list[int]:
        """The steps that have a score, the lowest one first."""
        scored = [(score, step) for step, score in self._scores.items() if score is not None and math.isfinite(score)]
        return [step for _, step in sorted(scored)]

    def _remove_old(self) -> None:
        steps = checkpoints.steps(self._folder)
        best = self._by_score()
        kept = {*steps[-self._keep_last :], *best[max(len(best) - self._keep_best, 0) :]}
        for step in set(steps) - kept:
            # By another name first: what is half removed is no checkpoint.
            old = self.path(step).rename(self._folder / f"{step}{TEMPORARY}-old")
            shutil.rmtree(old, ignore_errors=True)
        self._scores = {step: score for step, score in self._scores.items() if step in kept}

    def close(self) -> None:
        """Waits for the save in the background; whether it succeeds, `wait` says."""
        with contextlib.suppress(Exception):
            self._writer.close()
        self._resources.close()


def _stored_score(path: Path) -> float | None:
    with contextlib.suppress(Exception):  # a damaged one has none
        if not (path / "metrics").exists():
            return checkpoints.read(path, {})[1].get("score")
        (score,) = json.loads((path / "metrics" / "metrics").read_bytes()).values()  # in older checkpoints, by any name
        return float(score)
    return None
