"""The loop, its checkpoints and its modes know nothing of what is learned: tests/mean_colour.py trains as it is."""

import signal

import jax
import numpy as np
import pytest
from mean_colour import Network
from processes import Run, losses

from simam_jax import checkpoints

LEARN = {"schedule.learning_rate": 0.3, "schedule.warmup_epochs": 0.0, "ema_decay": 0.9, "task": "mean_colour"}


def start(workdir, cache, **changes) -> Run:
    return Run(workdir, cache, program="tests/mean_colour.py", **LEARN | changes)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


def variables(workdir):
    like = jax.eval_shape(Network().init, jax.random.key(0), np.zeros((1, 8, 8, 3), np.float32))
    items, _ = checkpoints.read(checkpoints.newest(workdir), {"variables": like, "ema": like})
    return jax.device_get(items)


@pytest.mark.slow  # four processes
def test_a_task_that_the_package_does_not_know_is_trained_killed_resumed_and_evaluated(tmp_path, cache):
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    run = start(undisturbed, cache)
    assert run.end() == 0, run.output
    assert "eval close" in run.output
    learned = losses(undisturbed)
    assert learned[30] < 0.5 * learned[1]

    run = start(killed, cache)
    run.until("step 14/30")
    run.kill(signal.SIGKILL)
    assert run.end() == -signal.SIGKILL
    run = start(killed, cache)
    assert run.end() == 0, run.output
    assert "Continuing from" in run.output
    jax.tree.map(np.testing.assert_array_equal, variables(killed), variables(undisturbed))

    run = start(killed, cache, mode="eval")
    assert run.end() == 0, run.output
    assert "eval close" in run.output
    assert "eval_ema close" in run.output

    fresh = jax.device_get(Network().init(jax.random.key(0), np.zeros((1, 8, 8, 3), np.float32)))
    for item in variables(killed).values():  # frozen: bit-identical in the end
        jax.tree.map(np.testing.assert_array_equal, item["params"]["stem"], fresh["params"]["stem"])
        assert (item["params"]["head"]["kernel"] != fresh["params"]["head"]["kernel"]).any()
