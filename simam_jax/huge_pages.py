"""Memory in large pages, for programs that work on a CPU: every step of training asks the system for gigabytes anew."""

import os
import sys
from pathlib import Path

_POLICY = Path("/sys/kernel/mm/transparent_hugepage/enabled")
_TUNABLE = "glibc.malloc.hugetlb"


def ask() -> None:
    """Starts this program again, in the same process, with GLIBC_TUNABLES=glibc.malloc.hugetlb=1 in its environment.

    Nothing happens where that changes nothing (Linux gives such pages to all, or to none, or is not there) or where the
    variable has a value for it already: 0 keeps this from happening.
    """
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    if not _POLICY.exists() or "[madvise]" not in _POLICY.read_text() or _TUNABLE in tunables:
        return
    os.environ["GLIBC_TUNABLES"] = ":".join(filter(None, (tunables, f"{_TUNABLE}=1")))
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
