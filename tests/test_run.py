"""What a run says before it starts: memory that is not to be had, settings that are small for the data; and its epochs."""

import json
import logging

import pytest

import simam_jax
from configs import digits_resnet20_simam
from simam_jax.tasks import make_task
from simam_jax.training import check, loop, program
from simam_jax.training.run import build

pytestmark = pytest.mark.usefixtures("quickly_compiled")


def small(**changes):
    """A few updates on noise."""
    config = digits_resnet20_simam.get_config()
    settings = {
        "data.source": "synthetic",
        "data.image_size": 8,
        "data.crop_padding": 1,
        "batch_size": 16,
        "model.bn_group_size": 0,
        "num_steps": 2,
        "log_every_steps": 1,
        "eval_every_epochs": 0.0,
        "eval_batch_size": 512,
        "compilation_cache_dir": "",
    }
    config.update_from_flattened_dict(settings | changes)
    return config


@pytest.mark.parametrize("mode", [pytest.param(loop.train, marks=pytest.mark.slow), check.check])
def test_an_update_that_does_not_fit_in_memory_names_one_that_should(mode, tmp_path, monkeypatch):
    monkeypatch.setattr(program, "free_memory", lambda: 0.08 * 2**30)
    config = small(**{"batch_size": 8 * 64, "data.image_size": 32})
    with pytest.raises(simam_jax.UserError, match=r"0\.1 GiB are free.*grad_accum_steps=\d+.*batch_size=\d+"):
        mode(config, str(tmp_path), make_task)
    assert not list(tmp_path.glob("checkpoints/*"))


def test_free_memory_is_known_here():
    free = program.free_memory()
    assert free is not None
    assert 2**20 < free < 2**50


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 16000}, "sees the 12800 of the training set more than once"),
        ({"schedule.warmup_epochs": 1.0}, "warm-up of 800 updates fills the run of 2"),
        ({"batch_size": 16, "optimizer.grad_accum_steps": 2}, ""),
    ],
)
def test_settings_that_are_small_for_the_data_are_one_warning(changes, message, caplog):
    with caplog.at_level(logging.WARNING):
        build(small(**{"schedule.warmup_epochs": 0.0} | changes), make_task)
    warnings = [record.getMessage() for record in caplog.records if "small for its settings" in record.getMessage()]
    if message:
        assert len(warnings) == 1
        assert message in warnings[0]


@pytest.mark.slow
def test_epochs_are_those_that_happened_though_the_batch_changed(tmp_path, capsys):
    loop.train(small(num_steps=4), str(tmp_path), make_task)  # 4 updates of 16
    loop.train(small(num_steps=6, batch_size=32), str(tmp_path), make_task)  # and 2 of 32
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows if "train/loss" in row][-1] == pytest.approx((4 * 16 + 2 * 32) / 12_800)
    assert "Continuing from" in capsys.readouterr().out
