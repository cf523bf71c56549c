"""Random access to the records of TFRecord files."""

import os
from collections.abc import Callable

import numpy as np

from simam_jax.data import cache
from simam_jax.data.tensorflow_cpu import tf


def record_reader(files: list[str], shard_of: np.ndarray, offsets: np.ndarray) -> Callable[[tf.Tensor], tf.Tensor]:
    """Random access to records of TFRecord files; a record with a wrong checksum raises."""
    file_table, shard_table, offset_table = tf.constant(files), tf.constant(shard_of), tf.constant(offsets)

    def record(index: tf.Tensor) -> tf.Tensor:
        # tf.data.TFRecordDataset does not show the op's byte offset.
        rest = tf.raw_ops.TFRecordDatasetV2(
            filenames=file_table[shard_table[index]][tf.newaxis],
            compression_type="",
            buffer_size=0,
            byte_offsets=offset_table[index][tf.newaxis],
        )
        kind = {"output_types": [tf.string], "output_shapes": [()]}
        first = tf.raw_ops.TakeDataset(input_dataset=rest, count=tf.constant(1, tf.int64), **kind)
        return tf.raw_ops.DatasetToSingleElement(dataset=first, **kind)[0]

    return record


def record_offsets(files: list[str]) -> list[np.ndarray]:
    """For each TFRecord file where its records begin, int64 (records,); kept in the user's cache folder."""
    states = [os.stat(file) for file in files]
    stamps = np.array([(state.st_size, state.st_mtime_ns) for state in states], np.int64)
    file_cache = cache.file("records", chr(0).join(files))
    saved = cache.load(file_cache)
    if saved and np.array_equal(saved["stamps"], stamps):
        return np.split(saved["offsets"], saved["ends"][:-1])

    tables = []
    for path in files:
        offsets, offset = [], 0
        with open(path, "rb", buffering=0) as file:
            # The length in 8 bytes, 4 bytes of checksum, the data, 4 bytes of checksum.
            while header := os.pread(file.fileno(), 8, offset):
                offsets.append(offset)
                offset += int.from_bytes(header, "little") + 16
        tables.append(np.array(offsets, np.int64))
    ends = np.cumsum([len(table) for table in tables])
    cache.save(file_cache, stamps=stamps, offsets=np.concatenate(tables), ends=ends)
    return tables
