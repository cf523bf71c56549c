"""COCO's annotations: a json with any categories as flat arrays, which are kept between runs."""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from simam_jax.data import cache
from simam_jax.errors import UserError
from simam_jax.paths import local

_VERSION = 1  # of what the cache holds


@dataclass(frozen=True)
class Index:
    """What a json holds: n images, a annotations sorted by image, c categories.

    Attributes:
        image_ids: (n,) int64.
        files: n names, below the folder of images.
        sizes: (n, 2) int32, height and width.
        category_ids: (c,) int64, in the json's order.
        class_names: c names.
        first: (n + 1,) int64, where the annotations of each image begin.
        boxes: (a, 4) float64, COCO's x y width height.
        labels: (a,) int32, the category's place; -1: it is not among the categories.
        areas: (a,) float64.
        crowd, ignore: (a,) bool.
        annotation_ids: (a,) int64.
        segmentations: uint8, each annotation's JSON, one after the other.
        segmentation_ends: (a + 1,) int64, where they begin and end.
    """

    image_ids: np.ndarray
    files: list[str]
    sizes: np.ndarray
    category_ids: np.ndarray
    class_names: list[str]
    first: np.ndarray
    boxes: np.ndarray
    labels: np.ndarray
    areas: np.ndarray
    crowd: np.ndarray
    ignore: np.ndarray
    annotation_ids: np.ndarray
    segmentations: np.ndarray
    segmentation_ends: np.ndarray

    def segmentation(self, annotation: int) -> Any:
        """Polygons, run lengths, compressed run lengths, or None."""
        start, stop = self.segmentation_ends[annotation : annotation + 2]
        return json.loads(self.segmentations[start:stop].tobytes() or b"null")

    def image_of(self) -> np.ndarray:
        """(a,) int64: the place of each annotation's image."""
        return np.repeat(np.arange(len(self.image_ids)), np.diff(self.first))


def read_index(annotations: str | os.PathLike[str]) -> Index:
    """What a json of annotations holds, from the cache where it has not changed.

    Raises:
        UserError: there is no such file, it is no COCO json, or contradicts itself; the message says where.
    """
    path = local(annotations).resolve()
    try:
        status = path.stat()
    except OSError:
        raise UserError(f"There is no file of annotations {path}.") from None
    key = f"{_VERSION} {path} {status.st_size} {status.st_mtime_ns} {status.st_ctime_ns}"
    kept = cache.folder() / f"coco-{hashlib.sha256(key.encode('utf-8', 'surrogateescape')).hexdigest()[:32]}.npz"
    if arrays := cache.load(kept):
        names = {
            name: arrays.pop(name).tobytes().decode("utf-8", "surrogateescape") for name in ("files", "class_names")
        }
        return Index(**arrays, **{name: json.loads(text) for name, text in names.items()})
    index = _parsed(path)
    fields = {name: value for name, value in vars(index).items() if isinstance(value, np.ndarray)}
    lists = {
        name: np.frombuffer(json.dumps(getattr(index, name)).encode(), np.uint8) for name in ("files", "class_names")
    }
    cache.save(kept, **fields, **lists)
    return index


