"""The tasks by name: `config.task`, and `task` in a checkpoint's spec."""

from collections.abc import Callable

from ml_collections import ConfigDict

from simam_jax.classification import task as classification
from simam_jax.detection import task as detection
from simam_jax.errors import unknown
from simam_jax.task import Task

TASKS: dict[str, Callable[[ConfigDict], Task]] = {
    "classification": classification.make_task,
    "detection": detection.make_task,
}


def make_task(config: ConfigDict) -> Task:
    """The task that `config` describes.

    Raises:
        UserError: an unknown task, or anything in the config that cannot be done.
    """
    if config.task not in TASKS:
        raise unknown("config.task", config.task, TASKS)
    return TASKS[config.task](config)
