"""Batches of detectors' examples, which Python reads: by several threads, in order; what cannot be read is replaced or an error.

Decoding and resizing release the interpreter's lock. `data.batches` does the same for classifiers' records.
"""

import collections
import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from simam_jax.data.buckets import Draw
from simam_jax.data.unreadable import Unreadable
from simam_jax.errors import UserError

Row = dict[str, np.ndarray]


def batches(
    draws: Iterator[Sequence[Draw]], read: Callable[[Draw], Row], *, ahead: int, threads: int | None = None
) -> Iterator[Row]:
    """For each of `draws` what `read` makes of its rows, stacked; in order.

    Args:
        draws: of each batch its rows.
        read: pure, called by several threads at once.
        ahead: batches that are read while one is used.
        threads: None: one for each CPU.
    """
    pool = ThreadPoolExecutor(threads or os.cpu_count(), thread_name_prefix="read")
    pending: collections.deque[list[Future[Row]]] = collections.deque()

    def send(count: int) -> None:
        pending.extend([pool.submit(read, draw) for draw in batch] for batch in itertools.islice(draws, count))

    try:
        send(ahead + 1)
        while pending:
            rows = [future.result() for future in pending.popleft()]
            send(1)
            yield {name: np.stack([row[name] for row in rows]) for name in rows[0]}
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def mending(
    read: Callable[[Draw], Row], following: Callable[[int], int], unreadable: Unreadable
) -> Callable[[Draw], Row]:
    """A `read` that shows the next readable example of the same shape instead of one that cannot be read.

    So a stream stays a function of the files and the draws.

    Args:
        read: raises `UserError` for an example that cannot be read.
        following: the example that is shown instead of another.
        unreadable: is told of each, and raises when they are too many.
    """

    def mended(draw: Draw) -> Row:
        while True:
            try:
                return read(draw)
            except UserError as error:
                unreadable.report(draw.index, error)
                draw = draw._replace(index=following(draw.index))

    return mended