def _parsed(path: Path) -> Index:
    try:
        with path.open("rb") as file:
            found = json.load(file)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as JSON: {error}.") from error
    if not isinstance(found, dict) or not all(isinstance(found.get(name), list) for name in ("images", "categories")):
        raise UserError(f"{path} is no COCO json: it needs the lists images, annotations and categories.")
    images, categories, annotations = found["images"], found["categories"], found.get("annotations", [])
    image_ids = _column(path, "images", images, "id", np.int64)
    category_ids = _column(path, "categories", categories, "id", np.int64)
    class_names = [str(category.get("name", "")) for category in categories]
    _refuse_twins(path, "image id", image_ids.tolist())
    _refuse_twins(path, "category id", category_ids.tolist())
    _refuse_twins(path, "category name", class_names)
    if not categories:
        raise UserError(f"{path} has no categories: there is nothing to learn.")
    sizes = [_column(path, "images", images, side, np.int32) for side in ("height", "width")]
    files = [image.get("file_name") for image in images]
    if bad := [i for i, name in zip(image_ids, files, strict=True) if not isinstance(name, str) or not name]:
        raise UserError(f"{path}: image {bad[0]} has no file_name.")

    own = _column(path, "annotations", annotations, "image_id", np.int64)
    places = {image: place for place, image in enumerate(image_ids.tolist())}
    image_of = np.array([places.get(image, -1) for image in own.tolist()], np.int64)
    if (image_of < 0).any():
        strays = np.flatnonzero(image_of < 0)
        raise UserError(
            f"{path}: {len(strays)} annotations are of images that are not listed, the first of image {own[strays[0]]}."
        )
    annotation_ids = _column(path, "annotations", annotations, "id", np.int64)
    _refuse_twins(path, "annotation id", annotation_ids.tolist())
    label_of = {category: label for label, category in enumerate(category_ids.tolist())}
    categories_of = _column(path, "annotations", annotations, "category_id", np.int64)
    boxes = [annotation.get("bbox") for annotation in annotations]
    for annotation, box in zip(annotation_ids, boxes, strict=True):
        if not isinstance(box, list) or len(box) != 4 or not all(isinstance(x, int | float) for x in box):
            raise UserError(f"{path}: annotation {annotation} has the bbox {box!r}, not [x, y, width, height].")
    boxes = np.array(boxes, np.float64).reshape(-1, 4)
    if not np.isfinite(boxes).all():
        odd = np.flatnonzero(~np.isfinite(boxes).all(1))[0]
        raise UserError(
            f"{path}: annotation {annotation_ids[odd]} has the bbox {boxes[odd].tolist()}, which is not finite."
        )
    areas = [annotation.get("area", box[2] * box[3]) for annotation, box in zip(annotations, boxes, strict=True)]
    texts = [
        b"" if (segmentation := annotation.get("segmentation")) in (None, []) else json.dumps(segmentation).encode()
        for annotation in annotations
    ]
    order = np.argsort(image_of, kind="stable")
    return Index(
        image_ids=image_ids,
        files=files,
        sizes=np.stack(sizes, -1),
        category_ids=category_ids,
        class_names=class_names,
        first=np.searchsorted(image_of[order], np.arange(len(images) + 1)),
        boxes=boxes[order],
        labels=np.array([label_of.get(category, -1) for category in categories_of.tolist()], np.int32)[order],
        areas=np.array(areas, np.float64)[order],
        crowd=np.array([bool(annotation.get("iscrowd", 0)) for annotation in annotations], bool)[order],
        ignore=np.array([bool(annotation.get("ignore", 0)) for annotation in annotations], bool)[order],
        annotation_ids=annotation_ids[order],
        segmentations=np.frombuffer(b"".join(texts[i] for i in order), np.uint8),
        segmentation_ends=np.concatenate([[0], np.cumsum([len(texts[i]) for i in order], dtype=np.int64)]),
    )


def _column(path: Path, kind: str, entries: Sequence[Any], name: str, dtype: type) -> np.ndarray:
    """The whole numbers of that name in every entry."""
    values = [entry.get(name) if isinstance(entry, dict) else None for entry in entries]
    for place, value in enumerate(values):
        if type(value) is not int:
            raise UserError(f"{path}: {kind}[{place}] has {name}={value!r}, which is no whole number.")
    return np.array(values, dtype)


def _refuse_twins(path: Path, what: str, values: Sequence[Any]) -> None:
    twins = [value for value, count in Counter(values).items() if count > 1]
    if twins:
        raise UserError(
            f"{path}: the {what} {twins[0]!r} stands there {values.count(twins[0])} times; each must be unique."
        )
