"""Records of TFDS data sets, which are prepared once as TFRecord files."""

import difflib
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from simam_jax import errors
from simam_jax.data.classification_sources import Records
from simam_jax.data.tensorflow_cpu import tf
from simam_jax.data.tfrecord import record_offsets, record_reader
from simam_jax.errors import UserError
from simam_jax.paths import local


def builder_of(name: str, data_dir: str):
    """The TFDS builder of `name`, which may carry a version ("imagenet2012:5.*.*"), or of an embedded one; prepared or not."""
    import tensorflow_datasets as tfds

    place = str(local(data_dir)) if data_dir else None
    if name == "digits":
        from simam_jax.data.digits import Digits

        return Digits(data_dir=place)
    if name == "digit_scenes":
        from simam_jax.data.digit_scenes import DigitScenes

        return DigitScenes(data_dir=place)
    try:
        return tfds.builder(name, data_dir=place)
    except tfds.core.DatasetNotFoundError:
        near = difflib.get_close_matches(name.partition(":")[0], tfds.list_builders(), n=1, cutoff=0.5)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise UserError(f"TFDS knows no data set {name!r} (config.data.name).{hint}") from None
    except AssertionError as error:  # a version that the data set does not offer
        raise UserError(f"TFDS data set {name!r} (config.data.name): {error}") from None


def open_prepared(config: ConfigDict, split: str) -> Records:
    """A split of a TFDS data set, which must be prepared."""
    return _records_of(prepared_builder(config), split)


def prepared_builder(config: ConfigDict):
    """The builder of the TFDS data set that `config` (the section config.data) names.

    Raises:
        UserError: it is unknown, or not prepared.
    """
    builder = builder_of(config.name, config.data_dir)
    if not builder.info.splits:
        where = f" --data_dir {config.data_dir}" if config.data_dir else ""
        raise UserError(
            f"The TFDS data set {config.name!r} is not prepared in {builder.data_dir}. Prepare it once with: "
            f"python -m simam_jax.data.prepare {config.name}{where}"
        )
    return builder


def open_digits(config: ConfigDict, split: str) -> Records:
    """A split of scikit-learn's digits, prepared on first use: that takes seconds and no download."""
    return _records_of(prepared("digits", config.data_dir), split)


def prepared(name: str, data_dir: str):
    """The builder of an embedded data set, prepared now if it has not been."""
    import tensorflow_datasets as tfds

    builder = builder_of(name, data_dir)
    if not builder.info.splits:
        tfds.disable_progress_bar()
        try:
            builder.download_and_prepare(download_config=tfds.download.DownloadConfig(try_download_gcs=False))
        except Exception:  # TFDS lets the file system's own errors through
            builder = builder_of(name, data_dir)
            if not builder.info.splits:  # not just another process that was quicker
                raise
    return builder


def _records_of(builder, split: str) -> Records:
    """A split of a prepared TFDS builder with the features `image` and `label`."""
    import tensorflow_datasets as tfds

    features = dict(builder.info.features)
    if not (
        isinstance(features.get("image"), tfds.features.Image)
        and isinstance(features.get("label"), tfds.features.ClassLabel)
    ):
        raise UserError(
            f"{builder.info.full_name} is no classification data set: it needs the features 'image' (Image) and "
            f"'label' (ClassLabel), and has {', '.join(features)}."
        )
    stored = stored_records(builder, split)
    fields = {"image": tf.io.FixedLenFeature((), tf.string), "label": tf.io.FixedLenFeature((), tf.int64)}

    def read(index: tf.Tensor) -> dict[str, tf.Tensor]:
        example = tf.io.parse_single_example(stored.record(index), fields)
        return {"image": example["image"], "label": tf.cast(example["label"], tf.int32)}

    return Records(stored.count, tuple(features["label"].names), read, stored.name)


class Stored(NamedTuple):
    """Random access to the serialized records of a split: how many, how to read one, and what a message calls it."""

    count: int
    record: Callable[[Any], Any]
    name: Callable[[int], str]
    files: list[str]


def stored_records(builder, split: str) -> Stored:
    """The records of a split of a prepared TFDS builder.

    Raises:
        UserError: an unknown split, or another file format than TFRecord.
    """
    import tensorflow_datasets as tfds

    try:
        info = builder.info.splits[split]
    except (KeyError, ValueError):
        raise errors.unknown(f"split of {builder.info.full_name}", split, builder.info.splits) from None
    if builder.info.file_format not in (None, tfds.core.FileFormat.TFRECORD):
        raise UserError(
            f"{builder.data_dir} was prepared as {builder.info.file_format.value}; only tfrecord, TFDS's default, can be "
            f"read. Prepare it again: python -m simam_jax.data.prepare {builder.info.full_name} --data_dir ANOTHER_DIR"
        )
    files = [file.filename for file in info.file_instructions]
    parts = zip(record_offsets(files), info.file_instructions, strict=True)
    offsets = [table[file.skip : file.skip + file.take] for table, file in parts]
    shard_of = np.repeat(np.arange(len(files), dtype=np.int32), [len(shard) for shard in offsets])
    record = record_reader(files, shard_of, np.concatenate(offsets))

    def name(index: int) -> str:
        return f"example {index} of {split!r} in {builder.data_dir} (file {files[shard_of[index]]})"

    return Stored(len(shard_of), record, name, files)
