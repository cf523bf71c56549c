"""The masks that a detector gives, brought into the image."""

import jax
import numpy as np
from jax.typing import ArrayLike

from simam_jax.rcnn.masks import paste

_CANVAS = 256  # pixels: masks are pasted into images whose sides are multiples of it, so that few shapes are compiled
_TOGETHER = 20  # pasted at a time: one of a large photograph is megabytes


def in_image(probabilities: ArrayLike, boxes: ArrayLike, count: int, size: tuple[int, int]) -> np.ndarray:
    """(count, H, W) bool: the masks in an image of `size`, height and width.

    Args:
        probabilities: (D, 28, 28) float32, over each box.
        boxes: (D, 4) in the image's pixels.
        count: how many are real.
        size: of the image.
    """
    probabilities, boxes = np.asarray(probabilities), np.asarray(boxes)
    height, width = size
    canvas = tuple(-(-side // _CANVAS) * _CANVAS for side in size)
    packed = [
        _paste(probabilities[i : i + _TOGETHER], boxes[i : i + _TOGETHER], canvas) for i in range(0, count, _TOGETHER)
    ]
    bits = np.concatenate([np.zeros((0, canvas[0], canvas[1] // 8), np.uint8), *map(np.asarray, packed)])[:count]
    return np.unpackbits(bits, axis=-1, count=canvas[1])[:, :height, :width].astype(bool)


_paste = jax.jit(lambda masks, boxes, size: paste(masks, boxes, size=size), static_argnums=2)
