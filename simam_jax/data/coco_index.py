"""COCO's annotations: a json with any categories as flat arrays, which are kept between runs."""

import codecs
import json
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from simam_jax.data import cache
from simam_jax.errors import UserError, naming_extras
from simam_jax.paths import local

_VERSION = 2  # of what the cache holds
_MOST_PIXELS = 2**31  # of a side


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
    kept = cache.file("coco", key)
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
    found = _decoded(path)
    images, categories, annotations = found.images, found.categories, found.annotations
    image_ids = np.array([image.id for image in images], np.int64)
    category_ids = np.array([category.id for category in categories], np.int64)
    class_names = [category.name for category in categories]
    annotation_ids = np.array([annotation.id for annotation in annotations], np.int64)
    _refuse_twins(path, "image id", image_ids.tolist())
    _refuse_twins(path, "category id", category_ids.tolist())
    _refuse_twins(path, "category name", class_names)
    _refuse_twins(path, "annotation id", annotation_ids.tolist())
    if not categories:
        raise UserError(f"{path} has no categories: there is nothing to learn.")
    for image in images:
        if not image.file_name:
            raise UserError(f"{path}: image {image.id} has no file_name.")
        if not (0 < image.height < _MOST_PIXELS and 0 < image.width < _MOST_PIXELS):
            raise UserError(
                f"{path}: image {image.id} is of {image.width} x {image.height} pixels, which no image can be."
            )

    places = {image: place for place, image in enumerate(image_ids.tolist())}
    image_of = np.array([places.get(annotation.image_id, -1) for annotation in annotations], np.int64)
    if (image_of < 0).any():
        strays = np.flatnonzero(image_of < 0)
        raise UserError(
            f"{path}: {len(strays)} annotations are of images that are not listed, the first of image "
            f"{annotations[strays[0]].image_id}."
        )
    label_of = {category: label for label, category in enumerate(category_ids.tolist())}
    order = np.argsort(image_of, kind="stable")
    annotations = [annotations[place] for place in order]
    boxes = np.array([annotation.bbox for annotation in annotations], np.float64).reshape(-1, 4)
    areas = [
        box[2] * box[3] if annotation.area is None else annotation.area
        for annotation, box in zip(annotations, boxes, strict=True)
    ]
    texts = [b"" if _is_none(annotation.segmentation) else annotation.segmentation for annotation in annotations]
    return Index(
        image_ids=image_ids,
        files=[image.file_name for image in images],
        sizes=np.array([(image.height, image.width) for image in images], np.int32).reshape(-1, 2),
        category_ids=category_ids,
        class_names=class_names,
        first=np.searchsorted(image_of[order], np.arange(len(images) + 1)),
        boxes=boxes,
        labels=np.array([label_of.get(annotation.category_id, -1) for annotation in annotations], np.int32),
        areas=np.array(areas, np.float64),
        crowd=np.array([bool(annotation.iscrowd) for annotation in annotations], bool),
        ignore=np.array([bool(annotation.ignore) for annotation in annotations], bool),
        annotation_ids=annotation_ids[order],
        segmentations=np.frombuffer(b"".join(texts), np.uint8),
        segmentation_ends=np.concatenate([[0], np.cumsum([len(text) for text in texts], dtype=np.int64)]),
    )


def _decoded(path: Path) -> Any:
    """The json's images, categories and annotations; segmentations stay text, which is most of it and takes the most time."""
    with naming_extras():
        import msgspec

    class Image(msgspec.Struct, gc=False):
        id: int
        height: int
        width: int
        file_name: str = ""

    class Category(msgspec.Struct, gc=False):
        id: int
        name: str = ""

    class Annotation(msgspec.Struct, gc=False):
        id: int
        image_id: int
        category_id: int
        bbox: tuple[float, float, float, float]
        area: float | None = None
        iscrowd: float | bool | None = None
        ignore: float | bool | None = None
        segmentation: msgspec.Raw = msgspec.Raw(b"")

    class Data(msgspec.Struct, gc=False):
        images: list[Image]
        categories: list[Category]
        annotations: list[Annotation] = []

    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error}.") from error
    try:
        return msgspec.json.decode(content.removeprefix(codecs.BOM_UTF8), type=Data)
    except msgspec.ValidationError as error:
        raise UserError(
            f"{path} is no COCO json, with the lists images, annotations and categories: {error}."
        ) from error
    except msgspec.DecodeError as error:
        hint = " NaN and Infinity are no numbers of JSON." if b"NaN" in content or b"Infinity" in content else ""
        raise UserError(f"{path} cannot be read as JSON: {error}.{hint}") from error


def _is_none(segmentation: Any) -> bool:
    """Whether the text of a segmentation says that there is none."""
    return len(segmentation) < 9 and b"".join(bytes(segmentation).split()) in (b"", b"null", b"[]")


def _refuse_twins(path: Path, what: str, values: Sequence[Any]) -> None:
    if len(set(values)) == len(values):
        return
    value, count = Counter(values).most_common(1)[0]
    raise UserError(f"{path}: the {what} {value!r} stands there {count} times; each must be unique.")
