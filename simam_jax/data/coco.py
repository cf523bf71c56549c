"""COCO's annotations: a json and a folder of images, any categories; as flat arrays, which are kept between runs."""

import hashlib
import json
import logging
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from simam_jax.data import cache
from simam_jax.data.objects import Example, Examples
from simam_jax.errors import UserError, naming_extras
from simam_jax.paths import local

logger = logging.getLogger(__name__)
LEAST_SIDE = 32  # pixels: smaller images are left out of training, as in the reference implementation
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


# ---- what is learned from, as the reference implementation chooses it


@dataclass(frozen=True)
class Chosen:
    """What training sees.

    Attributes:
        images: places of images.
        annotations: (a,) bool.
        left_out: what is not seen, counted: by reason.
    """

    images: np.ndarray
    annotations: np.ndarray
    left_out: dict[str, int]


def chosen(index: Index) -> Chosen:
    """The images and annotations that training sees: an image with nothing but crowds stays, without objects."""
    x, y, width, height = index.boxes.T
    image_of = index.image_of()
    h, w = index.sizes[image_of].T
    inside = (np.minimum(x + width, w) > np.maximum(x, 0)) & (np.minimum(y + height, h) > np.maximum(y, 0))
    reasons = {
        "of a crowd": index.crowd,
        "marked to be ignored": index.ignore,
        "of a category that is not listed": index.labels < 0,
        "without an area": (index.areas <= 0) | (width < 1) | (height < 1),
        "outside the image": ~inside,
    }
    left, out = np.ones(len(index.boxes), bool), {}
    for reason, which in reasons.items():
        out[f"annotations {reason}"] = int((left & which).sum())
        left &= ~which
    small = index.sizes.min(1) < LEAST_SIDE if len(index.sizes) else np.zeros(0, bool)
    known = np.bincount(image_of[index.labels >= 0], minlength=len(index.sizes)) > 0
    out[f"images below {LEAST_SIDE} pixels"] = int(small.sum())
    out["images without annotations"] = int((~small & ~known).sum())
    return Chosen(np.flatnonzero(known & ~small), left, {reason: count for reason, count in out.items() if count})


def open_coco(config: ConfigDict, split: str, *, masks: bool) -> Examples:
    """The "train" or "eval" examples that `config` (the section config.data) names.

    Raises:
        UserError: what `read_index` says, images that are not there, or, for masks, objects without any.
    """
    annotations, folder = places_of(config, split)
    index = read_index(annotations)
    absent = missing_files(index, folder)
    if absent:
        raise UserError(
            f"{len(absent)} of {len(index.files)} images of {annotations} are not in {folder}, the first: "
            f"{', '.join(absent[:3])}. Name their folder with --config.data.{split}_images."
        )
    if split == "train":
        seen = chosen(index)
        if seen.left_out:
            parts = ", ".join(f"{count} {reason}" for reason, count in seen.left_out.items())
            logger.warning("%s: left out of training: %s.", annotations, parts)
    else:
        seen = Chosen(np.arange(len(index.image_ids)), index.labels >= 0, {})
    own = [np.flatnonzero(seen.annotations[a:b]) + a for a, b in zip(index.first[:-1], index.first[1:], strict=True)]
    without = [
        i for place in seen.images for i in own[place] if index.segmentation_ends[i] == index.segmentation_ends[i + 1]
    ]
    if masks and split == "train" and without:
        raise UserError(
            f"{annotations}: {len(without)} annotations have no segmentation, the first is "
            f"{index.annotation_ids[without[0]]}, and a Mask R-CNN needs them: take a Faster R-CNN."
        )

    def read(i: int) -> Example:
        place = seen.images[i]
        height, width = index.sizes[place].tolist()
        objects = own[place]
        x, y, w, h = index.boxes[objects].T
        boxes = np.stack((x, y, x + w, y + h), -1).astype(np.float32)

        def masks_of() -> np.ndarray:
            return np.array([mask_of(index.segmentation(a), height, width) for a in objects]).reshape(-1, height, width)

        return Example(
            folder / index.files[place], (height, width), boxes, index.labels[objects], masks_of if masks else None
        )

    return Examples(
        sizes=index.sizes[seen.images],
        image_ids=index.image_ids[seen.images],
        class_names=tuple(index.class_names),
        category_ids=index.category_ids,
        most_objects=max((len(own[place]) for place in seen.images), default=0),
        read=read,
        name=lambda i: str(folder / index.files[seen.images[i]]),
        annotations=lambda: annotations_of(index, masks=masks),
    )


def places_of(config: ConfigDict, split: str) -> tuple[Path, Path]:
    """The json and the folder of images of "train" or "eval": as named, or in COCO's own layout below data_dir.

    Raises:
        UserError: neither is named.
    """
    name = config[f"{split}_split"]
    annotations, folder = config[f"{split}_annotations"], config[f"{split}_images"]
    if not config.data_dir and not (annotations and folder):
        raise UserError(
            f"The source 'coco' needs --config.data.data_dir, with annotations/instances_{name}.json and the folder {name}, "
            f"or --config.data.{split}_annotations and --config.data.{split}_images."
        )
    root = local(config.data_dir)
    return (
        local(annotations) if annotations else root / "annotations" / f"instances_{name}.json",
        local(folder) if folder else root / name,
    )


def missing_files(index: Index, folder: Path) -> list[str]:
    """The files of the index that are not in the folder."""
    if not folder.is_dir():
        raise UserError(f"There is no folder of images {folder}.")
    there: dict[str, set[str]] = {}
    missing = []
    for file in index.files:
        parent, _, name = file.rpartition("/")
        if parent not in there:
            place = folder / parent
            there[parent] = set(os.listdir(place)) if place.is_dir() else set()
        if name not in there[parent]:
            missing.append(file)
    return missing


def annotations_of(index: Index, *, masks: bool) -> list[dict[str, Any]]:
    """The annotations in COCO's form, as evaluation wants them."""
    image_of = index.image_of()
    found = []
    for a in np.flatnonzero(index.labels >= 0).tolist():
        annotation = {
            "image_id": int(index.image_ids[image_of[a]]),
            "category_id": int(index.category_ids[index.labels[a]]),
            "bbox": index.boxes[a].tolist(),
            "area": float(index.areas[a]),
            "iscrowd": int(index.crowd[a]),
            "ignore": int(index.ignore[a]),
        }
        found.append(annotation | ({"segmentation": index.segmentation(a) or []} if masks else {}))
    return found


def mask_of(segmentation: Any, height: int, width: int) -> np.ndarray:
    """(height, width) bool, from polygons, run lengths or compressed run lengths, as pycocotools reads them.

    Raises:
        UserError: it is none of these, or of another size.
    """
    with naming_extras():
        from pycocotools import mask

    try:
        if isinstance(segmentation, list):
            rle = mask.merge(mask.frPyObjects(segmentation, height, width))
        elif isinstance(segmentation, Mapping):
            if list(segmentation["size"]) != [height, width]:
                raise UserError(f"A mask is of {segmentation['size']}, and its image of [{height}, {width}] pixels.")
            counts = segmentation["counts"]
            rle = mask.frPyObjects(segmentation, height, width) if isinstance(counts, list) else segmentation
        else:
            raise UserError(f"A segmentation is {type(segmentation).__name__}, neither polygons nor run lengths.")
        return mask.decode(rle).astype(bool)
    except UserError:
        raise
    except Exception as error:  # pycocotools raises anything
        raise UserError(f"A segmentation cannot be read: {error or type(error).__name__}.") from error
