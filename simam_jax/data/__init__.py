"""Batches of classifiers' records, read by TensorFlow, which is imported once they are asked for.

Detectors' batches are made in `detection.pipeline`, in the order of `data.buckets`. Every source of records keeps the same
promises. The stream of training batches is a pure function of (seed, step): position
p = step * batch_size + i holds example `permutation(seed, epoch)[p % num_train]` of epoch p // num_train, and its
augmentation is keyed by (seed, epoch, example). Neither thread counts, nor timing, nor restarts matter, and a
stream that starts at step s never decodes what came before. Evaluation gives every example once, padding is masked.
"""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from simam_jax.data.classification_sources import Records, open_records
from simam_jax.errors import UserError

__all__ = ["Batch", "Records", "eval_batches", "host_share", "open_records", "train_batches"]

Batch = dict[str, np.ndarray]


def train_batches(
    records: Records,
    decode: Callable[[Any, Any], Any],
    *,
    seed: int,
    start_step: int,
    batch_size: int,
    prefetch: int = 2,
    max_unreadable: float = 0.0,
    process_index: int | None = None,
    process_count: int | None = None,
) -> Iterator[Batch]:
    """The endless stream of this host's part of the training batches, from `start_step` on.

    Args:
        records: of `open_records`.
        decode: TensorFlow ops from a record and a key (int64, of this showing of it) to a row of a batch.
        seed: of the order; `decode` has its own from the task.
        start_step: the first batch's index.
        batch_size: rows of a batch over all hosts.
        prefetch: batches made ahead.
        max_unreadable: fraction of the records that may be replaced by the next readable one.

    Yields:
        What `decode` gives, with N = batch_size / process_count rows; host h holds rows [h * N, (h + 1) * N) of the global
        batch. Unreadable records are replaced, named in a warning and counted.

    Raises:
        UserError: a batch that the hosts cannot share equally, or too many unreadable records.
    """
    from simam_jax.data import batches

    return batches.train_batches(
        records,
        decode,
        seed=seed,
        start_step=start_step,
        batch_size=batch_size,
        prefetch=prefetch,
        max_unreadable=max_unreadable,
        process=_process(process_index, process_count),
    )


def eval_batches(
    records: Records,
    decode: Callable[[Any, Any], Any],
    *,
    batch_size: int,
    prefetch: int = 2,
    process_index: int | None = None,
    process_count: int | None = None,
) -> Iterator[Batch]:
    """One pass over the records: as `train_batches`, and `mask` float32 (N,), 0 on rows that only fill up.

    Every host yields the same number of batches.

    Raises:
        UserError: also for a record that cannot be read; the message names it.
    """
    from simam_jax.data import batches

    process = _process(process_index, process_count)
    return batches.eval_batches(records, decode, batch_size=batch_size, prefetch=prefetch, process=process)


def host_share(batch_size: int, process_count: int) -> int:
    """How many rows of a global batch each host has."""
    if batch_size < 1 or batch_size % process_count:
        raise UserError(f"A batch of {batch_size} images cannot be divided among {process_count} hosts.")
    return batch_size // process_count


def _process(index: int | None, count: int | None) -> tuple[int, int]:
    import jax

    return (
        jax.process_index() if index is None else index,
        jax.process_count() if count is None else count,
    )
