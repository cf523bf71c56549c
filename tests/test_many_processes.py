"""Several processes as one run, joined by JAX's own runtime on the loopback interface."""

import signal
import time

import numpy as np
import pytest
from processes import Run, free_port, losses, pictures

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


def start_two(workdir, cache, **changes) -> list[Run]:
    address = f"127.0.0.1:{free_port()}"

    def together(process_id: int) -> dict:
        return {
            "distributed.coordinator_address": address,
            "distributed.num_processes": 2,
            "distributed.process_id": process_id,
        }

    return [Run(workdir, cache, devices=2, **changes | together(i)) for i in range(2)]


def test_two_processes_of_two_devices_are_one_of_four(tmp_path, cache):
    # At a larger rate this network is chaotic: rounding grows tenfold with every update.
    small = {"num_steps": 6, "model.bn_group_size": 24, "schedule.learning_rate": 0.01, "visualize_every_epochs": 0.1}
    single = Run(tmp_path / "single", cache, devices=4, **small)
    assert single.end() == 0, single.output
    pair = start_two(tmp_path / "pair[2]", cache, **small)
    for run in pair:
        assert run.end() == 0, run.output
    assert list(pictures(tmp_path / "pair[2]", "attention")) == [3, 6]
    one, two = losses(tmp_path / "single"), losses(tmp_path / "pair[2]")
    assert list(one) == list(two) == [1, 2, 3, 4, 5, 6]
    # float32: the order in which gradients are added differs
    np.testing.assert_allclose(list(two.values()), list(one.values()), rtol=1e-6)


def test_a_request_to_stop_one_process_stops_both_after_the_same_update(tmp_path, cache):
    pair = start_two(tmp_path, cache, num_steps=2000)
    pair[0].until("step 5/")
    pair[1].kill(signal.SIGTERM)
    for run in pair:
        assert run.end() == 0, run.output
    assert "Stopped on request" in pair[0].output
    saved = [int(p.name) for p in (tmp_path / "checkpoints").iterdir() if p.name.isdigit()]
    assert max(saved) == max(losses(tmp_path))


def test_a_peer_that_dies_ends_the_other_within_a_minute_and_is_named(tmp_path, cache):
    pair = start_two(tmp_path, cache, num_steps=5000)
    pair[0].until("step 5/")
    pair[1].kill(signal.SIGKILL)
    died = time.monotonic()
    assert pair[0].end(timeout=60) != 0
    assert time.monotonic() - died < 60
    # In the words of JAX's coordination service, which ends the process.
    assert "tasks are unhealthy (stopped sending heartbeats):\n1\n" in pair[0].output
    pair[1].end()
