"""An object's mask from what a json of COCO's form holds of it: polygons, run lengths or compressed run lengths."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from simam_jax.errors import UserError, naming_extras


def mask_of(segmentation: Any, height: int, width: int) -> np.ndarray:
    """(height, width) bool, as pycocotools reads it. What would make it read or write beyond its memory is refused before.

    Raises:
        UserError: it is none of the three, or of another size.
    """
    with naming_extras():
        from pycocotools import mask

    try:
        if isinstance(segmentation, list):
            if not all(abs(x) <= 10 * max(height, width) for polygon in segmentation for x in polygon):
                raise UserError(f"A polygon leaves its image of {width} x {height} pixels by far, or is not finite.")
            rle = mask.merge(mask.frPyObjects(segmentation, height, width))
        elif isinstance(segmentation, Mapping):
            if list(segmentation["size"]) != [height, width]:
                raise UserError(f"A mask is of {segmentation['size']}, and its image of [{height}, {width}] pixels.")
            counts = segmentation["counts"]
            runs = counts if isinstance(counts, list) else run_lengths(counts)
            if min(runs, default=-1) < 0 or sum(runs) != height * width:
                raise UserError(f"The run lengths of a mask do not add up to its {height * width} pixels.")
            whole: Any = segmentation
            rle = mask.frPyObjects(whole, height, width) if isinstance(counts, list) else whole
        else:
            raise UserError(f"A segmentation is {type(segmentation).__name__}, neither polygons nor run lengths.")
        return mask.decode(rle).astype(bool)
    except UserError:
        raise
    except Exception as error:  # pycocotools raises anything
        raise UserError(f"A segmentation cannot be read: {error or type(error).__name__}.") from error


def run_lengths(compressed: str | bytes) -> list[int]:
    """The run lengths in COCO's compressed form.

    A character holds five bits, the lowest first, above 48; its sixth says that more follow, and the last one's fifth that
    the number is negative. From the fourth on a number is the difference to the one two before it.

    Raises:
        UserError: it is cut short, or holds other characters.
    """
    runs: list[int] = []
    value = shift = 0
    for character in compressed.encode("latin-1", "replace") if isinstance(compressed, str) else compressed:
        bits = character - 48
        if not 0 <= bits < 64:
            raise UserError(f"The compressed run lengths of a mask hold the character {chr(character)!r}.")
        value |= (bits & 31) << shift
        shift += 5
        if not bits & 32:
            if bits & 16:
                value -= 1 << shift
            runs.append(value + (runs[-2] if len(runs) > 2 else 0))
            value = shift = 0
    if shift:
        raise UserError("The compressed run lengths of a mask are cut short.")
    return runs
