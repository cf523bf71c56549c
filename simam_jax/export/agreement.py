"""How far the objects that an exported detector finds are from those of the network itself."""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from simam_jax.errors import UserError

Arrays = dict[str, np.ndarray]  # boxes, scores, labels, count, and a Mask R-CNN's masks


class Agreement(NamedTuple):
    """The largest differences over all objects.

    Attributes:
        images, objects: how many were compared.
        boxes: in pixels.
        scores, masks: of probabilities.
    """

    images: int
    objects: int
    boxes: float
    scores: float
    masks: float


TOLERANCE = {"boxes": 0.05, "scores": 1e-3, "masks": 1e-2}


def agreement(pairs: Iterable[tuple[Arrays, Arrays]]) -> Agreement:
    """The largest differences between what the network finds in some images and what the exported one finds.

    Objects of nearly the same score may stand in another order: each is compared with the nearest of its class.

    Raises:
        UserError: they differ by more than `TOLERANCE`, or in number.
    """
    images = objects = 0
    largest = dict.fromkeys(TOLERANCE, 0.0)
    for expected, got in pairs:
        described = [{name: (x.dtype, x.shape) for name, x in sorted(found.items())} for found in (expected, got)]
        if described[0] != described[1]:
            raise UserError(f"The exported detector gives {described[1]}, not {described[0]}: nothing was written.")
        for i, count in enumerate(expected["count"]):
            if got["count"][i] != count:
                raise UserError(
                    f"The exported detector finds {got['count'][i]} objects where the network finds {count}: "
                    "nothing was written."
                )
            images, objects = images + 1, objects + int(count)
            for j in range(count):
                difference = _nearest(
                    {name: x[i] for name, x in got.items()}, {n: x[i] for n, x in expected.items()}, j
                )
                largest = {name: np.maximum(largest[name], value) for name, value in difference.items()}  # keeps NaN
    for name, value in largest.items():
        if not value <= TOLERANCE[name]:
            raise UserError(
                f"The exported detector's {name} differ by {value:.1e}, more than {TOLERANCE[name]}: nothing was written."
            )
    return Agreement(images, objects, **{name: float(value) for name, value in largest.items()})


def _nearest(got: Arrays, expected: Arrays, j: int) -> dict[str, float]:
    """The differences between the network's object j and the exported one's nearest object, in one image."""
    count = got["count"]
    boxes = np.abs(got["boxes"][:count] - expected["boxes"][j]).max(-1)
    boxes = np.where(got["labels"][:count] == expected["labels"][j], boxes, np.inf)
    scores = np.abs(got["scores"][:count] - expected["scores"][j])
    k = int((boxes + scores).argmin())
    masks = np.abs(got["masks"][k] - expected["masks"][j]).max() if "masks" in got else 0
    return {"boxes": float(boxes[k]), "scores": float(scores[k]), "masks": float(masks)}
