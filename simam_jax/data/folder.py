"""Records of a folder of images: data_dir/SPLIT/CLASS/..., classes numbered in the order of their names."""

import collections
import logging
import os
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
from ml_collections import ConfigDict

from simam_jax import errors
from simam_jax.data import cache
from simam_jax.data.classification_sources import Records
from simam_jax.data.tensorflow_cpu import tf
from simam_jax.errors import UserError
from simam_jax.paths import local

ENDINGS = (b".jpeg", b".jpg", b".png", b".bmp", b".gif", b".webp")  # what TensorFlow decodes
logger = logging.getLogger(__name__)
SETTLED_NS = 2_000_000_000  # nanoseconds; file systems keep times no coarser than this


class Index(NamedTuple):
    """What a tree holds.

    Attributes:
        class_names: the folders below the split.
        class_of: int32, one for each image.
        files: the images, as bytes, below the split: b"CLASS/FOLDER/NAME".
        left_out: files of other kinds, by ending.
    """

    class_names: list[str]
    class_of: np.ndarray
    files: list[bytes]
    left_out: dict[str, int]


def open_tree(config: ConfigDict, split: str) -> Records:
    """A split of the classic tree; images in sub-folders of a class count, hidden files and folders do not.

    Raises:
        UserError: no such folder, or no images in it.
    """
    if not config.data_dir:
        raise UserError("The source 'folder' needs config.data.data_dir: the folder that holds train/CLASS/*.JPEG.")
    root = local(config.data_dir).resolve()
    if not (root / split).is_dir():
        found = sorted(entry.name for entry in root.iterdir() if entry.is_dir()) if root.is_dir() else []
        if not found:
            raise UserError(f"There is no folder {root / split}: config.data.data_dir must hold train/CLASS/*.JPEG.")
        raise errors.unknown(f"folder in {root}", split, found)
    class_names, class_of, files, left_out = index_of(root / split)
    if left_out:
        kinds = ", ".join(f"{count} {ending}" for ending, count in sorted(left_out.items()))
        logger.warning("%s: left out: %s.", root / split, kinds)
    if not files:
        endings = ", ".join(ending.decode() for ending in ENDINGS)
        raise UserError(f"No images ({endings}) in {root / split}/CLASS/.")
    base = os.fsencode(root / split)
    label_table, file_table = tf.constant(class_of), tf.constant(files)

    def read(index: tf.Tensor) -> dict[str, tf.Tensor]:
        path = tf.strings.join((base, file_table[index]), os.sep)
        return {"image": tf.io.read_file(path), "label": label_table[index]}

    def name(index: int) -> str:
        return str(root / split / os.fsdecode(files[index]))

    return Records(len(files), tuple(class_names), read, name)


def index_of(root: Path) -> Index:
    """What the tree below `root` holds.

    Listing a million files takes minutes on a network disk, so the index is kept in the user's cache folder. It is made
    anew when a folder's times or size have changed: the time of a change (ctime) cannot be set by archives or rsync.
    """
    file = cache.file("tree", str(root))
    saved = cache.load(file)
    if saved and np.array_equal(_stamps(root, _names(saved["folders"])), saved["stamps"]):
        left_out = zip(map(os.fsdecode, _names(saved["left_out"])), saved["left_out_counts"].tolist(), strict=True)
        class_names = [os.fsdecode(name) for name in _names(saved["class_names"])]
        return Index(class_names, saved["class_of"], _names(saved["files"]), dict(left_out))

    index, folders = _walk(root)
    stamps = _stamps(root, folders)
    # A folder changed a moment ago may change again without its time showing it.
    if index.files and time.time_ns() - stamps[:, :2].max() > SETTLED_NS:
        cache.save(
            file,
            folders=_blob(folders),
            stamps=stamps,
            class_names=_blob([os.fsencode(name) for name in index.class_names]),
            class_of=index.class_of,
            files=_blob(index.files),
            left_out=_blob([os.fsencode(ending) for ending in index.left_out]),
            left_out_counts=np.array(list(index.left_out.values()), np.int64),
        )
    return index


def _walk(root: Path) -> tuple[Index, list[bytes]]:
    """The index, and all folders below `root`, itself first, that it depends on."""
    base = os.fsencode(root)
    tops = sorted(entry.name for entry in os.scandir(base) if entry.is_dir() and not entry.name.startswith(b"."))
    files, class_of, folders = [], [], [b""]
    left_out: collections.Counter[str] = collections.Counter()
    for label, top in enumerate(tops):
        for folder, below, names in os.walk(os.path.join(base, top), followlinks=True):
            below[:] = sorted(name for name in below if not name.startswith(b"."))
            inside = os.path.relpath(folder, base)
            folders.append(inside)
            for name in sorted(name for name in names if not name.startswith(b".")):
                ending = os.path.splitext(name)[1].lower()
                if ending in ENDINGS:
                    files.append(os.path.join(inside, name))
                    class_of.append(label)
                else:
                    left_out[os.fsdecode(ending) or "without an ending"] += 1
    class_names = [os.fsdecode(top) for top in tops]
    return Index(class_names, np.array(class_of, np.int32), files, dict(left_out)), folders


def _stamps(root: Path, folders: list[bytes]) -> np.ndarray:
    """Times, size and number of links of each folder, int64 (folders, 4); zeros where there is none."""
    rows = []
    for folder in folders:
        try:
            state = os.stat(os.path.join(os.fsencode(root), folder))
            rows.append((state.st_mtime_ns, state.st_ctime_ns, state.st_size, state.st_nlink))
        except OSError:
            rows.append((0, 0, 0, 0))
    return np.array(rows, np.int64)


def _blob(names: list[bytes]) -> np.ndarray:
    return np.frombuffer(b"\0".join(names), np.uint8) if names else np.zeros(0, np.uint8)


def _names(blob: np.ndarray) -> list[bytes]:
    return blob.tobytes().split(b"\0") if blob.size else []
