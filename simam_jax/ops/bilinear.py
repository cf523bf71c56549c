"""Bilinear resizing of uint8 images, to the bit as OpenCV does it: the reference implementation's pixels of detectors.

It is not antialiased. Sums are integers, so that every platform computes the same.
"""

import numpy as np

_ONE = 2048  # what a weight of 1 is


def resize_bilinear(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """uint8 (H, W, C) to uint8 (*size, C); size is height and width."""
    rows, columns = (_taps(n, m) for n, m in zip(pixels.shape[:2], size, strict=True))
    first, second, low, high = columns
    # A column at the border is taken whole, a row is the sum of two parts of itself, which are rounded on their own.
    low, high = np.where(first == second, _ONE, low), np.where(first == second, 0, high)
    # Only the rows that the result depends on are resized.
    needed, places = np.unique(np.concatenate(rows[:2]), return_inverse=True)
    some = pixels[needed].astype(np.int32)
    wide = (some[:, first] * low[:, None] + some[:, second] * high[:, None]) >> 4
    top, bottom = np.split(places, 2)
    _, _, low, high = (weights[:, None, None] for weights in rows)
    return ((((low * wide[top]) >> 16) + ((high * wide[bottom]) >> 16) + 2) >> 2).astype(np.uint8)


def _taps(length: int, resized: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """For each place of the result its two sources and their weights, int32 (resized,)."""
    position = ((np.arange(resized) + 0.5) * (length / resized) - 0.5).astype(np.float32)
    first = np.floor(position).astype(np.int32)
    share = position - first.astype(np.float32)
    high = np.rint(share * _ONE).astype(np.int32)
    low = np.rint((1 - share) * _ONE).astype(np.int32)
    return first.clip(0, length - 1), (first + 1).clip(0, length - 1), low, high
