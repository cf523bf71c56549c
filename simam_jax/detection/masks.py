"""The masks that a detector gives, brought into the image one at a time: together they are a gigabyte of a large photograph."""

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from simam_jax.rcnn.masks import paste

_WINDOWS = (
    128,
    512,
    1024,
    2048,
)  # pixels: masks are pasted into squares of few sizes, or the whole image; each is compiled


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
        return self._pasted(int(rows), np.zeros(self.size, bool, order="F"))  # the order of run lengths

    def _pasted(self, i: int, onto: np.ndarray) -> np.ndarray:
        """Writes a mask onto an image (H, W) of False. Only a window around its box is computed."""
        x1, y1, x2, y2 = self._boxes[i]
        lows = np.maximum(np.floor((y1, x1)).astype(int) - 1, 0)  # what `paste` writes
        highs = np.minimum(np.ceil((y2, x2)).astype(int) + 1, self.size)
        whole = tuple(-(-length // 256) * 256 for length in self.size)
        side = next((side for side in _WINDOWS if side >= (highs - lows).max()), max(whole))
        window = tuple(min(side, length) for length in whole)
        bits = np.asarray(_paste(self._probabilities[i], self._boxes[i], jnp.asarray(lows), window))
        height, width = np.maximum(highs - lows, 0)
        part = np.unpackbits(bits[:height], axis=-1, count=width)
        onto[lows[0] : lows[0] + height, lows[1] : lows[1] + width] = part.view(bool)
        return onto

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        if copy is False:
            raise ValueError("masks are pasted when they are looked at: there is no array that is not a copy")
        whole = np.zeros((len(self), *self.size), bool)
        for i, image in enumerate(whole):
            self._pasted(i, image)
        return whole if dtype is None else whole.astype(dtype, copy=False)


@functools.partial(jax.jit, static_argnums=3)
def _paste(mask: jax.Array, box: jax.Array, corner: jax.Array, size: tuple[int, int]) -> jax.Array:
    return paste(mask[None], box[None], corner, size=size)[0]
