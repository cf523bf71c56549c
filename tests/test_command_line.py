"""What a user meets first: a quick import, and one clear message for a wrong command."""

import subprocess
import sys

import pytest
from processes import ROOT

DIGITS = ["--config", "configs/digits_resnet20_simam.py"]


def run(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--config", "configs/digits_resnet2_simam.py"], "Did you mean 'configs/digits_resnet20_simam.py'"),
        ([*DIGITS, "--config.batch_siz=3"], 'Did you mean "batch_size"'),
        ([*DIGITS, "--config.model.atention=se"], 'Did you mean "attention"'),
        ([*DIGITS, "--config.batch_size=many"], "batch_size=many"),
        ([*DIGITS, "--mode", "evaluate"], "<train|eval|check>"),
        ([*DIGITS, "batch_size=3"], "settings are given as --config.FIELD=VALUE"),
        ([*DIGITS, "--config.model.name=resnet51"], "Unknown model 'resnet51'"),
        ([*DIGITS, "--config.batch_size=0"], "it must be at least 1"),
        ([*DIGITS, "--workdir", "train.py/run"], "cannot be written"),
        (DIGITS[:0], "--config"),
    ],
)
def test_a_wrong_command_is_one_message_and_a_failure(flags, message, tmp_path):
    workdir = [] if "--workdir" in flags else ["--workdir", str(tmp_path / "run")]
    result = run("train.py", *workdir, *flags)
    output = result.stdout + result.stderr
    assert result.returncode != 0
    assert message in output
    assert "Traceback" not in output
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_workdir_is_needed():
    result = run("train.py", *DIGITS)
    assert result.returncode != 0
    assert "--workdir=DIR is needed" in result.stdout + result.stderr


def test_the_import_is_quick_and_leaves_the_heavy_libraries_alone():
    code = """if True:
        import sys, time
        start = time.monotonic()
        import simam_jax
        seconds = time.monotonic() - start
        heavy = {"tensorflow", "tensorflow_datasets", "clu", "torch", "orbax"} & set(sys.modules)
        print(seconds)
        assert not heavy, heavy
        simam_jax.load, simam_jax.load_torch
        heavy = {"tensorflow", "tensorflow_datasets", "clu", "torch"} & set(sys.modules)
        assert not heavy, heavy
    """
    result = run("-c", code)
    assert result.returncode == 0, result.stderr
    assert float(result.stdout) < 10  # 1 s alone on the machine; the tests share it
