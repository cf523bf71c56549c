"""Boxes of TFDS data sets of COCO's form, such as coco/2017: for a Faster R-CNN, because there are no masks."""

import io
import logging
import os
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from simam_jax.data import cache, tfds
from simam_jax.data.coco import examples_of
from simam_jax.data.coco_index import Index
from simam_jax.data.detection_sources import Examples
from simam_jax.data.tensorflow_cpu import tf
from simam_jax.errors import UserError
from simam_jax.preprocessing import naming_the_reason
from simam_jax.rcnn.categories import coco_category_ids

logger = logging.getLogger(__name__)
_VERSION = 1  # of what the cache holds


def open_objects(config: ConfigDict, split: str, *, masks: bool) -> Examples:
    """The "train" or "eval" examples of the TFDS data set that `config` (the section config.data) names.

    Raises:
        UserError: it is not prepared, or of another form; masks are needed; what `examples_of` says.
    """
    if masks:
        raise UserError(
            "TFDS data sets have no masks, and a Mask R-CNN needs them: take a Faster R-CNN, or the json itself "
            "(--config.data.source=coco)."
        )
    builder, part = tfds.prepared_builder(config), config[f"{split}_split"]
    class_names = _class_names(builder)
    stored = tfds.stored_records(builder, part)
    if split == "eval":
        logger.warning(
            "TFDS keeps areas as whole numbers: for published scores use the json (--config.data.source=coco)."
        )
    columns = _columns(stored)
    index = Index(
        files=[stored.name(i) for i in range(stored.count)],
        class_names=class_names,
        category_ids=np.array(coco_category_ids(class_names) or range(len(class_names)), np.int64),
        ignore=np.zeros(len(columns["boxes"]), bool),
        segmentations=np.zeros(0, np.uint8),
        segmentation_ends=np.zeros(len(columns["boxes"]) + 1, np.int64),
        **columns,
    )

    def image(place: int) -> bytes:
        field = {"image": tf.io.FixedLenFeature((), tf.string)}
        try:
            return tf.io.parse_single_example(stored.record(tf.constant(place)), field)["image"].numpy()
        except tf.errors.OpError as error:
            raise UserError(f"The record cannot be read: {error.message.splitlines()[0]}.") from error

    return examples_of(index, split, masks=False, source=f"{config.name} {part}", image=image, name=stored.name)


def _class_names(builder: Any) -> list[str]:
    """The names of the labels.

    Raises:
        UserError: the data set is of another form.
    """
    import tensorflow_datasets as tfds_library

    features = dict(builder.info.features)
    objects = getattr(features.get("objects"), "feature", {})
    wanted = {"bbox": tfds_library.features.BBoxFeature, "label": tfds_library.features.ClassLabel}
    if not (
        {"image", "image/id"} <= set(features)
        and {"area", "bbox", "id", "is_crowd", "label"} <= set(objects)
        and all(isinstance(objects[name], kind) for name, kind in wanted.items())
    ):
        raise UserError(
            f"{builder.info.full_name} is no detection data set of COCO's form: it needs the features 'image', 'image/id' and "
            f"'objects' with area, bbox, id, is_crowd and label, and has {', '.join(features)}."
        )
    return list(objects["label"].names)


def _columns(stored: tfds.Stored) -> dict[str, np.ndarray]:
    """The arrays of an `Index`, from the cache where the files have not changed."""
    states = [os.stat(file) for file in stored.files]
    key = repr((_VERSION, stored.name(0) if stored.count else "", stored.count))
    key += repr([(file, s.st_size, s.st_mtime_ns) for file, s in zip(stored.files, states, strict=True)])
    kept = cache.file("objects", key)
    if arrays := cache.load(kept):
        return arrays
    logger.info("Reading %d records once for the sizes of their images, which TFDS does not keep.", stored.count)
    whole = tf.io.FixedLenSequenceFeature((), tf.int64, allow_missing=True)
    fields = {
        "image": tf.io.FixedLenFeature((), tf.string),
        "image/id": tf.io.FixedLenFeature((), tf.int64),
        "objects/bbox": tf.io.FixedLenSequenceFeature((4,), tf.float32, allow_missing=True),
        **{f"objects/{name}": whole for name in ("area", "id", "is_crowd", "label")},
    }
    rows = []
    for i in range(stored.count):
        record = tf.io.parse_single_example(stored.record(tf.constant(i)), fields)
        size = _size(record.pop("image").numpy(), stored.name(i))
        rows.append({name: value.numpy() for name, value in record.items()} | {"size": size})
    each = {
        name: np.concatenate([row[f"objects/{name}"] for row in rows]) for name in ("area", "id", "is_crowd", "label")
    }
    columns = {
        "image_ids": np.array([row["image/id"] for row in rows], np.int64),
        "sizes": np.array([row["size"] for row in rows], np.int32),
        "first": np.cumsum([0, *(len(row["objects/label"]) for row in rows)]),
        "boxes": np.concatenate([_in_pixels(row["objects/bbox"], row["size"]) for row in rows]),
        "labels": each["label"].astype(np.int32),
        "areas": each["area"].astype(np.float64),
        "crowd": each["is_crowd"].astype(bool),
        "annotation_ids": each["id"],
    }
    cache.save(kept, **columns)
    return columns


def _size(image: bytes, name: str) -> tuple[int, int]:
    """Height and width."""
    from PIL import Image

    with naming_the_reason(name), Image.open(io.BytesIO(image)) as opened:
        return opened.height, opened.width


def _in_pixels(boxes: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """(k, 4) float64 x y width height, of y1 x1 y2 x2 in 0..1."""
    y1, x1, y2, x2 = boxes.astype(np.float64).reshape(-1, 4).T * np.array([*size, *size])[:, None]
    return np.stack((x1, y1, x2 - x1, y2 - y1), -1)
