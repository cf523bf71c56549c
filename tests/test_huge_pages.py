"""A command asks for large pages by starting again, once, where that changes something."""

import os
import subprocess
import sys

import pytest

SCRIPT = """
import os, pathlib, sys
from simam_jax import huge_pages
print(os.getpid(), flush=True)
huge_pages._POLICY = pathlib.Path(sys.argv[1])
huge_pages.ask()
print(os.getpid(), os.environ.get("GLIBC_TUNABLES"), sys.argv[2])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="a matter of Linux")
@pytest.mark.parametrize(
    ("policy", "before", "starts", "after"),
    [
        ("always [madvise] never", None, 2, "glibc.malloc.hugetlb=1"),
        (
            "always [madvise] never",
            "glibc.malloc.tcache_count=3",
            2,
            "glibc.malloc.tcache_count=3:glibc.malloc.hugetlb=1",
        ),
        ("always [madvise] never", "glibc.malloc.hugetlb=0", 1, "glibc.malloc.hugetlb=0"),
        ("[always] madvise never", None, 1, "None"),
        (None, None, 1, "None"),
    ],
)
def test_a_program_starts_again_in_the_same_process_with_the_same_arguments(tmp_path, policy, before, starts, after):
    path = tmp_path / "enabled"
    if policy is not None:
        path.write_text(policy)
    environment = {key: value for key, value in os.environ.items() if key != "GLIBC_TUNABLES"}
    if before is not None:
        environment["GLIBC_TUNABLES"] = before
    command = [sys.executable, "-c", SCRIPT, str(path), "an argument"]
    *pids, end = subprocess.run(
        command, env=environment, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    pid, seen = end.split(" ", 1)
    assert pids == [pid] * starts
    assert seen == f"{after} an argument"
