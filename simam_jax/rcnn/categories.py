"""The numbers of COCO's categories, which leave some out."""

from collections.abc import Sequence
from importlib import resources

_UNUSED = (12, 26, 29, 30, 45, 66, 68, 69, 71, 83)


def coco_category_ids(class_names: Sequence[str]) -> list[int] | None:
    """COCO's numbers of its own 80 classes; None if these are others."""
    coco = (resources.files("simam_jax") / "coco_classes.txt").read_text().splitlines()
    return [i for i in range(1, 91) if i not in _UNUSED] if list(class_names) == coco else None
