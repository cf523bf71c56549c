"""Lines for whoever watches a run: on the terminal and in `train.log`."""

import os
import sys
import time
from pathlib import Path

import jax


class Progress:
    """On a terminal one line that renews itself, elsewhere plain lines; what stays is also written to `train.log`.

    Only the first process speaks.
    """

    def __init__(self, workdir: Path | None):
        self._active = jax.process_index() == 0
        self._terminal = sys.stdout.isatty()
        self._pending = False
        self._log = (workdir / "train.log").open("a", buffering=1) if workdir and self._active else None

    def say(self, text: str) -> None:
        """A line that stays."""
        if not self._active:
            return
        self._print(f"\r\x1b[K{text}\n" if self._pending else f"{text}\n")
        self._pending = False
        if self._log:
            self._log.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")

    def show(self, text: str) -> None:
        """A line that the next one replaces; on something that is no terminal, nothing."""
        if self._active and self._terminal:
            self._print(f"\r\x1b[K{text}")
            self._pending = True

    @staticmethod
    def _print(text: str) -> None:
        try:
            sys.stdout.write(text)
            sys.stdout.flush()
        except OSError:  # the terminal, or the program behind the pipe, is gone: the run is not
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

    def close(self) -> None:
        if self._log:
            self._log.close()


def duration(seconds: float) -> str:
    """`1:02:03` or `2:03`."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
