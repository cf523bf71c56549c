"""Where images come from: for every source, how to get from an example's index to its encoded bytes and label."""

import difflib
import functools
import os
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from simam_jax import errors
from simam_jax.errors import UserError

SYNTHETIC_CLASSES = 1000
SYNTHETIC_EXAMPLES = {"train": 12_800, "validation": 1_000, "test": 1_000}


@dataclass(frozen=True)
class Split:
    """Random access to the examples of one split."""

    num_examples: int
    class_names: tuple[str, ...]
    read: Callable[[int], tuple[bytes, int]]  # index -> encoded image, label
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
    import tensorflow as tf
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
    record, num_examples = _records(info.file_instructions)

    def read(index: int) -> tuple[bytes, int]:
        example = tf.train.Example.FromString(record(index)).features.feature
        return example["image"].bytes_list.value[0], example["label"].int64_list.value[0]

    def name(index: int) -> str:
        return f"example {index} of {split!r} in {builder.data_dir}"

    return Split(num_examples, tuple(features["label"].names), read, name)


def _records(instructions) -> tuple[Callable[[int], bytes], int]:
    """Random access to the serialised examples of TFDS's shards, and their number."""
    tables = [_record_table(i.filename)[i.skip : i.skip + i.take] for i in instructions]
    starts = np.cumsum([0, *map(len, tables)])

    def record(index: int) -> bytes:
        shard = int(np.searchsorted(starts, index, side="right")) - 1
        offset, length = tables[shard][index - starts[shard]].tolist()
        # Opened anew each time: a thousand shards held open would pass the usual limit on open files.
        with open(instructions[shard].filename, "rb", buffering=0) as file:
            return os.pread(file.fileno(), length, offset)

    return record, int(starts[-1])


@functools.cache
def _record_table(path: str) -> np.ndarray:
    """Offset and length of every record of a TFRecord file, int64 (records, 2)."""
    rows, offset = [], 0
    with Path(path).open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        while offset < size:
            header = os.pread(file.fileno(), 8, offset)  # length; a checksum of 4 bytes before and after the data
            length = struct.unpack("<Q", header)[0]
            rows.append((offset + 12, length))
            offset += 12 + length + 4
    return np.array(rows, np.int64).reshape(-1, 2)


def _open_synthetic(config: ConfigDict, split: str) -> Split:
    if split not in SYNTHETIC_EXAMPLES:
        raise errors.unknown("split of the source 'synthetic'", split, SYNTHETIC_EXAMPLES)
    pixels = np.random.default_rng(0).integers(0, 256, (16, config.image_size, config.image_size, 3), np.uint8)
    # BMP: one memory copy to decode, so that a benchmark measures what comes after the data.
    images = [_bmp(image) for image in pixels]
    names = tuple(f"class {i}" for i in range(SYNTHETIC_CLASSES))

    def read(index: int) -> tuple[bytes, int]:
        return images[index % len(images)], index % SYNTHETIC_CLASSES

    return Split(SYNTHETIC_EXAMPLES[split], names, read, lambda index: f"synthetic image {index}")


def _bmp(pixels: np.ndarray) -> bytes:
    import io

    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "BMP")
    return buffer.getvalue()


SOURCES: dict[str, Callable[[ConfigDict, str], Split]] = {
    "tfds": _open_tfds,
    "digits": _open_digits,
    "synthetic": _open_synthetic,
}
