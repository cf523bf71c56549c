"""Scenes of handwritten digits on photographs, as a TFDS data set: boxes, masks and classes known exactly, no download."""

import io
from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from ml_collections import ConfigDict
from PIL import Image

from simam_jax.data import digits
from simam_jax.data.detection_sources import Example, Examples
from simam_jax.data.tfds import prepared

SIZE = 128  # pixels, height and width of a scene
NUM_SCENES = {"train": 1600, "test": 200}
MOST_DIGITS = 6  # in a scene
SIDES = (28, 64)  # pixels of a digit, between these
LEAST_VISIBLE = 0.7  # of a digit's pixels, or it is not put there
STROKE = 96  # from which grey value on a pixel belongs to the digit


class DigitScenes(tfds.core.GeneratorBasedBuilder):
    """Scikit-learn's digits (UCI, Alpaydin and Kaynak 1998), at random sizes and places on crops of its two photographs.

    Scenes for the test show test digits (those of `digits.Digits`) on other parts of the photographs. `instances` has the
    number of the digit that is seen in a pixel, counted from 1 as in `labels`, or 0: a digit's mask is what is seen of it.
    """

    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> tfds.core.DatasetInfo:
        return self.dataset_info_from_configs(
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(SIZE, SIZE, 3), encoding_format="png"),
                    "instances": tfds.features.Image(shape=(SIZE, SIZE, 1), encoding_format="png"),
                    "labels": tfds.features.Sequence(tfds.features.ClassLabel(num_classes=10)),
                }
            ),
            homepage="https://scikit-learn.org/stable/modules/generated/sklearn.datasets.load_digits.html",
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Any]:  # noqa: ARG002
        return {split: self._generate_examples(split) for split in NUM_SCENES}

    def _generate_examples(self, split: str) -> Iterator[tuple[int, dict[str, Any]]]:
        images, labels, test = digits.load_split()
        chosen = np.flatnonzero(test if split == "test" else ~test)
        backgrounds = _backgrounds(split)
        for number in range(NUM_SCENES[split]):
            rng = np.random.default_rng((list(NUM_SCENES).index(split), number))
            image, instances, shown = scene(rng, images[..., 0], chosen, backgrounds)
            yield (
                number,
                {"image": image, "instances": instances[..., None], "labels": labels[shown].tolist()},
            )


def scene(
    rng: np.random.Generator, images: np.ndarray, chosen: np.ndarray, backgrounds: list[np.ndarray]
) -> tuple[np.ndarray, np.ndarray, list[int]]:
    """A scene uint8 (SIZE, SIZE, 3), which digit is seen in each pixel, uint8 (SIZE, SIZE), and which digits those are.

    Args:
        rng: draws it.
        images: uint8 (n, 8, 8), all digits.
        chosen: which of them may appear.
        backgrounds: photographs, uint8 (H, W, 3).
    """
    ground = backgrounds[rng.integers(len(backgrounds))]
    top, left = (rng.integers(0, side - SIZE + 1) for side in ground.shape[:2])
    canvas = ground[top : top + SIZE, left : left + SIZE].astype(np.float32)
    instances, areas, shown = np.zeros((SIZE, SIZE), np.uint8), [], []
    for _ in range(rng.integers(1, MOST_DIGITS + 1)):
        digit, side = int(rng.choice(chosen)), int(rng.integers(SIDES[0], SIDES[1] + 1))
        ink = np.asarray(Image.fromarray(images[digit]).resize((side, side), Image.Resampling.BICUBIC))
        y, x = rng.integers(0, SIZE - side + 1, 2)
        window = np.s_[y : y + side, x : x + side]
        stroke = ink >= STROKE
        after = instances.copy()
        after[window][stroke] = len(shown) + 1
        seen = np.bincount(after.reshape(-1), minlength=len(shown) + 2)[1:]
        if not stroke.any() or (seen < LEAST_VISIBLE * np.array([*areas, stroke.sum()])).any():
            continue  # it would hide another one
        instances, areas = after, [*areas, stroke.sum()]
        shown.append(digit)
        around = canvas[window].mean()
        colour = rng.uniform(0, 90, 3) if around > 128 else rng.uniform(165, 255, 3)  # legible, whatever it lies on
        canvas[window][stroke] = colour
    return canvas.round().astype(np.uint8), instances, shown


def _backgrounds(split: str) -> list[np.ndarray]:
    """The left two thirds of scikit-learn's photographs for training, the rest for the test."""
    from sklearn.datasets import load_sample_images

    photographs = load_sample_images().images
    cut = [2 * photo.shape[1] // 3 for photo in photographs]
    return [p[:, c:] if split == "test" else p[:, :c] for p, c in zip(photographs, cut, strict=True)]


def open_scenes(config: ConfigDict, split: str) -> Examples:
    """The scenes of a split, "train" or "eval", prepared on first use: that takes seconds and no download."""
    builder = prepared("digit_scenes", config.data_dir)
    decoders = {name: tfds.decode.SkipDecoding() for name in ("image", "instances")}
    rows = list(
        tfds.as_numpy(builder.as_dataset(split="test" if split == "eval" else "train", decoders=decoders))  # pyright: ignore[reportCallIssue] (wrapped by TFDS)
    )  # some 30 kB each

    def read(index: int) -> Example:
        row = rows[index]
        labels = row["labels"].astype(np.int32)
        masks = _masks(row["instances"], len(labels))
        return Example(row["image"], (SIZE, SIZE), boxes_of(masks), labels, lambda: masks)

    def annotations() -> list[dict[str, Any]]:
        from pycocotools import mask

        found = []
        for index, row in enumerate(rows):
            example, masks = read(index), _masks(row["instances"], len(row["labels"]))
            rles: Any = mask.encode(np.asfortranarray(masks.transpose(1, 2, 0), dtype=np.uint8))
            for box, label, rle in zip(example.boxes.tolist(), example.labels.tolist(), rles, strict=True):
                x1, y1, x2, y2 = box
                of_image = {"image_id": index, "category_id": label, "iscrowd": 0, "area": int(mask.area(rle))}
                found.append(of_image | {"bbox": [x1, y1, x2 - x1, y2 - y1], "segmentation": rle})
        return found

    return Examples(
        sizes=np.full((len(rows), 2), SIZE, np.int32),
        image_ids=np.arange(len(rows)),
        class_names=tuple(map(str, range(10))),
        category_ids=np.arange(10),
        most_objects=MOST_DIGITS,
        read=read,
        name=lambda index: f"scene {index} of {split}",
        annotations=annotations,
    )


def boxes_of(masks: np.ndarray) -> np.ndarray:
    """(n, 4) float32 x1 y1 x2 y2: what masks (n, H, W), none of them empty, extend over."""

    def span(hit: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return hit.argmax(1), hit.shape[1] - hit[:, ::-1].argmax(1)

    (x1, x2), (y1, y2) = (span(np.asarray(masks.any(axis))) for axis in (1, 2))
    return np.stack((x1, y1, x2, y2), -1).astype(np.float32)


def _masks(encoded: bytes, count: int) -> np.ndarray:
    """(count, SIZE, SIZE) bool."""
    instances = np.asarray(Image.open(io.BytesIO(encoded)))
    return instances == np.arange(1, count + 1)[:, None, None]
