"""The order of classifiers' records: a function of seed, epoch and position, so that resuming is starting a range later."""

import numpy as np

from simam_jax.data.tensorflow_cpu import tf


def training_order(num_examples: int, seed: int, first_row: int) -> tf.data.Dataset:
    """Without end, (epoch, index) of row `first_row` and those after it, each int64: every epoch is a permutation."""
    first_epoch, first_place = divmod(first_row, num_examples)

    def of_epoch(epoch: tf.Tensor) -> tf.data.Dataset:
        start = tf.where(epoch == first_epoch, tf.constant(first_place, tf.int64), 0)
        order = permutation(num_examples, seed, epoch)[start:]
        return tf.data.Dataset.from_tensor_slices((tf.fill(tf.shape(order), epoch), order))

    return tf.data.Dataset.range(first_epoch, np.iinfo(np.int64).max).flat_map(of_epoch)


def permutation(num_examples: int, seed: int, epoch: tf.Tensor) -> tf.Tensor:
    """The order of an epoch, int64 (num_examples,)."""
    key = tf.stack((tf.constant(seed, tf.int64), -1 - epoch))  # negative: no example's key
    noise = tf.random.stateless_uniform((num_examples,), key, tf.int64.min, tf.int64.max, tf.int64, alg="philox")
    return tf.cast(tf.argsort(noise, stable=True), tf.int64)


def evaluation_order(num_examples: int, first_row: int, num_rows: int) -> tf.data.Dataset:
    """(0, index) of the rows from `first_row` up to `num_rows`; beyond the last example that one again."""
    places = tf.data.Dataset.range(first_row, num_rows)
    return places.map(lambda place: (tf.zeros_like(place), tf.minimum(place, num_examples - 1)))


def rows_of_host(rows: tf.data.Dataset, share: int, process_index: int, process_count: int) -> tf.data.Dataset:
    """Of every global batch the part of this host."""
    return rows.batch(share).shard(process_count, process_index).unbatch()
