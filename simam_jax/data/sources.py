"""Where images come from: for every source, how to get from an example's index to its encoded bytes and label.

Reading is TensorFlow ops alone. A Python function inside tf.data would hold the interpreter's lock on every core, and
deadlocks a process that ends while an endless stream is open.
"""

import contextlib
import difflib
import hashlib
import io
import os
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from simam_jax import errors
from simam_jax.data.tensorflow_cpu import tf
from simam_jax.errors import UserError

IMAGE_SUFFIXES = (".jpeg", ".jpg", ".png", ".bmp", ".gif")  # what TensorFlow decodes
SETTLED_NS = 2_000_000_000  # nanoseconds; file systems keep times no coarser than this
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


def tfds_builder(name: str, data_dir: str):
    """The TFDS builder of `name`, which may carry a version ("imagenet2012:5.*.*"), or of "digits"; prepared or not."""
    import tensorflow_datasets as tfds

    if name == "digits":
        from simam_jax.data.digits import Digits

        return Digits(data_dir=data_dir or None)
    try:
        return tfds.builder(name, data_dir=data_dir or None)
    except tfds.core.DatasetNotFoundError:
        near = difflib.get_close_matches(name.partition(":")[0], tfds.list_builders(), n=1, cutoff=0.5)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise UserError(f"TFDS knows no data set {name!r} (config.data.name).{hint}") from None
    except AssertionError as error:  # a version that the data set does not offer
        raise UserError(f"TFDS data set {name!r} (config.data.name): {error}") from None


def _open_tfds(config: ConfigDict, split: str) -> Split:
    builder = tfds_builder(config.name, config.data_dir)
    if not builder.info.splits:
        where = f" --data_dir {config.data_dir}" if config.data_dir else ""
        raise UserError(
            f"The TFDS data set {config.name!r} is not prepared in {builder.data_dir}. Prepare it once with: "
            f"python -m simam_jax.data.prepare {config.name}{where}"
        )
    return _builder_split(builder, split)


def _open_digits(config: ConfigDict, split: str) -> Split:
    """Prepared on first use: that takes seconds and no download."""
    import tensorflow_datasets as tfds

    builder = tfds_builder("digits", config.data_dir)
    if not builder.info.splits:
        tfds.disable_progress_bar()
        try:
            builder.download_and_prepare(download_config=tfds.download.DownloadConfig(try_download_gcs=False))
        except Exception:  # TFDS lets the file system's own errors through
            builder = tfds_builder("digits", config.data_dir)
            if not builder.info.splits:  # not just another process that was quicker
                raise
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
    if builder.info.file_format not in (None, tfds.core.FileFormat.TFRECORD):
        raise UserError(
            f"{builder.data_dir} was prepared as {builder.info.file_format.value}; only tfrecord, TFDS's default, can be "
            f"read. Prepare it again: python -m simam_jax.data.prepare {builder.info.full_name} --data_dir ANOTHER_DIR"
        )
    files = [file.filename for file in info.file_instructions]
    parts = zip(_record_offsets(files), info.file_instructions, strict=True)
    offsets = [table[file.skip : file.skip + file.take] for table, file in parts]
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


def _record_offsets(files: list[str]) -> list[np.ndarray]:
    """For each TFRecord file where its records begin, int64 (records,); kept in the user's cache folder."""
    states = [os.stat(file) for file in files]
    stamps = np.array([(state.st_size, state.st_mtime_ns) for state in states], np.int64)
    cache = _cache_folder() / f"records-{hashlib.sha256(os.fsencode(chr(0).join(files))).hexdigest()[:16]}.npz"
    saved = _load(cache)
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
    _save(cache, stamps=stamps, offsets=np.concatenate(tables), ends=ends)
    return tables


