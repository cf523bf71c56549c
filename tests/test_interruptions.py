"""What interrupts a run costs nothing: the parameters in the end are those of a run that was left alone, bit by bit."""

import os
import pty
import random
import re
import signal
import socket
import time

import jax
import numpy as np
import pytest
from processes import Run, losses, wait_for

import simam_jax
from simam_jax import checkpoints


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, cache):
    """The workdir of a run that nothing interrupted. Its name has characters that mean something to libraries."""
    workdir = tmp_path_factory.mktemp("undisturbed") / "lr[0.1] of a*b" / "run"
    run = Run(workdir, cache)
    assert run.end() == 0, run.output
    return workdir


def assert_equal_bit_by_bit(workdir, undisturbed):
    (_, a), (_, b) = simam_jax.load(workdir), simam_jax.load(undisturbed)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(a), jax.device_get(b))
    assert losses(workdir)[30] == losses(undisturbed)[30]


@pytest.mark.slow  # two minutes; the default suite keeps SIGTERM
def test_kill_9_at_five_random_moments(tmp_path, cache, undisturbed):
    moments = random.Random(0)
    for kill in range(5):
        run = Run(tmp_path, cache)
        step = 5 * kill + 2 + moments.randrange(4)
        run.until(rf"step ({step}|{step + 1}|{step + 2}|30)/30")
        time.sleep(moments.uniform(0, 0.05))  # between, during or after a save
        run.kill(signal.SIGKILL)
        assert run.end() == -signal.SIGKILL
    last = Run(tmp_path, cache)
    assert last.end() == 0, last.output
    assert "Continuing from" in last.output
    assert_equal_bit_by_bit(tmp_path, undisturbed)


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_request_to_stop_saves_and_exits_in_good_order(number, tmp_path, cache, undisturbed):
    run = Run(tmp_path, cache, **{"checkpoint.every_epochs": 0.0})
    run.until("step 10/30")
    run.kill(number)
    assert run.end() == 0, run.output
    assert "Stopped on request after update" in run.output
    step = max(losses(tmp_path))
    assert 10 <= step < 30
    again = Run(tmp_path, cache)
    again.until(rf"Continuing from .*/checkpoints/{step}$")
    again.until(f"step {step + 1}/30")
    assert again.end() == 0, again.output
    assert_equal_bit_by_bit(tmp_path, undisturbed)


@pytest.mark.slow
def test_a_second_run_in_the_workdir_is_refused_and_the_first_goes_on(tmp_path, cache, undisturbed):  # noqa: ARG001
    first = Run(tmp_path, cache, num_steps=100_000)
    first.until("step 5/")
    second = Run(tmp_path, cache)
    assert second.end() == 2
    (message,) = [line for line in second.output.splitlines() if line.startswith("error: ")]
    assert f"is in use by process {first.process.pid} on {socket.gethostname()}" in message
    first.kill(signal.SIGTERM)
    assert first.end() == 0, first.output
    saved = int(re.search("Stopped on request after update ([0-9]+)", first.output)[1])
    assert checkpoints.newest(tmp_path) == tmp_path / "checkpoints" / str(saved)
    assert max(losses(tmp_path)) == saved


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_request_to_stop_while_compiling_ends_in_good_order(number, tmp_path, cache, undisturbed):
    run = Run(tmp_path, cache, compilation_cache_dir="")
    run.until("30 updates of 48 images")
    time.sleep(2)  # what follows takes ten
    run.kill(number)
    assert run.end() == 0, run.output
    assert "Stopped on request" in run.output
    assert "Traceback" not in run.output
    again = Run(tmp_path, cache)
    assert again.end() == 0, again.output
    assert_equal_bit_by_bit(tmp_path, undisturbed)


@pytest.mark.slow
def test_a_terminal_that_is_closed_stops_the_run_and_it_saves(tmp_path, cache, undisturbed):  # noqa: ARG001
    master, slave = pty.openpty()
    run = Run(tmp_path, cache, num_steps=100_000, terminal=slave)
    wait_for(lambda: checkpoints.newest_step(tmp_path / "checkpoints"), seconds=200)
    os.close(slave)
    os.close(master)
    assert run.process.wait(timeout=100) == 0
    assert "Stopped on request" in (tmp_path / "train.log").read_text().splitlines()[-1]
    assert checkpoints.newest_step(tmp_path / "checkpoints") == max(losses(tmp_path))


def test_a_full_disk_stops_the_run_at_once_and_says_so(tmp_path, cache, undisturbed):  # noqa: ARG001
    run = Run(tmp_path, cache, size_limit=200)  # no file may pass 200 KiB; the checkpoint needs about 1 MiB
    assert run.end() == 2
    assert "Traceback" not in run.output
    assert len(run.output.splitlines()) < 25, run.output
    (message,) = [line for line in run.output.splitlines() if line.startswith("error: ")]
    assert "could not be written" in message
    assert message.endswith("Make room, then start the same command again.")
    assert max(losses(tmp_path)) < 15


@pytest.mark.slow  # the README's first run
def test_the_digits_run_leaves_what_its_users_look_for(tmp_path, cache, undisturbed):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    lines = (undisturbed / "train.log").read_text().splitlines()
    assert "Finished. eval top-1" in lines[-1]
    assert lines[-1].endswith(f"Checkpoint: {undisturbed}/checkpoints/30")
    assert checkpoints.newest(undisturbed) == undisturbed / "checkpoints" / "30"
    assert not (undisturbed / "lock").exists()
    for word in ("step 15/30", "epoch", "loss", "top-1", "images/s", "data wait", "ETA"):
        assert any(word in line for line in lines)

    events = EventAccumulator(str(undisturbed)).Reload()
    tags = events.Tags()["tensors"]
    assert {"train/loss", "train/top1", "eval/top1", "learning_rate", "grad_norm", "images_per_second"} <= set(tags)
    assert "_hparams_/session_start_info" in events.summary_metadata

    again = Run(undisturbed, cache)
    assert again.end() == 0
    score = lines[-1].split("Finished. ")[1].split(" on ")[0]
    assert f"This run is finished. {score}" in again.output
    evaluated = Run(undisturbed, cache, mode="eval", devices=4, **{"batch_size": 100, "model.bn_group_size": 0})
    assert evaluated.end() == 0, evaluated.output
    assert score.split(", loss")[0] in evaluated.output  # 360 images in batches of 100, padded: every one counted once
    checked = Run(tmp_path, cache, mode="check")
    assert checked.end() == 0, checked.output
    for row in ("parameters       0.27 M", "30 updates", "memory", "estimated time"):
        assert row in checked.output
    assert not (tmp_path / "checkpoints").exists()
