"""What is said of an example that cannot be read: another takes its place, or the run ends."""

import logging
import threading
from collections.abc import Callable

from simam_jax.errors import UserError

logger = logging.getLogger(__name__)


class Unreadable:
    """The unreadable examples of a stream, counted; several threads may report them."""

    def __init__(self, name: Callable[[int], str], num_examples: int, max_unreadable: float | None):
        """
        Args:
            name: what a message calls an example.
            num_examples: of the stream.
            max_unreadable: fraction of them that may be replaced; None: every one must be readable.
        """
        self._name, self._num_examples, self._max_unreadable = name, num_examples, max_unreadable
        self._seen: set[int] = set()
        self._lock = threading.Lock()

    def report(self, index: int, why: object) -> None:
        """Warns of an unreadable example, once.

        Raises:
            UserError: that is one too many.
        """
        message = f"Cannot read {self._name(index)}: {why}"
        if self._max_unreadable is None:
            raise UserError(f"{message}\nEvaluation leaves no image out: repair or remove it.")
        with self._lock:
            if index in self._seen:
                return
            self._seen.add(index)
            count, total = len(self._seen), self._num_examples
        if count > self._max_unreadable * total or count == total:
            raise UserError(
                f"{message}\nUnreadable so far: {count} of {total} training images, more than "
                f"config.data.max_unreadable={self._max_unreadable} allows. Repair the data, or raise the limit."
            )
        logger.warning("%s Another image takes its place (unreadable so far: %d).", message, count)
