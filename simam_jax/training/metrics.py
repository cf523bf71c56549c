"""What a run writes about itself: TensorBoard event files and log lines through CLU, and `metrics.jsonl`."""

import json
import resource
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

import jax
import numpy as np

Scalars = dict[str, float]


def memory_in_use() -> float:
    """Bytes in use on this process's first device; on CPU the process's largest resident size."""
    stats = jax.local_devices()[0].memory_stats()
    if stats and "bytes_in_use" in stats:
        return float(stats["bytes_in_use"])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0  # Linux counts it in KiB


class MetricWriter:
    """Writes scalars to all places and images to TensorBoard; on processes other than the first it does nothing."""

    def __init__(self, workdir: Path, hyper_parameters: Mapping[str, Any]):
        self._active = jax.process_index() == 0
        if not self._active:
            return
        from clu import metric_writers  # brings TensorFlow, which models and steps do without

        from simam_jax.data import tensorflow_cpu  # noqa: F401  keeps TensorFlow off the GPUs

        self._lines = _appended(workdir / "metrics.jsonl")
        self._boards = metric_writers.create_default_writer(str(workdir), asynchronous=False)
        self._boards.write_hparams(flat(hyper_parameters))

    def write(self, step: int, epoch: float, scalars: Scalars) -> None:
        """Writes `scalars` as those after `step` updates."""
        if not self._active:
            return
        self._lines.write(json.dumps({"step": step, "epoch": epoch, "time": time.time()} | scalars) + "\n")
        self._boards.write_scalars(step, scalars)
        self._boards.flush()

    def write_images(self, step: int, images: Mapping[str, np.ndarray]) -> None:
        """Writes pictures, uint8 (N, H, W, 3) by name, to the event file."""
        if self._active:
            self._boards.write_images(step, images)
            self._boards.flush()

    def close(self) -> None:
        if self._active:
            self._boards.close()
            self._lines.close()


def _appended(path: Path) -> TextIO:
    """The file of records, open behind the last whole one: what a kill cut off goes."""
    with path.open("ab+") as file:
        file.seek(0)
        content = file.read()
        file.truncate(content.rfind(b"\n") + 1)
    return path.open("a", buffering=1)


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, bool | int | float | str]:
    """Nested settings as one level of `outer.inner` names, with values that TensorBoard shows."""
    result: dict[str, bool | int | float | str] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            result |= flat(value, f"{prefix}{name}.")
        else:
            result[prefix + name] = value if isinstance(value, bool | int | float | str) else str(value)
    return result
