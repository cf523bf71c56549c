"""Images in, batches out: the only part of simam_jax that imports TensorFlow, and only once batches are asked for.

Every source keeps the same promises. The stream of training batches is a pure function of (seed, step): position
p = step * global_batch_size + i holds example `permutation(seed, epoch)[p % num_train]` of epoch p // num_train, and its
augmentation is keyed by (seed, epoch, example). Neither thread counts, nor timing, nor restarts matter, and a
stream that starts at step s never decodes what came before. Evaluation gives every example once, padding is masked.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from ml_collections import ConfigDict

from simam_jax.errors import UserError

Batch = dict[str, np.ndarray]


@dataclass(frozen=True)
class DatasetInfo:
    """What a trainer needs to know of a data set."""

    num_train: int
    num_eval: int
    num_classes: int
    class_names: tuple[str, ...]


def describe(config: ConfigDict) -> DatasetInfo:
    """Sizes and class names of `config`'s data set (the `config.data` section).

    Raises:
      UserError: unknown source or data set, or one that is not prepared on this machine.
    """
    from simam_jax.data import sources

    train, evaluation = (sources.open_split(config, split) for split in (config.train_split, config.eval_split))
    if train.class_names != evaluation.class_names:
        raise UserError(
            f"{config.train_split!r} has {len(train.class_names)} classes and {config.eval_split!r} "
            f"{len(evaluation.class_names)}, or other names: both need the same."
        )
    return DatasetInfo(train.num_examples, evaluation.num_examples, len(train.class_names), train.class_names)


def train_batches(
    config: ConfigDict,
    *,
    seed: int,
    start_step: int,
    global_batch_size: int,
    process_index: int | None = None,
    process_count: int | None = None,
) -> Iterator[Batch]:
    """The endless stream of this host's part of the training batches, from `start_step` on.

    Yields:
      `image` uint8 (N, H, W, 3) in 0..255 and `label` int32 (N,), N = global_batch_size / process_count; host h holds
      rows [h * N, (h + 1) * N) of the global batch. Unreadable images are replaced, named in a warning and counted.
    Raises:
      UserError: a batch that the hosts cannot share equally, an unknown setting, too many unreadable images.
    """
    from simam_jax.data import pipeline

    return pipeline.train_batches(config, seed, start_step, global_batch_size, *_process(process_index, process_count))


def eval_batches(
    config: ConfigDict,
    *,
    global_batch_size: int,
    process_index: int | None = None,
    process_count: int | None = None,
) -> Iterator[Batch]:
    """One pass over the evaluation set: as `train_batches`, and `mask` float32 (N,), 0 on rows that only fill up.

    Every host yields the same number of batches.

    Raises:
      UserError: also for an image that cannot be read; the message names it.
    """
    from simam_jax.data import pipeline

    return pipeline.eval_batches(config, global_batch_size, *_process(process_index, process_count))


def _process(index: int | None, count: int | None) -> tuple[int, int]:
    import jax

    return (
        jax.process_index() if index is None else index,
        jax.process_count() if count is None else count,
    )
