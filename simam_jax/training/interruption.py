"""SIGTERM and SIGINT end a run between two updates, on all hosts after the same one."""

import contextlib
import os
import signal
from collections.abc import Callable, Iterator

import jax
from jax.experimental import multihost_utils


@contextlib.contextmanager
def watched() -> Iterator[Callable[[int], bool]]:
    """Gives `requested(step) -> bool`, to be asked after each update: whether the run is to end now, after that one."""
    if jax.process_count() > 1:
        # JAX's runtime catches SIGTERM and lets the processes agree on the update after which they stop.
        previous = signal.signal(signal.SIGINT, lambda *_: os.kill(os.getpid(), signal.SIGTERM))
        try:
            yield multihost_utils.reached_preemption_sync_point
        finally:
            signal.signal(signal.SIGINT, previous)
        return

    caught: list[int] = []
    names = (signal.SIGTERM, signal.SIGINT)
    previous_handlers = [signal.signal(name, lambda number, _: caught.append(number)) for name in names]
    try:
        yield lambda _step: bool(caught)
    finally:
        for name, handler in zip(names, previous_handlers, strict=True):
            signal.signal(name, handler)
