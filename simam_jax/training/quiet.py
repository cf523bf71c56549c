"""What Orbax's threads say of an error is kept to `--verbosity=1`, because the caller gets that error too."""

import functools
import logging
import sys
import threading
import traceback
from types import TracebackType
from typing import Any

from absl import logging as absl_logging

ORBAX = "/orbax/"  # in the paths of its source files


@functools.cache
def quiet_orbax() -> None:
    """Leaves out, from now on, the tracebacks that Orbax logs and prints for each array that it could not write.

    They still come when the save has failed and its `Checkpointer` is closed.
    """
    if absl_logging.get_verbosity() >= absl_logging.INFO:
        return
    of_objects, of_threads = sys.unraisablehook, threading.excepthook

    def of_object(args: Any) -> None:
        if str(args.exc_value) != "Event loop is closed":  # Orbax closes its loop at the first error of several
            of_objects(args)

    def of_thread(args: Any) -> None:
        if not _passed_orbax(args.exc_traceback):
            of_threads(args)

    sys.unraisablehook, threading.excepthook = of_object, of_thread
    for name in ("absl", "asyncio"):
        logging.getLogger(name).addFilter(_is_of_others)


def _is_of_others(record: logging.LogRecord) -> bool:
    return ORBAX not in record.pathname and not _passed_orbax(record.exc_info[2] if record.exc_info else None)


def _passed_orbax(trace: TracebackType | None) -> bool:
    return any(ORBAX in frame.f_code.co_filename for frame, _ in traceback.walk_tb(trace))
