"""Several processes as one run: joining them, leaving together, and noticing a peer that is gone or stuck."""

import contextlib
import os
import sys
import threading
import time
import traceback
from collections.abc import Iterator

import jax
from ml_collections import ConfigDict

from simam_jax import errors

HEARTBEAT_SECONDS = 30  # a peer that has been silent for so long is gone
SHUTDOWN_SECONDS = 60  # how long one that is done waits for the others
STUCK = 3  # exit code of a process that gave up waiting


@contextlib.contextmanager
def multi_process(config: ConfigDict) -> Iterator[None]:
    """Joins the other processes named by the `distributed` section for the body; does nothing where it names none.

    An error inside ends this process at once, so that the others notice, instead of waiting for them.

    Raises:
        UserError: the section is filled in by halves, or the coordinator cannot be reached.
    """
    given = {
        "coordinator_address": config.coordinator_address or None,
        "num_processes": config.num_processes or None,
        "process_id": config.process_id if config.process_id >= 0 else None,
    }
    missing = [name for name, value in given.items() if value is None]
    if len(missing) == len(given) and not config.auto:
        yield
        return
    if missing and not config.auto:
        raise errors.UserError(
            f"config.distributed lacks {', '.join(missing)}: give all of {', '.join(given)}, "
            f"or --config.distributed.auto=True under SLURM, Open MPI, GKE or on a Cloud TPU."
        )
    try:
        jax.distributed.initialize(
            given["coordinator_address"],
            given["num_processes"],
            given["process_id"],
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
            shutdown_timeout_seconds=SHUTDOWN_SECONDS,
        )
    except (ValueError, RuntimeError) as error:
        raise errors.UserError(f"The processes of {given} did not come together: {error}") from error
    try:
        yield
    except BaseException as error:
        _leave(error)
    jax.distributed.shutdown()


def _leave(error: BaseException) -> None:
    """Ends this process without the barrier at exit, in which it would wait for peers that wait for it."""
    code = error.code if isinstance(error, SystemExit) and isinstance(error.code, int) else 1
    if isinstance(error, errors.UserError):
        print(f"error: {error}", file=sys.stderr)
        code = 2
    elif not isinstance(error, SystemExit):
        traceback.print_exception(error)
        if _comes_from_a_peer(error):
            # When its heartbeats stay away, JAX's coordination service says which one is gone and ends this process.
            print("A peer is gone: waiting for its heartbeats to stay away, to say which.", file=sys.stderr, flush=True)
            time.sleep(HEARTBEAT_SECONDS + 15)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _comes_from_a_peer(error: BaseException) -> bool:
    return isinstance(error, jax.errors.JaxRuntimeError) and jax.process_count() > 1


class Watchdog:
    """Ends the process when `beat` stays away for `seconds`: a peer that is alive but stuck raises no error anywhere."""

    def __init__(self, seconds: float):
        self._seconds = seconds
        self._step, self._last = 0, time.monotonic()
        self._done = threading.Event()
        if seconds:
            threading.Thread(target=self._watch, daemon=True).start()

    def beat(self, step: int) -> None:
        """Update `step` is finished."""
        self._step, self._last = step, time.monotonic()

    def close(self) -> None:
        self._done.set()

    def _watch(self) -> None:
        while not self._done.wait(min(self._seconds / 4, 10.0)):
            if time.monotonic() - self._last > self._seconds:
                print(
                    f"error: process {jax.process_index()} has waited more than {self._seconds:g} s for the update "
                    f"after {self._step}: a peer or the input is stuck. Start all processes again; the run goes on from "
                    f"its last checkpoint. (--config.max_step_seconds sets the limit, 0 removes it.)",
                    file=sys.stderr,
                    flush=True,
                )
                os._exit(STUCK)
