"""A `Task`: what a run needs to know of what is learned, as data and functions.

The loop, the update, evaluation, checkpoints and metrics are written once, in `simam_jax/training/`, for whatever a `Task`
describes. To add one, write a function from a config to a `Task` and name it in `simam_jax/tasks.py`.
"""

import pathlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import jax
import numpy as np

AXIS = "data"  # the mesh axis that batches are sharded over

Tree = Any
Batch = Mapping[str, Any]  # arrays by name, the images along the first axis: NumPy's on the host, JAX's on devices
Sums = dict[str, tuple[jax.Array, jax.Array]]  # name -> (sum, count) over examples: only sums and counts are added up
Scores = dict[str, float]
Path = tuple[str, ...]  # of a parameter: ("layer1_0", "conv1", "kernel")


class Evaluator(Protocol):
    """Collects one pass over the evaluation set, on the host."""

    def add(self, outputs: Tree) -> None:
        """Takes what `Task.measure` gave for some images: NumPy arrays, a row an image, of all hosts, without padding."""
        ...

    def scores(self) -> Scores:
        """The scores over all images so far."""
        ...

    def write(self, folder: pathlib.Path) -> None:
        """Writes what others can score again into a folder, if there is any such form."""
        ...


@dataclass(frozen=True, kw_only=True)
class Task:
    """What is learned.

    Attributes:
        spec: JSON that stands in every checkpoint: `task` (a name in `simam_jax.tasks`), `model` (the arguments that make
            the network again) and what else is needed to use the network, such as class names and preprocessing.
        title: a few words for the first line of a run.
        num_train, num_eval: images in the two sets.
        best: the score (a key of the evaluator's scores) by which checkpoints are compared, such as "top1"; higher is better.
        example: for each shape of batch one row of a training batch, by name, as shapes without the first axis.
        shapes: shapes and dtypes of the variables, `{"params": ..., "batch_stats": ...}`.
        init: from a key to the variables before the first update.
        train_batches: from an update's index to the endless batches of this host from that update on.
        eval_batches: the batches of this host of one pass over the evaluation set. Each holds `mask`, float32 (N,), which
            is 0 for rows that only fill up.
        loss: from (variables, batch, key) to (loss, (batch_stats, sums)), for one device's part of a batch inside
            `jax.shard_map` over `AXIS`: the mean loss over these images, the new batch statistics ({} if there are none
            or they are fixed) and other sums to report.
        measure: from (variables, batch) to arrays with a row an image, for one device's part of an evaluation batch.
        evaluator: makes an `Evaluator` for one pass.
        check_meta: raises `UserError` where a checkpoint with such meta data must not be scored or continued, beyond another
            `model`, which is always refused.
        describe: from scores, or means of the sums of `loss`, to one line for people.
        costs: rows for `--mode check`, name -> text: what the network is and what it costs.
        trainable: whether the parameter at a path is trained. One that is not has no gradient, no decay and no optimizer
            state, and never changes.
        batch_statistics: whether an update normalises by statistics of its own batch.
        images_of: from an update's index to the names of its images, for messages; None: they are not known.
        compiler_options: of XLA, for the programs that train and measure.
        pictures: from variables on one device to pictures for TensorBoard, uint8 (N, H, W, 3) by name; None: there are
            none. Called on the first process only.
    """

    spec: Mapping[str, Any]
    title: str
    num_train: int
    num_eval: int
    best: str
    example: tuple[Mapping[str, jax.ShapeDtypeStruct], ...]
    shapes: Callable[[], Tree]
    init: Callable[[jax.Array], Tree]
    train_batches: Callable[[int], Iterator[Batch]]
    eval_batches: Callable[[], Iterator[Batch]]
    loss: Callable[[Tree, Batch, jax.Array], tuple[jax.Array, tuple[Tree, Sums]]]
    measure: Callable[[Tree, Batch], Tree]
    evaluator: Callable[[], Evaluator]
    describe: Callable[[Scores], str]
    check_meta: Callable[[Mapping[str, Any]], None] = lambda _meta: None
    costs: Callable[[], Mapping[str, str]] = dict
    trainable: Callable[[Path], bool] = lambda _path: True
    batch_statistics: bool = True
    images_of: Callable[[int], str] | None = None
    compiler_options: dict[str, Any] = field(default_factory=dict)
    pictures: Callable[[Tree], Mapping[str, np.ndarray]] | None = None


def eval_batch_size(config: Any) -> int:
    """Images of an evaluation batch over all devices: as the run's `config` asks for, rounded up to share them equally."""
    wanted, devices = config.eval_batch_size or config.batch_size, jax.device_count()
    return -(-wanted // devices) * devices


class MeanEvaluator:
    """An `Evaluator` for measures that are numbers, (N,) by name: their means over all images."""

    def __init__(self) -> None:
        self._sums: dict[str, float] = {}
        self._count = 0

    def add(self, outputs: Mapping[str, np.ndarray]) -> None:
        for name, values in outputs.items():
            self._sums[name] = self._sums.get(name, 0.0) + float(np.sum(values, dtype=np.float64))
        self._count += len(next(iter(outputs.values())))

    def scores(self) -> Scores:
        return {name: total / max(self._count, 1) for name, total in self._sums.items()}

    def write(self, folder: pathlib.Path) -> None:
        """Nothing: the means are all there is."""
