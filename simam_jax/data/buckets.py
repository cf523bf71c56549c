"""The order of detectors' images, of several shapes: batches of one shape each, a function of seed, update, batch and shapes."""

import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

Shape = tuple[int, int]  # height and width in pixels


class Draw(NamedTuple):
    """The example that a row shows, and the epoch it was drawn in; with the seed these decide its augmentation."""

    epoch: int
    index: int


def merged(shapes: Sequence[Shape], least: int) -> list[Shape]:
    """The shapes, without those that fewer than `least` images have: they take the next larger one that holds them.

    Else their images would wait for others to make a batch with, and each shape is a compilation.
    """
    shapes = list(shapes)
    while True:
        counts = Counter(shapes)
        rare = [shape for shape in sorted(counts, key=_area) if counts[shape] < least]
        if not rare or len(counts) == 1:
            return shapes
        small = rare[0]
        larger = [s for s in counts if s != small and s[0] >= small[0] and s[1] >= small[1]]
        if larger:
            place = min(larger, key=_area)
        else:  # it is the largest one of its kind: with the nearest other one it makes a shape that holds both
            other = min((s for s in counts if s != small), key=lambda s: _area(_around(s, small)))
            place = _around(small, other)
            shapes = [place if s == other else s for s in shapes]
        shapes = [place if s == small else s for s in shapes]


def _area(shape: Shape) -> int:
    return shape[0] * shape[1]


def _around(a: Shape, b: Shape) -> Shape:
    return max(a[0], b[0]), max(a[1], b[1])


def permutation(num_examples: int, seed: int, epoch: int) -> np.ndarray:
    """The order of an epoch, int64 (num_examples,)."""
    return np.random.Generator(np.random.Philox(key=np.array([seed, epoch], np.uint64))).permutation(num_examples)


def training_order(shapes: Sequence[Shape], batch_size: int, seed: int) -> Iterator[list[Draw]]:
    """Without end, the draws of each batch.

    Every epoch queues every image once, in the order of its `permutation`. A batch is given as soon as `batch_size` images
    of one shape wait; images still waiting when an epoch ends are shown in the next.
    """
    waiting: dict[Shape, list[Draw]] = {}
    for epoch in itertools.count():
        for index in permutation(len(shapes), seed, epoch).tolist():
            queue = waiting.setdefault(shapes[index], [])
            queue.append(Draw(epoch, index))
            if len(queue) == batch_size:
                yield waiting.pop(shapes[index])


def evaluation_order(shapes: Sequence[Shape], batch_size: int) -> Iterator[tuple[list[Draw], int]]:
    """The draws of each batch of one pass, and how many are real: the last batch of a shape repeats an image to be full."""
    members: dict[Shape, list[Draw]] = {}
    for index, shape in enumerate(shapes):
        members.setdefault(shape, []).append(Draw(0, index))
    for shape in sorted(members):
        for first in range(0, len(members[shape]), batch_size):
            rows = members[shape][first : first + batch_size]
            yield [*rows, *itertools.repeat(rows[-1], batch_size - len(rows))], len(rows)
