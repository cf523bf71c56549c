"""What the updates of a run measured, and where their time went."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from simam_jax import errors
from simam_jax.training import metrics
from simam_jax.training.run import Run

RUN_AHEAD = 2  # updates that the host may be ahead of the devices


class Meter:
    """Collects the metrics of updates, still on the devices, from one report to the next."""

    def __init__(self, run: Run, step: int):
        self._run = run
        self._values: list[Mapping[str, Any]] = []  # what the update function returned
        self._step = step  # of the last report
        self._updates = 0  # of this process; the first, which compiles, is not timed
        self._timed = 0  # since the last report
        self._waited = 0.0
        self._started = self._since = self._began = time.monotonic()

    def seconds_since_start(self) -> float:
        """Since this process began to train."""
        return time.monotonic() - self._started

    def wait_for(self, batches: Iterator[dict[str, jax.Array]]) -> dict[str, jax.Array]:
        """The next batch; the time until it is there counts as waiting for data."""
        asked = time.monotonic()
        batch = next(batches)
        self._waited += time.monotonic() - asked
        return batch

    def add(self, values: Mapping[str, Any]) -> None:
        """Takes in an update's metrics, and holds the host back when it is too far ahead of the devices."""
        self._values.append(values)
        if not self._updates:  # the first one compiled the program: the clock starts after it
            jax.block_until_ready(values)
            self._since = self._began = time.monotonic()
            self._waited = 0.0
        elif len(self._values) > RUN_AHEAD:
            jax.block_until_ready(self._values[-1 - RUN_AHEAD])
        self._timed += bool(self._updates)
        self._updates += 1

    def eta(self, step: int) -> float:
        """Seconds until the last update, at the pace so far, evaluations included."""
        return (time.monotonic() - self._began) / max(self._updates - 1, 1) * (self._run.num_steps - step)

    def report(self, step: int, last_good: Callable[[], str]) -> metrics.Scalars:
        """What is to be said of the updates since the last report.

        Raises:
            UserError: a loss or a gradient among them is not finite; the message ends with `last_good()`.
        """
        values = jax.device_get(self._values)
        for index, update in enumerate((each["scalars"] for each in values), self._step + 1):
            if not (np.isfinite(update["loss"]) and np.isfinite(update["grad_norm"])):
                images_of = self._run.task.images_of
                raise errors.UserError(
                    f"In update {index} the loss is {update['loss']:g} and the gradient's norm "
                    f"{update['grad_norm']:g}. Try a lower --config.schedule.learning_rate, a warm-up "
                    f"(--config.schedule.warmup_epochs), --config.optimizer.clip_global_norm=1 or "
                    f"--config.model.dtype=float32. {last_good()}."
                    + (f" The images of this update: {images_of(index - 1)}." if images_of else "")
                )
        scalars = {f"train/{name}": mean for name, mean in self._means(values).items()}
        scalars |= {name: float(x) for name, x in values[-1]["scalars"].items() if name != "loss"}
        if self._timed:
            seconds = time.monotonic() - self._since
            rate = self._timed * self._run.config.batch_size / seconds
            scalars |= {
                "images_per_second": rate,
                "images_per_second_per_device": rate / self._run.mesh.size,
                "step_seconds": seconds / self._timed,
                "data_wait_percent": 100.0 * self._waited / seconds,
                "eta_seconds": self.eta(step),
            }
        self._values, self._step, self._timed = [], step, 0
        return scalars | {"memory_bytes": metrics.memory_in_use()}

    @staticmethod
    def _means(values: Sequence[Mapping[str, Any]]) -> metrics.Scalars:
        """The mean loss over the updates, and the task's sums over their counts."""
        means = {"loss": float(np.mean([update["scalars"]["loss"] for update in values], dtype=np.float64))}
        for name in values[0]["sums"]:
            total, count = (sum(float(update["sums"][name][i]) for update in values) for i in (0, 1))
            means[name] = total / max(count, 1.0)
        return means

    def resume(self) -> None:
        """To be called before each update: what was done since the report (evaluation, saving) is not its time."""
        if not self._values:
            self._since, self._waited = time.monotonic(), 0.0
