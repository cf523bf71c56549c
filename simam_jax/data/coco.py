"""Examples of COCO's form: a json, a folder of images, any categories; what training sees is the reference implementation's."""

import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from simam_jax.data.coco_index import Index, read_index
from simam_jax.data.objects import Example, Examples
from simam_jax.errors import UserError, naming_extras
from simam_jax.paths import local
from simam_jax.preprocessing import ImageLike

logger = logging.getLogger(__name__)
LEAST_SIDE = 32  # pixels: smaller images are left out of training


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
    annotations, folder = places_of(config, split)
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
        seen = chosen(index)
        if looks_like_corners(index):
            logger.warning("%s: the boxes look like x y x y, where COCO has x y width height.", source)
        if seen.left_out:
            parts = ", ".join(f"{count} {reason}" for reason, count in seen.left_out.items())
            logger.warning("%s: left out of training: %s.", source, parts)
    else:
        seen = Chosen(np.arange(len(index.image_ids)), index.labels >= 0, {})
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


def mask_of(segmentation: Any, height: int, width: int) -> np.ndarray:
    """(height, width) bool, from polygons, run lengths or compressed run lengths, as pycocotools reads them.

    Raises:
        UserError: it is none of these, or of another size.
    """
    with naming_extras():
        from pycocotools import mask

    return mask.decode(rle_of(segmentation, height, width)).astype(bool)


def rle_of(segmentation: Any, height: int, width: int) -> Any:
    """Pycocotools' compressed run lengths of a mask in any of COCO's forms; what would lead it beyond its memory is refused.

    Raises:
        UserError: as of `mask_of`.
    """
    with naming_extras():
        from pycocotools import mask

    try:
        if isinstance(segmentation, list):
            # Coordinates far away make pycocotools write beyond its memory.
            if not all(abs(x) <= 10 * max(height, width) for polygon in segmentation for x in polygon):
                raise UserError(f"A polygon leaves its image of {width} x {height} pixels by far, or is not finite.")
            return mask.merge(mask.frPyObjects(segmentation, height, width))
        if not isinstance(segmentation, Mapping):
            raise UserError(f"A segmentation is {type(segmentation).__name__}, neither polygons nor run lengths.")
        if list(segmentation["size"]) != [height, width]:
            raise UserError(f"A mask is of {segmentation['size']}, and its image of [{height}, {width}] pixels.")
        counts = segmentation["counts"]
        runs = counts if isinstance(counts, list) else _run_lengths(counts)
        if min(runs, default=-1) < 0 or sum(runs) != height * width:
            raise UserError(f"The run lengths of a mask do not add up to its {height * width} pixels.")
        plain: Any = segmentation
        return mask.frPyObjects(plain, height, width) if isinstance(counts, list) else plain
    except UserError:
        raise
    except Exception as error:  # pycocotools raises anything
        text = str(error).rstrip(".") or type(error).__name__
        raise UserError(f"A segmentation cannot be read: {text}.") from error


def _run_lengths(counts: str | bytes) -> list[int]:
    """The run lengths in COCO's compressed text.

    A character has five bits of a number, the lowest first, and a sixth that says that more follow; the last bit is the sign.
    From the fourth on, a number is the difference to the one before the last.
    """
    digits = np.frombuffer(counts.encode() if isinstance(counts, str) else counts, np.uint8).astype(np.int64) - 48
    if not len(digits) or digits.min() < 0 or digits.max() > 63 or digits[-1] & 32:
        raise UserError("The compressed run lengths of a mask are cut short, or are none.")
    last = np.flatnonzero(~digits & 32)
    first = np.concatenate(([0], last[:-1] + 1))
    lengths = last - first + 1
    if lengths.max() > 7:
        raise UserError("The compressed run lengths of a mask have a number of more than 32 bits.")
    places = 5 * (np.arange(len(digits)) - np.repeat(first, lengths))
    runs = np.add.reduceat((digits & 31) << places, first) - ((digits[last] >> 4 & 1) << 5 * lengths)
    for start in (1, 2):
        runs[start::2] = runs[start::2].cumsum()
    return runs.tolist()
