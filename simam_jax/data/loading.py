"""Batches of examples that Python reads: by several threads, in order; what cannot be read is replaced or an error.

Decoding and resizing release the interpreter's lock. `batches` does the same for records that TensorFlow reads.
"""

import collections
import itertools
import logging
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from simam_jax.data.buckets import Place
from simam_jax.errors import UserError

Row = dict[str, np.ndarray]
logger = logging.getLogger(__name__)


def batches(
    places: Iterator[Sequence[Place]], read: Callable[[Place], Row], *, ahead: int, threads: int | None = None
) -> Iterator[Row]:
    """For each of `places` what `read` makes of its rows, stacked; in order.

    Args:
        places: of each batch its rows.
        read: pure, called by several threads at once.
        ahead: batches that are read while one is used.
        threads: None: one for each CPU.
    """
    pool = ThreadPoolExecutor(threads or os.cpu_count(), thread_name_prefix="read")
    pending: collections.deque[list[Future[Row]]] = collections.deque()

    def send(count: int) -> None:
        pending.extend([pool.submit(read, place) for place in batch] for batch in itertools.islice(places, count))

    try:
        send(ahead + 1)
        while pending:
            rows = [future.result() for future in pending.popleft()]
            send(1)
            yield {name: np.stack([row[name] for row in rows]) for name in rows[0]}
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


class Mending:
    """A `read` that puts the next readable example of the same shape in the place of one that cannot be read.

    So a stream stays a function of the files and the place. Each is named in a warning, and counted.
    """

    def __init__(
        self,
        read: Callable[[Place], Row],
        following: Callable[[int], int],
        name: Callable[[int], str],
        num_examples: int,
        max_unreadable: float,
    ):
        """Args:
        read: raises `UserError` for an example that cannot be read.
        following: the example that takes the place of another.
        name: what a message calls an example.
        num_examples, max_unreadable: more than this fraction of them must not be unreadable.
        """
        self._read, self._following, self._name = read, following, name
        self._num_examples, self._max_unreadable = num_examples, max_unreadable
        self._unreadable: set[int] = set()
        self._lock = threading.Lock()

    def __call__(self, place: Place) -> Row:
        while True:  # `_report` raises when too many are unreadable
            try:
                return self._read(place)
            except UserError as error:
                self._report(place.index, error)
                place = place._replace(index=self._following(place.index))

    def _report(self, index: int, error: UserError) -> None:
        with self._lock:
            if index in self._unreadable:
                return
            self._unreadable.add(index)
            count, total = len(self._unreadable), self._num_examples
            if count > self._max_unreadable * total or count == total:
                raise UserError(
                    f"Cannot read {self._name(index)}: {error}\nUnreadable so far: {count} of {total} training images, more "
                    f"than config.data.max_unreadable={self._max_unreadable} allows. Repair the data, or raise the limit."
                ) from error
            logger.warning(
                "Cannot read %s: %s Another image takes its place (unreadable so far: %d).",
                self._name(index),
                error,
                count,
            )
