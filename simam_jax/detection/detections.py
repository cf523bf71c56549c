"""The results of a detector for one image, which render themselves: as rows for programs, lines and pictures for people."""

import colorsys
import dataclasses
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from PIL import Image

OPACITY = 0.45  # of a mask over the image


@dataclasses.dataclass(frozen=True)
class Detections:
    """The n objects found in an image, the most certain first.

    Attributes:
        boxes: (n, 4) float32, x1 y1 x2 y2 in the image's own pixels.
        scores: (n,) float32 in 0..1.
        labels: (n,) int32 in 0..num_classes - 1.
        masks: (n, H, W) bool in the image's size; None where the network has no masks.
        class_names: one for each class.
    """

    boxes: np.ndarray
    scores: np.ndarray
    labels: np.ndarray
    masks: np.ndarray | None
    class_names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.scores)

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
        if self.masks is not None:
            for row, mask in zip(rows, self.masks, strict=True):
                row["area"] = int(mask.sum())
        return rows

    def lines(self) -> list[str]:
        """The objects as text: ` 97.03 %  name  x1 y1 x2 y2`."""
        return [
            f"{100 * row['score']:6.2f} %  {row['class']}  {' '.join(f'{x:.0f}' for x in row['box'])}"
            for row in self.rows()
        ]

    def draw(self, pixels: np.ndarray, *, threshold: float = 0.5) -> "Image.Image":
        """The image with boxes, masks, names and scores of the objects whose score is at least `threshold`.

        Args:
            pixels: uint8 (H, W, 3), the image itself.
            threshold: in 0..1.
        """
        from PIL import Image, ImageDraw

        shown = [i for i in range(len(self)) if self.scores[i] >= threshold]
        canvas = pixels.astype(np.float32)
        masks = [] if self.masks is None else [(self.masks[i], _colour(self.labels[i])) for i in reversed(shown)]
        for mask, colour in masks:
            canvas[mask] = (1 - OPACITY) * canvas[mask] + OPACITY * np.array(colour)
        image = Image.fromarray(canvas.round().astype(np.uint8))
        pen, width = ImageDraw.Draw(image), max(1, round(min(image.size) / 300))
        for i in reversed(shown):
            colour, (x1, y1, x2, y2) = _colour(self.labels[i]), self.boxes[i].tolist()
            pen.rectangle((x1, y1, max(x1, x2), max(y1, y2)), outline=colour, width=width)
            text, size = f"{self.names[i]} {100 * self.scores[i]:.0f} %", max(10, min(image.size) // 40)
            left, top, right, bottom = pen.textbbox((x1, max(y1 - 1.2 * size, 0)), text, font_size=size)
            pen.rectangle((left - 1, top - 1, right + 1, bottom + 1), fill=colour)
            pen.text((x1, max(y1 - 1.2 * size, 0)), text, fill="white", font_size=size)
        return image


def _colour(label: int) -> tuple[int, int, int]:
    """One colour for each class, neighbours far apart."""
    red, green, blue = colorsys.hsv_to_rgb(0.618034 * int(label) % 1, 0.85, 0.8)
    return round(255 * red), round(255 * green), round(255 * blue)