def _open_folder(config: ConfigDict, split: str) -> Split:
    """The classic tree: data_dir/SPLIT/CLASS/IMAGE, classes numbered in the order of their names."""
    if not config.data_dir:
        raise UserError("The source 'folder' needs config.data.data_dir: the folder that holds train/CLASS/*.JPEG.")
    root = Path(config.data_dir).expanduser().resolve()
    if not (root / split).is_dir():
        found = sorted(entry.name for entry in root.iterdir() if entry.is_dir()) if root.is_dir() else []
        raise errors.unknown(f"folder in {root}" if found else f"folder {root},", split, found or ["an existing one"])
    class_names, class_of, files = _folder_index(root / split)
    if not files:
        raise UserError(f"No images ({', '.join(IMAGE_SUFFIXES)}) in {root / split}/CLASS/.")
    label_table, name_table, class_table = tf.constant(class_of), tf.constant(files), tf.constant(class_names)

    def read(index: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        label = label_table[index]
        path = tf.strings.join((str(root / split), class_table[label], name_table[index]), os.sep)
        return tf.io.read_file(path), label

    def name(index: int) -> str:
        return str(root / split / class_names[class_of[index]] / files[index])

    return Split(len(files), tuple(class_names), read, name)


def _folder_index(root: Path) -> tuple[list[str], np.ndarray, list[str]]:
    """Class names, and for each image its class, int32, and file name.

    Listing a million files takes minutes on a network disk. A folder's modification time changes whenever a file comes
    or goes, so the list is kept in the user's cache folder and made anew only when one of those times has changed.
    """
    folders = sorted((entry for entry in os.scandir(root) if entry.is_dir()), key=lambda entry: entry.name)
    class_names = [folder.name for folder in folders]
    times = np.array([folder.stat().st_mtime_ns for folder in folders], np.int64)
    cache = _cache_folder() / f"folder-{hashlib.sha256(os.fsencode(root)).hexdigest()[:16]}.npz"
    saved = _load(cache)
    if saved and saved["class_names"].tolist() == class_names and np.array_equal(saved["times"], times):
        return class_names, saved["class_of"], saved["files"].tobytes().decode().split("\0")

    files, counts = [], []
    for folder in folders:
        names = sorted(entry.name for entry in os.scandir(folder) if entry.name.lower().endswith(IMAGE_SUFFIXES))
        files += names
        counts.append(len(names))
    class_of = np.repeat(np.arange(len(folders), dtype=np.int32), counts)
    # A folder changed a moment ago may change again without its time showing it.
    if files and time.time_ns() - times.max() > SETTLED_NS:
        blob = np.frombuffer("\0".join(files).encode(), np.uint8)
        _save(cache, class_names=np.array(class_names), times=times, class_of=class_of, files=blob)
    return class_names, class_of, files


def _cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "simam_jax" / "data"


def _load(path: Path) -> dict[str, np.ndarray] | None:
    """What `_save` wrote, if it is there and whole."""
    try:
        with path.open("rb") as file, np.load(file) as arrays:
            return dict(arrays)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile):
        return None


def _save(path: Path, **arrays: np.ndarray) -> None:
    """Writes a cache file, whole or not at all; without a place to write there is just no cache."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.npz")
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez(partial, **arrays)  # pyright: ignore[reportArgumentType] (taken for its own arguments)
        partial.replace(path)


def _open_synthetic(config: ConfigDict, split: str) -> Split:
    if split not in SYNTHETIC_EXAMPLES:
        raise errors.unknown("split of the source 'synthetic'", split, SYNTHETIC_EXAMPLES)
    pixels = np.random.default_rng(0).integers(0, 256, (16, config.image_size, config.image_size, 3), np.uint8)
    # BMP: decoding is little more than a copy, so that a benchmark measures what comes after the data.
    images = tf.constant([_bmp(image) for image in pixels])
    names = tuple(f"class {i}" for i in range(SYNTHETIC_CLASSES))

    def read(index: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        return images[tf.math.floormod(index, len(pixels))], tf.cast(
            tf.math.floormod(index, SYNTHETIC_CLASSES), tf.int32
        )

    return Split(SYNTHETIC_EXAMPLES[split], names, read, lambda index: f"synthetic image {index}")


def _bmp(pixels: np.ndarray) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "BMP")
    return buffer.getvalue()


SOURCES: dict[str, Callable[[ConfigDict, str], Split]] = {
    "tfds": _open_tfds,
    "folder": _open_folder,
    "digits": _open_digits,
    "synthetic": _open_synthetic,
}
