"""The results of a detector for one image, which render themselves: as rows for programs, lines and pictures for people."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from simam_jax.detection.drawing import Drawn, class_colour, draw_objects, resized
from simam_jax.detection.evaluation import encode
from simam_jax.detection.masks import Masks
from simam_jax.errors import unknown

if TYPE_CHECKING:
    from PIL import Image


HEADER = "  score    class  x1 y1 x2 y2"  # of `Detections.lines`


@dataclasses.dataclass(frozen=True)
class Detections:
    """The n objects found in an image, the most certain first.

    Attributes:
        boxes: (n, 4) float32, x1 y1 x2 y2 in the image's own pixels, turned as its EXIF tag says.
        scores: (n,) float32 in 0..1.
        labels: (n,) int32 in 0..num_classes - 1.
        segmentation: n masks (H, W) bool in the image's size, as an array or as `Masks`, which makes each when it is
            looked at; None where the network has none.
        class_names: one for each class.
    """

    boxes: np.ndarray
    scores: np.ndarray
    labels: np.ndarray
    segmentation: Masks | np.ndarray | None
    class_names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.scores)

    @functools.cached_property
    def masks(self) -> np.ndarray | None:
        """(n, H, W) bool in the image's size, a byte a pixel, made at the first call; None where the network has no masks."""
        return None if self.segmentation is None else np.asarray(self.segmentation)

    @property
    def names(self) -> list[str]:
        """The class names of the objects."""
        return [self.class_names[label] for label in self.labels]

    def rows(self) -> list[dict[str, Any]]:
        """The objects as JSON: `{"class": name, "score": s, "box": [x1, y1, x2, y2]}`, and "area" of a mask, in pixels."""
        rows = [
            {"class": name, "score": float(score), "box": [round(float(x), 2) for x in box]}
            for name, score, box in zip(self.names, self.scores, self.boxes, strict=True)
        ]
        if self.segmentation is not None:
            for row, mask in zip(rows, self.segmentation, strict=True):
                row["area"] = int(mask.sum())
        return rows

    def results(self, image: str | int, category_ids: Sequence[int | None]) -> list[dict[str, Any]]:
        """The objects in COCO's results form, with the classes' names.

        Args:
            image: the image's number, or its name, in the results.
            category_ids: the numbers of the classes in the results; objects of a class with None are left out.
        """
        corners = self.boxes.astype(np.float64)
        rows = [
            {
                "image_id": image,
                "category_id": None if category_ids[label] is None else int(category_ids[label]),  # pyright: ignore[reportArgumentType]
                "category_name": self.class_names[label],
                "bbox": [*box[:2], box[2] - box[0], box[3] - box[1]],
                "score": float(score),
            }
            for label, box, score in zip(self.labels, corners.tolist(), self.scores, strict=True)
        ]
        if self.segmentation is not None:
            for row, rle in zip(rows, encode(self.segmentation), strict=True):
                row["segmentation"] = {"size": list(rle["size"]), "counts": rle["counts"].decode()}
        return [row for row in rows if row["category_id"] is not None]

    def chosen(self, score: float = 0.0, classes: Sequence[str] | None = None) -> "Detections":
        """The objects of the named classes (None: of all) whose score is at least `score`.

        Raises:
            UserError: there is no such class.
        """
        for name in classes or ():
            if name not in self.class_names:
                raise unknown("class", name, self.class_names)
        wanted = np.array([classes is None or name in classes for name in self.class_names])
        keep = (self.scores >= score) & wanted[self.labels]
        masks = None if self.segmentation is None else self.segmentation[keep]
        return Detections(self.boxes[keep], self.scores[keep], self.labels[keep], masks, self.class_names)

    def covered(self, size: tuple[int, int], picture: tuple[int, int]) -> dict[str, np.ndarray]:
        """What the objects of each class cover: (height, width) bool of a picture, by the name of the class.

        It is what their masks cover or, where the network has none, their boxes.

        Args:
            size: height and width of the image.
            picture: width and height of the picture, as `draw` makes one of the image.
        """
        y, x = np.ogrid[: size[0], : size[1]]
        covered: dict[str, np.ndarray] = {}
        for i, (name, (x1, y1, x2, y2)) in enumerate(zip(self.names, self.boxes, strict=True)):
            box = (x1 <= x) & (x < x2) & (y1 <= y) & (y < y2)
            covered[name] = covered.get(name, False) | (box if self.segmentation is None else self.segmentation[i])
        return {name: resized(mask, picture) for name, mask in covered.items()}

    def lines(self) -> list[str]:
        """The objects as text, in the columns of `HEADER`."""
        return [
            f"{100 * score:6.2f} %  {name}  {' '.join(f'{x:.0f}' for x in box)}"
            for name, score, box in zip(self.names, self.scores.tolist(), self.boxes.tolist(), strict=True)
        ]

    def draw(self, pixels: np.ndarray, *, threshold: float = 0.5, longest: int | None = None) -> "Image.Image":
        """The image with boxes, masks, names and scores of the objects whose score is at least `threshold`.

        Args:
            pixels: uint8 (H, W, 3), the image itself.
            threshold: in 0..1.
            longest: pixels of the picture's longer side; None: as the image, but at least what shows so many objects.
        """
        masks, names = self.segmentation, self.names
        drawn = [
            Drawn(
                self.boxes[i].tolist(),
                f"{names[i]}: {100 * self.scores[i]:.0f} %",
                class_colour(self.labels[i]),
                None if masks is None else functools.partial(masks.__getitem__, i),
            )
            for i in np.flatnonzero(self.scores >= threshold)
        ]
        return draw_objects(pixels, drawn, longest)
