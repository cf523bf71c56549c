"""Batches of classifiers' records: read and decoded in tf.data's threads, in order; what cannot be read is replaced or an error."""

import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from simam_jax.data import Batch, host_share, order
from simam_jax.data.classification_sources import Records
from simam_jax.data.tensorflow_cpu import tf
from simam_jax.data.unreadable import Unreadable

Decode = Callable[[dict[str, tf.Tensor], tf.Tensor], dict[str, tf.Tensor]]  # record, key int64 () -> a row of a batch
# What TensorFlow raises for a file that is gone, locked, cut short or no image.
UNREADABLE = (
    tf.errors.InvalidArgumentError,
    tf.errors.DataLossError,
    tf.errors.NotFoundError,
    tf.errors.PermissionDeniedError,
    tf.errors.UnknownError,
)


def train_batches(
    records: Records,
    decode: Decode,
    *,
    seed: int,
    start_step: int,
    batch_size: int,
    prefetch: int,
    max_unreadable: float,
    process: tuple[int, int],
) -> Iterator[Batch]:
    """See `simam_jax.data.train_batches`."""
    share = host_share(batch_size, process[1])

    def rows(step: int) -> tf.data.Dataset:
        return order.rows_of_host(order.training_order(records.num_examples, seed, step * batch_size), share, *process)

    unreadable = Unreadable(records.name, records.num_examples, max_unreadable)
    return _Stream(records, decode, rows, share, prefetch, unreadable).batches(start_step)


def eval_batches(
    records: Records, decode: Decode, *, batch_size: int, prefetch: int, process: tuple[int, int]
) -> Iterator[Batch]:
    """See `simam_jax.data.eval_batches`."""
    share, num_examples = host_share(batch_size, process[1]), records.num_examples
    num_rows = -(-num_examples // batch_size) * batch_size

    def rows(step: int) -> tf.data.Dataset:
        ordered = order.evaluation_order(num_examples, step * batch_size, num_rows)
        return order.rows_of_host(ordered, share, *process)

    unreadable = Unreadable(records.name, num_examples, max_unreadable=None)
    stream = _Stream(records, decode, rows, share, prefetch, unreadable)
    own_rows = process[0] * share + np.arange(share)
    for step, batch in enumerate(stream.batches(0)):
        yield {**batch, "mask": (step * batch_size + own_rows < num_examples).astype(np.float32)}


@dataclass
class _Stream:
    """The batches of one host.

    Attributes:
        records, decode, prefetch: as for `train_batches`.
        rows: from a step to the rows of this host from there on, each (epoch, index).
        share: rows a batch.
        unreadable: is told of each example that cannot be read.
    """

    records: Records
    decode: Decode
    rows: Callable[[int], tf.data.Dataset]
    share: int
    prefetch: int
    unreadable: Unreadable

    def batches(self, step: int) -> Iterator[Batch]:
        """The batches from `step` on."""
        # Traced once, however often an unreadable file makes the stream start anew.
        load = tf.function(self._load, autograph=False, input_signature=[tf.TensorSpec((), tf.int64)] * 2)
        following = self._from(step, load)
        while True:
            try:
                batch = next(following)
            except StopIteration:
                return
            except UNREADABLE:
                batch = self._mended(step, load)
                following = self._from(step + 1, load)
            yield batch
            step += 1

    def _load(self, epoch: tf.Tensor, index: tf.Tensor) -> dict[str, tf.Tensor]:
        return self.decode(self.records.read(index), epoch * 2**32 + index)

    def _from(self, step: int, load: Callable) -> Iterator[Batch]:
        loaded = self.rows(step).map(load, num_parallel_calls=os.cpu_count(), deterministic=True)
        options = tf.data.Options()
        # Its tuner can sleep through the end of an iterator, which then waits for it: up to a minute.
        options.autotune.enabled = False
        batches: Any = loaded.batch(self.share, drop_remainder=True).prefetch(self.prefetch).with_options(options)
        return batches.as_numpy_iterator()

    def _mended(self, step: int, load: Callable) -> Batch:
        """A batch with unreadable images, one by one."""
        keys = self.rows(step).take(self.share).as_numpy_iterator()
        rows = [self._next_readable(epoch, index, load) for epoch, index in keys]
        return {name: np.stack([row[name] for row in rows]) for name in rows[0]}

    def _next_readable(self, epoch: int, index: int, load: Callable) -> dict[str, np.ndarray]:
        """The example, or the next that can be read: so the stream stays a function of the files and the key."""
        while True:  # `report` raises when too many are unreadable
            try:
                row = load(tf.constant(epoch, tf.int64), tf.constant(index, tf.int64))
                return {name: x.numpy() for name, x in row.items()}
            except UNREADABLE as error:
                self.unreadable.report(index, reason(error))
                index = (index + 1) % self.records.num_examples


def reason(error: Exception) -> str:
    """What TensorFlow says is wrong, without where in its graph it noticed."""
    text = re.split(r"\n?\s*\[\[|\s*\[Op:", str(getattr(error, "message", error)))[0]
    noise = ("Graph execution error", "Detected at node", "File ")
    lines = [re.sub(r"\{\{[^}]*\}\}", "", line).strip() for line in text.splitlines()]
    useful = [line for line in lines if line and not line.startswith(noise)]
    return useful[-1] if useful else type(error).__name__
