"""Examples of COCO's form: the index of a json, a folder of images, any categories.

What training sees is what the reference implementation sees. `coco_index` reads the json, `coco_masks` the masks.
"""

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from simam_jax.data.coco_index import Index, read_index
from simam_jax.data.coco_masks import mask_of, rle_of
from simam_jax.data.detection_sources import Example, Examples
from simam_jax.errors import UserError
from simam_jax.paths import local
from simam_jax.preprocessing import ImageLike

logger = logging.getLogger(__name__)
LEAST_SIDE = 32  # pixels: smaller images are left out of training


@dataclass(frozen=True)
class Selection:
    """What training sees.

    Attributes:
        images: (n,) indices of images.
        annotations: (a,) bool.
        left_out: what is not seen, counted: by reason.
    """

    images: np.ndarray
    annotations: np.ndarray
    left_out: dict[str, int]


def select_for_training(index: Index) -> Selection:
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
    kept, left_out = np.ones(len(index.boxes), bool), {}
    for reason, which in reasons.items():
        left_out[f"annotations {reason}"] = int((kept & which).sum())
        kept &= ~which
    small = index.sizes.min(1) < LEAST_SIDE if len(index.sizes) else np.zeros(0, bool)
    known = np.bincount(image_of[index.labels >= 0], minlength=len(index.sizes)) > 0
    left_out[f"images below {LEAST_SIDE} pixels"] = int(small.sum())
    left_out["images without annotations"] = int((~small & ~known).sum())
    return Selection(
        np.flatnonzero(known & ~small), kept, {reason: count for reason, count in left_out.items() if count}
    )


def looks_like_corners(index: Index) -> bool:
    """Whether the boxes seem to be x y x y, where COCO has x y width height."""
    x, y, w, h = index.boxes.T
    height, width = index.sizes[index.image_of()].T
    outside = (x + w > width + 1) | (y + h > height + 1)
    corners = (w > x) & (h > y) & (w <= width) & (h <= height)
    return bool(len(x) and outside.mean() > 0.2 and corners.mean() > 0.9)


def open_coco(config: ConfigDict, split: str, *, masks: bool) -> Examples:
    """The "train" or "eval" examples that `config` (the section config.data) names.

    Raises:
        UserError: what `read_index` says, images that are not there, or, for masks, objects without any.
    """
    annotations, folder = coco_paths(config, split)
    index = read_index(annotations)
    absent = missing_files(index, folder)
    if absent:
        raise UserError(
            f"{len(absent)} of {len(index.files)} images of {annotations} are not in {folder}, the first: "
            f"{', '.join(absent[:3])}. Name their folder with --config.data.{split}_images."
        )
    return examples_of(
        index,
        split,
        masks=masks,
        source=str(annotations),
        image=lambda place: folder / index.files[place],
        name=lambda place: str(folder / index.files[place]),
    )


def examples_of(
    index: Index,
    split: str,
    *,
    masks: bool,
    source: str,
    image: Callable[[int], ImageLike],
    name: Callable[[int], str],
) -> Examples:
    """The "train" or "eval" examples of an index.

    Args:
        index: has the annotations.
        split: of "train" what cannot be learned from is left out, counted and said.
        masks: whether they are needed.
        source: what messages call the index.
        image: from the place of an image in the index to a file's path or its bytes.
        name: from the same to what a message calls it.

    Raises:
        UserError: for masks, objects without any.
    """
    if split == "train":
        seen = select_for_training(index)
        if looks_like_corners(index):
            logger.warning("%s: the boxes look like x y x y, where COCO has x y width height.", source)
        if seen.left_out:
            parts = ", ".join(f"{count} {reason}" for reason, count in seen.left_out.items())
            logger.warning("%s: left out of training: %s.", source, parts)
    else:
        seen = Selection(np.arange(len(index.image_ids)), index.labels >= 0, {})
    own = [np.flatnonzero(seen.annotations[a:b]) + a for a, b in zip(index.first[:-1], index.first[1:], strict=True)]
    without = np.flatnonzero(
        seen.annotations & (np.diff(index.segmentation_ends) == 0) & np.isin(index.image_of(), seen.images)
    )
    if masks and len(without):
        raise UserError(
            f"{source}: {len(without)} annotations have no segmentation, the first is "
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

        return Example(image(int(place)), (height, width), boxes, index.labels[objects], masks_of if masks else None)

    return Examples(
        sizes=index.sizes[seen.images],
        image_ids=index.image_ids[seen.images],
        class_names=tuple(index.class_names),
        category_ids=index.category_ids,
        most_objects=max((len(own[place]) for place in seen.images), default=0),
        read=read,
        name=lambda i: name(int(seen.images[i])),
        annotations=lambda: annotations_of(index, masks=masks),
    )


def coco_paths(config: ConfigDict, split: str) -> tuple[Path, Path]:
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


def annotations_of(index: Index, *, masks: bool, which: np.ndarray | None = None) -> list[dict[str, Any]]:
    """The annotations in COCO's form, as evaluation wants them, with compressed run lengths for masks.

    Args:
        index: has them.
        masks: whether they are needed.
        which: (a,) bool; None: all of listed categories.

    Raises:
        UserError: a mask that cannot be read; the message names its annotation.
    """
    image_of = index.image_of()
    found = []
    for a in np.flatnonzero(index.labels >= 0 if which is None else which).tolist():
        annotation = {
            "image_id": int(index.image_ids[image_of[a]]),
            "category_id": int(index.category_ids[index.labels[a]]),
            "bbox": index.boxes[a].tolist(),
            "area": float(index.areas[a]),
            "iscrowd": int(index.crowd[a]),
            "ignore": int(index.ignore[a]),
        }
        if masks:
            try:
                annotation["segmentation"] = rle_of(index.segmentation(a), *index.sizes[image_of[a]].tolist())
            except UserError as error:
                raise UserError(f"Annotation {index.annotation_ids[a]}: {error}") from error
        found.append(annotation)
    return found
