"""Where images come from: for every source, how to get from an example's index to its encoded bytes and label.

Reading is TensorFlow ops alone. A Python function inside tf.data would hold the interpreter's lock on every core, and
deadlocks a process that ends while an endless stream is open.
"""

import difflib
import functools
import io
import os
import struct
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from ml_collections import ConfigDict

from simam_jax import errors
from simam_jax.data.tensorflow_cpu import tf
from simam_jax.errors import UserError

SYNTHETIC_CLASSES = 1000
SYNTHETIC_EXAMPLES = {"train": 12_800, "validation": 1_000, "test": 1_000}


@dataclass(frozen=True)
class Split:
    """Random access to the examples of one split."""

    num_examples: int
    class_names: tuple[str, ...]
    read: Callable[[tf.Tensor], tuple[tf.Tensor, tf.Tensor]]  # int64 index -> encoded image, int32 label
    name: Callable[[int], str]  # index -> what a message calls it


def open_split(config: ConfigDict, split: str) -> Split:
    """Opens a split of the source that `config` (the section config.data) names. Raises UserError, see the sources."""
    if config.source not in SOURCES:
        raise errors.unknown("config.data.source", config.source, SOURCES)
    opened = SOURCES[config.source](config, split)
    if not opened.num_examples:
        raise UserError(f"The split {split!r} of {config.source} {config.name} has no examples.")
    return opened


def _open_tfds(config: ConfigDict, split: str) -> Split:
    import tensorflow_datasets as tfds

    try:
        builder = tfds.builder(config.name, data_dir=config.data_dir or None)
    except tfds.core.registered.DatasetNotFoundError:
        name = config.name.partition(":")[0].partition("/")[0]
        near = difflib.get_close_matches(name, tfds.list_builders(), n=1, cutoff=0.5)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise UserError(f"TFDS knows no data set {config.name!r} (config.data.name).{hint}") from None
    except AssertionError as error:  # a version that the data set does not offer
        raise UserError(f"config.data.name={config.name!r}: {error}") from None
    if not builder.info.splits:
        where = f" --data_dir {config.data_dir}" if config.data_dir else ""
        raise UserError(
            f"The TFDS data set {config.name!r} is not prepared in {builder.data_dir}. Prepare it once with: "
            f"python -m simam_jax.data.prepare {config.name}{where}"
        )
    return _builder_split(builder, split)


def _open_digits(config: ConfigDict, split: str) -> Split:
    import tensorflow_datasets as tfds

    from simam_jax.data.digits import Digits

    builder = Digits(data_dir=config.data_dir or None)
    if not builder.info.splits:
        tfds.disable_progress_bar()
        builder.download_and_prepare(download_config=tfds.download.DownloadConfig(try_download_gcs=False))
    return _builder_split(builder, split)


def _builder_split(builder, split: str) -> Split:
    """A split of a prepared TFDS builder with the features `image` and `label`."""
    import tensorflow_datasets as tfds

    try:
        info = builder.info.splits[split]
    except (KeyError, ValueError):
        raise errors.unknown(f"split of {builder.info.full_name}", split, builder.info.splits) from None
    features = dict(builder.info.features)
    if not (
        isinstance(features.get("image"), tfds.features.Image)
        and isinstance(features.get("label"), tfds.features.ClassLabel)
    ):
        raise UserError(
            f"{builder.info.full_name} is no classification data set: it needs the features 'image' (Image) and "
            f"'label' (ClassLabel), and has {', '.join(features)}."
        )
    if builder.info.file_format is not tfds.core.FileFormat.TFRECORD:
        raise UserError(
            f"{builder.data_dir} was prepared as {builder.info.file_format.value}; only tfrecord, TFDS's default, can be "
            f"read. Prepare it again: python -m simam_jax.data.prepare {builder.info.full_name} --data_dir ANOTHER_DIR"
        )
    files = [file.filename for file in info.file_instructions]
    offsets = [_record_offsets(file.filename)[file.skip : file.skip + file.take] for file in info.file_instructions]
    shard_of = np.repeat(np.arange(len(files), dtype=np.int32), [len(shard) for shard in offsets])
    record = _record_reader(files, shard_of, np.concatenate(offsets))
    fields = {"image": tf.io.FixedLenFeature((), tf.string), "label": tf.io.FixedLenFeature((), tf.int64)}

    def read(index: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        example = tf.io.parse_single_example(record(index), fields)
        return example["image"], tf.cast(example["label"], tf.int32)

    def name(index: int) -> str:
        return f"example {index} of {split!r} in {builder.data_dir} (file {files[shard_of[index]]})"

    return Split(len(shard_of), tuple(features["label"].names), read, name)


def _record_reader(files: list[str], shard_of: np.ndarray, offsets: np.ndarray) -> Callable[[tf.Tensor], tf.Tensor]:
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


@functools.cache
def _record_offsets(path: str) -> np.ndarray:
    """Where each record of a TFRecord file begins, int64 (records,)."""
    offsets, offset = [], 0
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        while offset < size:
            offsets.append(offset)
            header = os.pread(file.fileno(), 8, offset)
            offset += struct.unpack("<Q", header)[0] + 16  # the length and the data, each with a checksum of 4 bytes
    return np.array(offsets, np.int64)


def _open_synthetic(config: ConfigDict, split: str) -> Split:
    if split not in SYNTHETIC_EXAMPLES:
        raise errors.unknown("split of the source 'synthetic'", split, SYNTHETIC_EXAMPLES)
    pixels = np.random.default_rng(0).integers(0, 256, (16, config.image_size, config.image_size, 3), np.uint8)
    # BMP: decoding is little more than a copy, so that a benchmark measures what comes after the data.
    images = tf.constant([_bmp(image) for image in pixels])
    names = tuple(f"class {i}" for i in range(SYNTHETIC_CLASSES))

    def read(index: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        return images[index % len(pixels)], tf.cast(index % SYNTHETIC_CLASSES, tf.int32)

    return Split(SYNTHETIC_EXAMPLES[split], names, read, lambda index: f"synthetic image {index}")


def _bmp(pixels: np.ndarray) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "BMP")
    return buffer.getvalue()


SOURCES: dict[str, Callable[[ConfigDict, str], Split]] = {
    "tfds": _open_tfds,
    "digits": _open_digits,
    "synthetic": _open_synthetic,
}
