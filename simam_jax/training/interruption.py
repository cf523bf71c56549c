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

    names = [name for name in SIGNALS if not several or name != signal.SIGTERM]
    previous = {name: signal.signal(name, handle) for name in names if signal.getsignal(name) != signal.SIG_IGN}
    try:
        yield multihost_utils.reached_preemption_sync_point if several else lambda _step: bool(caught)
    finally:
        for name, handler in previous.items():
            signal.signal(name, handler)
