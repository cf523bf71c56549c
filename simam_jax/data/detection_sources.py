"""The sources of detectors' data, by name in `config.data.source`, and what each opens: images with objects in them."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from simam_jax.errors import UserError, unknown
from simam_jax.preprocessing import ImageLike

SOURCES = ("coco", "tfds", "digit_scenes")


class Example(NamedTuple):
    """An image and the k objects to learn from, in its own pixels.

    Attributes:
        image: a file's path or its bytes.
        size: height and width that the data say it has, in pixels.
        boxes: (k, 4) float32, x1 y1 x2 y2.
        labels: (k,) int32 in 0..classes - 1.
        masks: makes (k, H, W) bool; None: there are none.
    """

    image: ImageLike
    size: tuple[int, int]
    boxes: np.ndarray
    labels: np.ndarray
    masks: Callable[[], np.ndarray] | None


@dataclass(frozen=True)
class Examples:
    """Random access to the examples of one split.

    Attributes:
        sizes: (n, 2) int32, height and width of every image in pixels.
        image_ids: (n,) int64, the images' names in results.
        class_names: of the labels.
        category_ids: (classes,) int64, the labels' names in results.
        most_objects: in an image.
        read: from an index to the example.
        name: from an index to what a message calls the example.
        annotations: the ground truth of all images for scoring, in COCO's form: see `detection.evaluation.Truth`.
    """

    sizes: np.ndarray
    image_ids: np.ndarray
    class_names: tuple[str, ...]
    category_ids: np.ndarray
    most_objects: int
    read: Callable[[int], Example]
    name: Callable[[int], str]
    annotations: Callable[[], list[dict[str, Any]]]

    def __len__(self) -> int:
        return len(self.sizes)

    def none(self) -> "Examples":
        """No examples, with the same classes."""
        return replace(self, sizes=self.sizes[:0], image_ids=self.image_ids[:0], most_objects=0)


def is_named(config: ConfigDict, split: str) -> bool:
    """Whether `config` (the section config.data) says where a split, "train" or "eval", is."""
    return bool(config.source != "coco" or config.data_dir or config[f"{split}_annotations"])


def open_examples(config: ConfigDict, split: str, *, masks: bool) -> Examples:
    """The examples of a split of the source that `config` (the section config.data) names.

    Args:
        config: says where they are.
        split: "train", of which what cannot be learned from is left out, or "eval".
        masks: whether they are needed.

    Raises:
        UserError: an unknown source, no examples, or what the reader of the source says.
    """
    if config.source not in SOURCES:
        raise unknown("config.data.source of a detector", config.source, SOURCES)
    if config.source == "coco":
        from simam_jax.data.coco import open_coco

        examples = open_coco(config, split, masks=masks)
    elif config.source == "tfds":
        from simam_jax.data.tfds_objects import open_objects

        examples = open_objects(config, split, masks=masks)
    else:
        from simam_jax.data.digit_scenes import open_scenes

        examples = open_scenes(config, split)
    if not len(examples):
        raise UserError(f"The {split} data of {config.source} have no images to use.")
    return examples
