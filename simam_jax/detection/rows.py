"""From an example to a row of a batch: its image resized, padded to a bucket, mirrored; boxes and masks with it.

Pixels are the reference implementation's: OpenCV's bilinear resize of uint8, masks by the nearest pixel. Normalising is
left to the device.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from simam_jax.data.detection_sources import Example
from simam_jax.errors import UserError
from simam_jax.preprocessing import DetectionPreprocessing, read_upright

Row = dict[str, np.ndarray]


@dataclass(frozen=True)
class Layout:
    """What rows of one kind look like.

    Attributes:
        shape: height and width that images are padded to.
        most_objects: rows of boxes, labels and masks.
        masks: whether there are masks.
    """

    shape: tuple[int, int]
    most_objects: int
    masks: bool


@dataclass(frozen=True)
class View:
    """How an image is shown: what augmentation draws.

    Attributes:
        mirrored: left and right are exchanged.
        scale: of the resized image's sides.
        corner: where the part that fits into the shape begins, in 0..1 of what does not fit: down, right.
    """

    mirrored: bool = False
    scale: float = 1.0
    corner: tuple[float, float] = (0.0, 0.0)


def train_row(example: Example, preprocessing: DetectionPreprocessing, layout: Layout, view: View) -> Row:
    """The image and its objects.

    Returns:
        image: uint8 (*shape, 3), zeros beyond the image. image_size: int32 (2,), without padding. boxes: float32 (G, 4) in
        these pixels, cut to the image; labels: int32 (G,); count: int32 (), how many are real; where the scale is jittered,
        objects of which less than a pixel in width or height is left are dropped. masks: uint8 (G, H, ceil(W / 8)), packed bits.

    Raises:
        UserError: the image cannot be read, is not of the size that the data say, or its masks are not.
    """
    pixels = pixels_of(example)
    size = pixels.shape[:2]
    resized = _scaled(preprocessing.resized(*size), view.scale)
    top, left = (round(share * max(n - m, 0)) for share, n, m in zip(view.corner, resized, layout.shape, strict=True))
    height, width = (min(n, m) for n, m in zip(resized, layout.shape, strict=True))
    image = np.zeros((*layout.shape, 3), np.uint8)
    image[:height, :width] = _mirrored(_resize(pixels, resized)[top : top + height, left : left + width], view, 1)

    scale = np.array([resized[1] / size[1], resized[0] / size[0]] * 2, np.float32)
    boxes = example.boxes.astype(np.float32) * scale - np.array([left, top] * 2, np.float32)
    boxes = boxes.clip(0, np.array([width, height] * 2, np.float32))
    if view.mirrored:
        boxes = np.stack((width - boxes[:, 2], boxes[:, 1], width - boxes[:, 0], boxes[:, 3]), -1)
    unscaled = view.scale == 1.0
    kept = np.flatnonzero(unscaled | ((boxes[:, 2] - boxes[:, 0] >= 1) & (boxes[:, 3] - boxes[:, 1] >= 1)))
    row = {
        "image": image,
        "image_size": np.array([height, width], np.int32),
        "boxes": _filled(boxes[kept], layout.most_objects),
        "labels": _filled(example.labels[kept].astype(np.int32), layout.most_objects),
        "count": np.array(len(kept), np.int32),
    }
    if layout.masks:
        packed = np.zeros((layout.most_objects, layout.shape[0], -(-layout.shape[1] // 8)), np.uint8)
        if len(kept):
            if example.masks is None:
                raise UserError("The image has objects without masks, which a Mask R-CNN learns from.")
            masks = example.masks()[kept]
            if masks.shape[1:] != size:
                raise UserError(f"The masks are {masks.shape[1:]} and the image is {size} (height, width).")
            rows, columns = (_nearest(n, m) for n, m in zip(size, resized, strict=True))
            columns = _mirrored(columns[left : left + width], view, 0)
            # Columns first, then rows of packed bits: those are few bytes, and the image usually grows.
            bits = np.packbits(np.take(masks, columns, axis=2), axis=-1)
            packed[: len(kept), :height, : bits.shape[-1]] = bits[:, rows[top : top + height]]
        row["masks"] = packed
    return row


def eval_row(example: Example, preprocessing: DetectionPreprocessing, shape: tuple[int, int]) -> Row:
    """The image: `image` and `image_size` as of `train_row`, and `original_size`, int32 (2,), as it was read."""
    pixels = pixels_of(example)
    resized = preprocessing.resized(*pixels.shape[:2])
    image = np.zeros((*shape, 3), np.uint8)
    image[: resized[0], : resized[1]] = _resize(pixels, resized)
    return {
        "image": image,
        "image_size": np.array(resized, np.int32),
        "original_size": np.array(pixels.shape[:2], np.int32),
    }


def pixels_of(example: Example) -> np.ndarray:
    """uint8 (H, W, 3), as the annotations see the image.

    Raises:
        UserError: the image cannot be read, or is not of the size that the data say.
    """
    pixels = np.asarray(read_upright(example.image, example.size))
    if pixels.shape[:2] != example.size:
        rotated = pixels.shape[1::-1] == example.size
        raise UserError(
            f"The file has {pixels.shape[0]} x {pixels.shape[1]} pixels, and the annotations say {example.size[0]} x "
            f"{example.size[1]} (height, width)"
            + (": it lies on its side, without an EXIF tag that says so. Save it upright." if rotated else ".")
        )
    return pixels


def _resize(pixels: np.ndarray, size: Sequence[int]) -> np.ndarray:
    import cv2

    return cv2.resize(pixels, (size[1], size[0]), interpolation=cv2.INTER_LINEAR)


def _scaled(size: tuple[int, int], scale: float) -> tuple[int, int]:
    return (max(round(size[0] * scale), 1), max(round(size[1] * scale), 1))


def _nearest(length: int, resized: int) -> np.ndarray:
    """For each place of the result its source, as OpenCV's INTER_NEAREST chooses it."""
    return np.minimum(np.floor(np.arange(resized) * (1 / (resized / length))).astype(np.int64), length - 1)


def _mirrored(x: np.ndarray, view: View, axis: int) -> np.ndarray:
    return np.flip(x, axis) if view.mirrored else x


def _filled(x: np.ndarray, count: int) -> np.ndarray:
    filled = np.zeros((count, *x.shape[1:]), x.dtype)
    filled[: len(x)] = x
    return filled
