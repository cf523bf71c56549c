"""What the benchmarks measure with."""

import os
import time
from functools import partial

import pytest

from benchmarks import measure
from simam_jax.errors import UserError


def sleeper(seconds):
    return partial(time.sleep, seconds)


def with_huge_pages():
    if "glibc.malloc.hugetlb=1" not in os.environ.get("GLIBC_TUNABLES", ""):
        raise RuntimeError("small pages")
    return sleeper(0)


def without_its_library():
    raise ModuleNotFoundError("No module named 'peer'")


def test_contestants_take_turns_in_processes_of_their_own():
    with measure.in_processes({name: partial(sleeper, s) for name, s in [("quick", 0.01), ("slow", 0.05)]}) as timers:
        times = measure.in_turns(timers, 3)
    assert [len(each) for each in times.values()] == [3, 3]
    assert measure.ratio(times["slow"], times["quick"]) > 2


def test_one_whose_process_ends_is_named(capfd):
    peer = {"peer": without_its_library}
    with measure.in_processes(peer) as timers, pytest.raises(UserError, match="'peer' ended"):
        measure.in_turns(timers, 1)
    assert "No module named 'peer'" in capfd.readouterr().err


def test_contestants_have_memory_in_huge_pages_and_this_process_stays_as_it_is(monkeypatch):
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    with measure.in_processes({"one": with_huge_pages}) as timers:
        measure.in_turns(timers, 1)
    assert "GLIBC_TUNABLES" not in os.environ
