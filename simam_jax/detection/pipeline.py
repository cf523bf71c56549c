"""Batches of a detector: which images they show and the rows that come of it."""

from collections import Counter
from collections.abc import Iterator

import jax
import numpy as np
from ml_collections import ConfigDict

from simam_jax.data import buckets, host_share, loading
from simam_jax.data.buckets import Draw, Shape
from simam_jax.data.detection_sources import Examples
from simam_jax.data.unreadable import Unreadable
from simam_jax.detection.rows import Layout, View, eval_row, train_row
from simam_jax.errors import UserError
from simam_jax.preprocessing import DetectionPreprocessing
from simam_jax.task import Batch, eval_batch_size

Row = dict[str, np.ndarray]


class Training:
    """The training batches of a run: a pure function of (seed, update)."""

    def __init__(self, config: ConfigDict, examples: Examples, preprocessing: DetectionPreprocessing, *, masks: bool):
        self._config, self._examples, self._preprocessing, self._masks = config, examples, preprocessing, masks
        own = [_bucket(preprocessing, size) for size in examples.sizes]
        self._shapes = buckets.merged(own, config.batch_size)
        self.most_objects = max(examples.most_objects, 1)

    def counts(self) -> dict[Shape, int]:
        """How many images each shape has."""
        return dict(sorted(Counter(self._shapes).items()))

    def example(self) -> tuple[dict[str, jax.ShapeDtypeStruct], ...]:
        """A row of each shape, the most frequent one first."""
        most, rows = self.most_objects, []
        for (height, width), _ in Counter(self._shapes).most_common():
            row = {
                "image": jax.ShapeDtypeStruct((height, width, 3), np.uint8),
                "image_size": jax.ShapeDtypeStruct((2,), np.int32),
                "boxes": jax.ShapeDtypeStruct((most, 4), np.float32),
                "labels": jax.ShapeDtypeStruct((most,), np.int32),
                "count": jax.ShapeDtypeStruct((), np.int32),
            }
            if self._masks:
                row["masks"] = jax.ShapeDtypeStruct((most, height, -(-width // 8)), np.uint8)
            rows.append(row)
        return tuple(rows)

    def batches(self, start_step: int) -> Iterator[Batch]:
        """This host's part of the batches from an update on, without end.

        Raises:
            UserError: the hosts cannot share a batch, or too many images cannot be read.
        """
        if not len(self._examples):
            raise UserError("There are no training images: name --config.data.train_annotations and train_images.")
        share, first = host_share(self._config.batch_size, jax.process_count()), jax.process_index()
        following = _next_of_the_same(self._shapes)
        unreadable = Unreadable(self._examples.name, len(self._examples), self._config.data.max_unreadable)
        read = loading.mending(self._row, following.__getitem__, unreadable)
        own = (draws[first * share : (first + 1) * share] for draws in self._order(start_step))
        return loading.batches(own, read, ahead=self._config.data.prefetch)

    def names(self, step: int) -> str:
        """The images of an update, for a message."""
        return ", ".join(self._examples.name(draw.index) for draw in next(self._order(step)))

    def _order(self, start_step: int) -> Iterator[list[Draw]]:
        order = buckets.training_order(self._shapes, self._config.batch_size, self._config.seed)
        for _ in range(start_step):
            next(order)
        return order

    def _row(self, draw: Draw) -> Row:
        layout = Layout(self._shapes[draw.index], self.most_objects, self._masks)
        return train_row(self._examples.read(draw.index), self._preprocessing, layout, self._view(draw))

    def _view(self, draw: Draw) -> View:
        data, low_high = self._config.data, self._config.detection.scale_jitter
        key = np.array([self._config.seed, (draw.epoch << 32) + draw.index + (1 << 63)], np.uint64)
        uniform = np.random.Generator(np.random.Philox(key=key)).uniform(size=4)
        low, high = low_high
        return View(
            mirrored=bool(data.flip and uniform[0] < 0.5),
            scale=float(low * (high / low) ** uniform[1]),
            corner=(float(uniform[2]), float(uniform[3])),
        )


def eval_batches(config: ConfigDict, examples: Examples, preprocessing: DetectionPreprocessing) -> Iterator[Batch]:
    """This host's part of the batches of one pass: `image`, `image_size`, `original_size`, `index` and `mask`.

    Raises:
        UserError: also for an image that cannot be read; the message names it.
    """
    size = eval_batch_size(config)
    share, first = host_share(size, jax.process_count()), jax.process_index()
    shapes = [_bucket(preprocessing, each) for each in examples.sizes]
    batches = list(buckets.evaluation_order(shapes, size))

    read = loading.mending(
        lambda draw: eval_row_of(examples, preprocessing, draw.index),
        lambda index: index,  # none is replaced
        Unreadable(examples.name, len(examples), max_unreadable=None),
    )
    own = slice(first * share, (first + 1) * share)
    rows = loading.batches((draws[own] for draws, _ in batches), read, ahead=config.data.prefetch)
    for batch, (_, real) in zip(rows, batches, strict=True):
        yield {**batch, "mask": (np.arange(size)[own] < real).astype(np.float32)}


def eval_row_of(examples: Examples, preprocessing: DetectionPreprocessing, index: int) -> Row:
    """The row of an evaluation image."""
    row = eval_row(examples.read(index), preprocessing, _bucket(preprocessing, examples.sizes[index]))
    return {**row, "index": np.array(index, np.int32)}


def _bucket(preprocessing: DetectionPreprocessing, size: np.ndarray) -> Shape:
    height, width = size.tolist()
    return preprocessing.bucket(*preprocessing.resized(height, width))


def _next_of_the_same(shapes: list[Shape]) -> list[int]:
    """For every image the next one of the same shape, in a circle."""
    members: dict[Shape, list[int]] = {}
    for index, shape in enumerate(shapes):
        members.setdefault(shape, []).append(index)
    following = [0] * len(shapes)
    for own in members.values():
        for index, after in zip(own, own[1:] + own[:1], strict=True):
            following[index] = after
    return following
