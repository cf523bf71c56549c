"""What a detector does wrong in an image: objects that are not there, and objects that it misses."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from simam_jax.data.coco_masks import mask_of
from simam_jax.detection.drawing import Drawn, class_colour
from simam_jax.errors import naming_extras

IOU = 0.5  # of boxes: from which on an object is found
# Told apart by colour-blind people too (Okabe and Ito).
RIGHT, WRONG, MISSED, CROWD = (0, 114, 178), (213, 94, 0), (240, 228, 66), (150, 150, 150)

Row = Mapping[str, Any]  # an annotation or a result in COCO's form


class Mistakes(NamedTuple):
    """How the objects found in an image compare with its annotations.

    Attributes:
        right: places of results that are an object of their class, the most certain result of each.
        wrong: places of results that are none. Those in a crowd of their class are neither right nor wrong.
        missed: places of annotations that no result is of; a crowd is never missed.
        weight: how bad it is: the scores of the wrong ones, and 1 for each that is missed.
    """

    right: list[int]
    wrong: list[int]
    missed: list[int]
    weight: float


def compare(results: Sequence[Row], annotations: Sequence[Row]) -> Mistakes:
    """The mistakes in one image, matched by boxes as in COCO's evaluation at an IoU of 0.5.

    Args:
        results: in COCO's results form.
        annotations: in COCO's form; those to be ignored count as crowds.
    """
    with naming_extras():
        from pycocotools import mask

    crowd = [int(bool(each.get("iscrowd") or each.get("ignore"))) for each in annotations]
    overlap = np.zeros((len(results), len(annotations)))
    if overlap.size:
        boxes: Any = [np.array([each["bbox"] for each in rows], np.float64) for rows in (results, annotations)]
        overlap = np.asarray(mask.iou(boxes[0], boxes[1], crowd))
    right, wrong, free = [], [], {place for place, of in enumerate(crowd) if not of}
    for i in sorted(range(len(results)), key=lambda i: -results[i]["score"]):
        own = [
            j
            for j, each in enumerate(annotations)
            if each["category_id"] == results[i]["category_id"] and overlap[i, j] >= IOU
        ]
        open_ones = free.intersection(own)
        if open_ones:
            free.remove(max(open_ones, key=lambda j: overlap[i, j]))
            right.append(i)
        elif not any(crowd[j] for j in own):
            wrong.append(i)
    weight = sum(results[i]["score"] for i in wrong) + len(free)
    return Mistakes(right, wrong, sorted(free), weight)


def drawn_truth(annotations: Sequence[Row], names: Mapping[int, str], size: tuple[int, int]) -> list[Drawn]:
    """What is right, in the colours of the classes.

    Args:
        annotations: in COCO's form, those of one image.
        names: of the categories, by their numbers.
        size: height and width of the image.
    """
    places = {category: place for place, category in enumerate(names)}
    drawn = []
    for each in annotations:
        crowd, category = each.get("iscrowd"), each["category_id"]
        text, colour = names[category], class_colour(places[category])
        mask = _mask_of(each, size)
        drawn.append(_drawn(each, f"crowd: {text}" if crowd else text, CROWD if crowd else colour, mask))
    return drawn


def drawn_results(
    results: Sequence[Row],
    annotations: Sequence[Row],
    mistakes: Mistakes,
    names: Mapping[int, str],
    size: tuple[int, int],
) -> list[Drawn]:
    """What a detector found, blue where it is right and red where it is wrong, and in yellow what it missed.

    Masks are drawn of what is right.

    Args:
        results, annotations, mistakes: of `compare`.
        names: of the categories, by their numbers.
        size: height and width of the image.
    """

    def text(row: Row) -> str:
        return f"{names[row['category_id']]}: {100 * row['score']:.0f} %"

    wrong = [_drawn(results[i], text(results[i]), WRONG) for i in mistakes.wrong]  # their masks would hide the image
    missed = [
        _drawn(annotations[j], f"missed: {names[annotations[j]['category_id']]}", MISSED) for j in mistakes.missed
    ]
    right = [_drawn(results[i], text(results[i]), RIGHT, _mask_of(results[i], size)) for i in mistakes.right]
    return wrong + missed + right


def _drawn(row: Row, text: str, colour: tuple[int, int, int], mask: Callable[[], np.ndarray] | None = None) -> Drawn:
    x, y, width, height = row["bbox"]
    return Drawn((x, y, x + width, y + height), text, colour, mask)


def _mask_of(row: Row, size: tuple[int, int]) -> Callable[[], np.ndarray] | None:
    return partial(mask_of, row["segmentation"], *size) if row.get("segmentation") else None
