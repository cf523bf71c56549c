"""The masks that a detector gives, brought into the image one at a time: together they are a gigabyte of a large photograph."""

from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.typing import ArrayLike

from simam_jax.rcnn.masks import paste

_CANVAS = 256  # pixels: masks are pasted into images whose sides are multiples of it, so that few shapes are compiled


class Masks:
    """Stands for an array (n, H, W) bool and takes a few kilobytes a mask: one is pasted when it is looked at.

    `masks[i]` and iteration give masks (H, W), `masks[rows]` fewer `Masks`, `np.asarray(masks)` the array itself.
    """

    def __init__(self, probabilities: ArrayLike, boxes: ArrayLike, size: tuple[int, int]):
        """Args:
        probabilities: (n, 28, 28) float32, over each box.
        boxes: (n, 4) in the image's pixels.
        size: height and width of the image.
        """
        self._probabilities, self._boxes, self.size = np.asarray(probabilities), np.asarray(boxes), size

    def __len__(self) -> int:
        return len(self._probabilities)

    def __iter__(self) -> Iterator[np.ndarray]:
        return (self[i] for i in range(len(self)))

    def __getitem__(self, rows: Any) -> Any:
        """A mask, of an integer; else the masks that a slice, or an array as NumPy takes it, names."""
        if not isinstance(rows, int | np.integer):
            return Masks(self._probabilities[rows], self._boxes[rows], self.size)
        canvas = tuple(-(-side // _CANVAS) * _CANVAS for side in self.size)
        packed = _paste(self._probabilities[rows], self._boxes[rows], canvas)
        height, width = self.size
        return np.unpackbits(np.asarray(packed)[:height], axis=-1, count=width).view(bool)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        if copy is False:
            raise ValueError("masks are pasted when they are looked at: there is no array that is not a copy")
        whole = np.empty((len(self), *self.size), bool if dtype is None else dtype)
        for i, mask in enumerate(self):
            whole[i] = mask
        return whole


_paste = jax.jit(lambda mask, box, size: paste(mask[None], box[None], size=size)[0], static_argnums=2)
