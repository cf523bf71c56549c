"""Masks of COCO's three forms: polygons, run lengths and compressed run lengths."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from simam_jax.errors import UserError, naming_extras


def mask_of(segmentation: Any, height: int, width: int) -> np.ndarray:
    """(height, width) bool, from polygons, run lengths or compressed run lengths, as pycocotools reads them.

    Raises:
        UserError: it is none of these, or of another size.
    """
    with naming_extras():
        from pycocotools import mask

    return mask.decode(rle_of(segmentation, height, width)).astype(bool)


def rle_of(segmentation: Any, height: int, width: int) -> Any:
    """Pycocotools' compressed run lengths of a mask in any of COCO's forms; what would lead it beyond its memory is refused.

    Raises:
        UserError: as of `mask_of`.
    """
    with naming_extras():
        from pycocotools import mask

    try:
        if isinstance(segmentation, list):
            # Coordinates far away make pycocotools write beyond its memory.
            if not all(abs(x) <= 10 * max(height, width) for polygon in segmentation for x in polygon):
                raise UserError(f"A polygon leaves its image of {width} x {height} pixels by far, or is not finite.")
            return mask.merge(mask.frPyObjects(segmentation, height, width))
        if not isinstance(segmentation, Mapping):
            raise UserError(f"A segmentation is {type(segmentation).__name__}, neither polygons nor run lengths.")
        if list(segmentation["size"]) != [height, width]:
            raise UserError(f"A mask is of {segmentation['size']}, and its image of [{height}, {width}] pixels.")
        counts = segmentation["counts"]
        runs = counts if isinstance(counts, list) else _run_lengths(counts)
        if min(runs, default=-1) < 0 or sum(runs) != height * width:
            raise UserError(f"The run lengths of a mask do not add up to its {height * width} pixels.")
        plain: Any = segmentation
        return mask.frPyObjects(plain, height, width) if isinstance(counts, list) else plain
    except UserError:
        raise
    except Exception as error:  # pycocotools raises anything
        text = str(error).rstrip(".") or type(error).__name__
        raise UserError(f"A segmentation cannot be read: {text}.") from error


def _run_lengths(counts: str | bytes) -> list[int]:
    """The run lengths in COCO's compressed text.

    A character has five bits of a number, the lowest first, and a sixth that says that more follow; the last bit is the sign.
    From the fourth on, a number is the difference to the one before the last.
    """
    digits = np.frombuffer(counts.encode() if isinstance(counts, str) else counts, np.uint8).astype(np.int64) - 48
    if not len(digits) or digits.min() < 0 or digits.max() > 63 or digits[-1] & 32:
        raise UserError("The compressed run lengths of a mask are cut short, or are none.")
    last = np.flatnonzero(~digits & 32)
    first = np.concatenate(([0], last[:-1] + 1))
    lengths = last - first + 1
    if lengths.max() > 7:
        raise UserError("The compressed run lengths of a mask have a number of more than 32 bits.")
    places = 5 * (np.arange(len(digits)) - np.repeat(first, lengths))
    runs = np.add.reduceat((digits & 31) << places, first) - ((digits[last] >> 4 & 1) << 5 * lengths)
    for start in (1, 2):
        runs[start::2] = runs[start::2].cumsum()
    return runs.tolist()
