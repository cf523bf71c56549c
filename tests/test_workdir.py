"""The folder of a run: what it may be called, what may lie in it, and that one run has it at a time."""

import json
import os
import socket
import subprocess
import sys

import pytest

from simam_jax import UserError
from simam_jax.training.metrics import MetricWriter
from simam_jax.training.workdir import lock, writable


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("", lambda path: path.write_text("a file")),
        ("", lambda path: path.symlink_to("nowhere")),
        ("checkpoints", lambda path: path.write_text("a file")),
        ("checkpoints", lambda path: path.symlink_to("nowhere")),
        ("train.log", lambda path: path.mkdir()),
        ("metrics.jsonl", lambda path: path.mkdir()),
        ("lock", lambda path: path.mkdir()),
    ],
)
def test_what_is_in_the_way_is_one_error_at_the_start(name, make, tmp_path):
    workdir = tmp_path / "run"
    if name:
        workdir.mkdir()
    make(workdir / name)
    with pytest.raises(UserError, match=rf"workdir=.*run' cannot be used: .*{name}"):
        writable(workdir)


@pytest.mark.parametrize("workdir", ["x" * 256, os.fsdecode(b"\xff"), "/".join(["d" * 200] * 25), "a\0b"])
def test_a_name_that_cannot_be_is_refused_and_nothing_is_made(workdir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="workdir="):
        writable(workdir)
    assert not list(tmp_path.iterdir())


def test_a_folder_too_deep_for_the_files_of_a_run_is_refused(tmp_path):
    room = 4050 - len(str(tmp_path))  # of 4095
    deep = tmp_path.joinpath(*["d" * 199] * (room // 200), "e" * (room % 200 - 1))
    with pytest.raises(UserError, match="File name too long"):
        writable(deep)
    assert not list(tmp_path.iterdir())


def test_the_home_folder_has_its_usual_short_name(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert writable("~/run") == tmp_path / "run"


def test_a_workdir_below_a_file_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"workdir=.*file/run' cannot be used"):
        writable(tmp_path / "file" / "run")


# ---- metrics.jsonl


@pytest.mark.parametrize(
    "content",
    [b"\x00\xff\x17", b"\x80\n", b"{}\nhello\n{}\n", b'{"step": 1}\n{"ste\n', b"hello", b"\n"],
)
def test_rubbish_among_the_records_is_one_error_at_the_start(content, tmp_path):
    (tmp_path / "metrics.jsonl").write_bytes(content)
    with pytest.raises(UserError, match=r"Line [12] of .*metrics.jsonl is no record"):
        writable(tmp_path)
    assert (tmp_path / "metrics.jsonl").read_bytes() == content


@pytest.mark.parametrize("cut", ["", "{", '{"step": 2, "epo', '{"step": 2}'])
def test_a_record_that_was_cut_off_is_not_glued_to_the_next(cut, tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n' + cut)
    writer = MetricWriter(writable(tmp_path), {})
    writer.write(2, 0.5, {"x": 1.0})
    writer.close()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2]
    assert lines[1]["x"] == 1.0


# ---- the lock

HOLD = """
import sys, time
from pathlib import Path
from simam_jax.training.workdir import lock
with lock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(100)
"""


@pytest.fixture
def holder(tmp_path):
    """A process that has the lock of `tmp_path`."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def test_a_second_run_is_refused_and_told_which_the_first_is(tmp_path, holder):
    for _ in range(2):
        with (
            pytest.raises(UserError, match=f"in use by process {holder.pid} on {socket.gethostname()}, started 2"),
            lock(tmp_path),
        ):
            pass
    held = json.loads((tmp_path / "lock").read_text())
    assert held["pid"] == holder.pid
    holder.kill()
    holder.wait()
    with lock(tmp_path):  # what a dead process left
        assert json.loads((tmp_path / "lock").read_text())["pid"] == os.getpid()
    assert not (tmp_path / "lock").exists()


def test_the_lock_of_another_host_says_how_to_remove_it(tmp_path):
    path = tmp_path / "lock"
    path.write_text(json.dumps({"host": "elsewhere", "pid": 7, "started": "2026-01-01 00:00:00"}))
    with pytest.raises(UserError, match=f"in use by process 7 on elsewhere.*remove {path}"), lock(tmp_path):
        pass
    assert "elsewhere" in path.read_text()
    path.unlink()
    with lock(tmp_path):
        pass


@pytest.mark.parametrize("content", ["", "rubbish", "[]", '{"host": 3}', '{"host": "x", "pid": "y", "started": ""}'])
def test_a_lock_that_names_nobody_is_taken(content, tmp_path):
    (tmp_path / "lock").write_text(content)
    with lock(tmp_path):
        assert json.loads((tmp_path / "lock").read_text())["pid"] == os.getpid()


def test_where_files_cannot_be_locked_what_stands_in_the_file_counts(tmp_path, holder, monkeypatch):
    def refuse(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("fcntl.flock", refuse)
    with pytest.raises(UserError, match=f"process {holder.pid} on"), lock(tmp_path):
        pass
    holder.kill()
    holder.wait()
    with lock(tmp_path):
        pass


# ---- a reader of the output that is gone


def test_a_run_outlives_the_reader_of_its_output(tmp_path):
    code = "import sys; from pathlib import Path; from simam_jax.progress import Progress\n"
    code += "p = Progress(Path(sys.argv[1])); input()\nfor i in range(3): p.say(f'line {i}')"
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout
    process.stdout.close()
    process.stdout = None
    _, errors = process.communicate("\n", timeout=100)
    assert process.returncode == 0, errors
    assert (tmp_path / "train.log").read_text().count("line") == 3
