"""The results of a classifier for some images, which render themselves: as rows for programs, lines and pictures for people.

Results of every task have `rows`, `lines` and `draw`, so that the commands have no copy for each task.
"""

import dataclasses
from typing import TYPE_CHECKING, Any

import numpy as np

from simam_jax import errors

if TYPE_CHECKING:
    from PIL import Image

SHOWN = 336  # pixels: the least width of a picture for people


@dataclasses.dataclass(frozen=True)
class Predictions:
    """The classes of N images.

    Attributes:
        probabilities: (N, classes) float32.
        class_names: one for each column.
    """

    probabilities: np.ndarray
    class_names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.probabilities)

    def top(self, k: int = 5) -> list[list[tuple[str, float]]]:
        """The k likeliest classes of every image with their probabilities, the likeliest first.

        Raises:
            UserError: k is less than 1, or a probability is not finite.
        """
        if k < 1:
            raise errors.UserError(f"top needs at least 1 class, got {k}.")
        if not np.isfinite(self.probabilities).all():
            raise errors.UserError(
                "The network's probabilities are not finite, so no class is the likeliest: its weights are damaged, or "
                "its training diverged, or its dtype overflows."
            )
        order = np.argsort(-self.probabilities, axis=1, kind="stable")[:, :k]
        return [
            [(self.class_names[i], float(row[i])) for i in best]
            for row, best in zip(self.probabilities, order, strict=True)
        ]

    def rows(self, k: int = 5) -> list[list[dict[str, Any]]]:
        """The k likeliest classes of every image as JSON: `{"class": name, "probability": p}`, the likeliest first."""
        return [[{"class": name, "probability": p} for name, p in best] for best in self.top(k)]

    def lines(self, k: int = 5) -> list[list[str]]:
        """The k likeliest classes of every image as text: ` 97.03 %  name`, the likeliest first."""
        return [[f"{100 * p:6.2f} %  {name}" for name, p in best] for best in self.top(k)]

    def draw(self, pixels: np.ndarray) -> "list[Image.Image]":
        """The images at least `SHOWN` pixels wide. Nothing is drawn on them because a class has no place in an image.

        Args:
            pixels: uint8 (N, S, S, 3), what the network saw.
        """
        from PIL import Image

        images = map(Image.fromarray, pixels)
        return [i.resize((SHOWN, SHOWN), Image.Resampling.BICUBIC) if i.width < SHOWN else i for i in images]
