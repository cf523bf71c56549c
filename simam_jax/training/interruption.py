"""SIGTERM, SIGINT and SIGHUP end a run between two updates, on all hosts after the same one."""

import contextlib
import os
import signal
from collections.abc import Callable, Iterator

import jax
from jax.experimental import multihost_utils

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


@contextlib.contextmanager
def stop_on_signal() -> Iterator[Callable[[int], bool]]:
    """Yields `should_stop(step)`; call it after every update.

    A signal that comes earlier, while the run is being built or compiled, counts from the first call on.
    """
    caught: list[int] = []
    several = jax.process_count() > 1

    def handle(number: int, _frame: object) -> None:
        caught.append(number)
        if several:  # JAX's runtime catches SIGTERM, and lets the processes agree on the update after which they stop
            os.kill(os.getpid(), signal.SIGTERM)

    signals = [number for number in SIGNALS if not several or number != signal.SIGTERM]
    ours = [number for number in signals if signal.getsignal(number) != signal.SIG_IGN]
    previous = {number: signal.signal(number, handle) for number in ours}
    try:
        yield multihost_utils.reached_preemption_sync_point if several else lambda _step: bool(caught)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
