"""The folder of a run: one that can be used, and that one run uses at a time."""

import contextlib
import fcntl
import json
import os
import socket
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

import jax

from simam_jax import checkpoints
from simam_jax.errors import UserError
from simam_jax.paths import local

LOG, METRICS, LOCK = "train.log", "metrics.jsonl", "lock"
LONGEST_NAME = "x" * 100  # of a file that a run writes, TensorBoard's


def writable(workdir: str | Path) -> Path:
    """The folder `workdir`, made if it is not there, in which a run can write all its files.

    Raises:
        UserError: it cannot be made or written, or something else has the name of one of the run's files.
    """
    path = local(workdir).absolute()
    try:
        str(path).encode()  # TensorBoard's files and the log need a name that is UTF-8
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            (path / checkpoints.FOLDER / LONGEST_NAME).lstat()  # the system limits the length of a path
        path.mkdir(parents=True, exist_ok=True)
        for name in (".", checkpoints.FOLDER):
            if os.path.lexists(path / name):
                with tempfile.TemporaryFile(dir=path / name):
                    pass
        for name in (LOG, METRICS, LOCK):
            if os.path.lexists(path / name):
                with (path / name).open("ab"):
                    pass
    except (OSError, ValueError) as error:
        raise UserError(
            f"--workdir={str(workdir)!r} cannot be used: {error}. Name another folder, or move away what is there."
        ) from error
    if (path / METRICS).exists():
        _check_lines(path / METRICS)
    return path


def _check_lines(path: Path) -> None:
    """Raises `UserError` if there is anything but records in the file; the last one may be cut off."""
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            try:
                json.loads(line)
            except ValueError as error:
                if line.endswith(b"\n") or not line.startswith(b"{"):
                    raise UserError(f"Line {number} of {path} is no record of a run. Move the file away.") from error


@contextlib.contextmanager
def lock(workdir: Path) -> Iterator[None]:
    """Keeps other runs out of `workdir` for the body; of several processes the first one does it for all.

    Who holds it stands in `workdir/lock`. The system frees it when its process is gone.

    Raises:
        UserError: another run has the folder, or one on another host seems to.
    """
    if jax.process_index() > 0:
        yield
        return
    path = workdir / LOCK
    file = _locked(path)
    try:
        holder = _holder(file.read())
        if holder and holder["host"] != socket.gethostname():
            raise UserError(
                f"{workdir} is in use by {_words(holder)}. If that run is gone, which cannot be seen from this host, remove "
                f"{path} and start again."
            )
        file.truncate(0)
        started = time.strftime("%Y-%m-%d %H:%M:%S")
        file.write(json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "started": started}))
        file.flush()
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
    finally:
        file.close()


def _locked(path: Path) -> TextIO:
    """The file at `path`, open and locked."""
    while True:
        file = path.open("a+")
        file.seek(0)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            taken = False
        except BlockingIOError:
            taken = True
        except OSError:  # this file system has no locks: what stands in the file has to do
            holder = _holder(file.read())
            taken = holder is not None and holder["host"] == socket.gethostname() and _alive(holder["pid"])
        file.seek(0)
        if taken:
            holder = _holder(file.read())
            file.close()
            raise UserError(
                f"{path.parent} is in use by {_words(holder) if holder else 'another run'}: two runs in one folder would "
                f"spoil each other's files. Wait for it, stop it, or take another --workdir."
            )
        if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
            return file
        file.close()  # the run that had it has just removed it


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # of another user
        return True
    return pid != os.getpid()


def _holder(text: str) -> dict[str, Any] | None:
    try:
        holder = json.loads(text)
        return {"host": str(holder["host"]), "pid": int(holder["pid"]), "started": str(holder["started"])}
    except (ValueError, TypeError, KeyError):
        return None


def _words(holder: dict[str, Any]) -> str:
    return f"process {holder['pid']} on {holder['host']}, started {holder['started']}"
