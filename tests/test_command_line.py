"""What a user meets first: a quick import, and one clear message for a wrong command."""

import importlib
import os
import subprocess
import sys

import pytest
from processes import ROOT

import simam_jax
from simam_jax import errors

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
        ([*DIGITS, "--workdir", "train.py/run"], "cannot be used"),
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


def test_the_import_adds_little_to_that_of_jax_and_flax():
    code = """if True:
        import time
        start = time.perf_counter()
        import jax, flax.linen
        theirs = time.perf_counter()
        import simam_jax
        print((time.perf_counter() - theirs) / (theirs - start))
    """
    result = run("-c", code)
    assert result.returncode == 0, result.stderr
    assert float(result.stdout) < 0.3  # 0.04 measured


def test_the_import_leaves_alone_what_a_bare_install_lacks():
    code = """if True:
        import sys
        import simam_jax
        heavy = {"tensorflow", "tensorflow_datasets", "clu", "torch", "orbax", "optax", "PIL", "matplotlib"}
        assert not heavy & set(sys.modules), heavy & set(sys.modules)
        simam_jax.load_torch
        lacking = {"tensorflow", "tensorflow_datasets", "clu", "torch", "PIL", "matplotlib", "sklearn", "ml_collections"}
        assert not lacking & set(sys.modules), lacking & set(sys.modules)
    """
    result = run("-c", code)
    assert result.returncode == 0, result.stderr


def test_a_fresh_process_lists_the_api_and_nothing_else():
    result = run("-c", "import simam_jax; print(*dir(simam_jax))")
    assert result.stdout.split() == sorted([*simam_jax.__all__, "__version__"]), result.stderr


def test_every_public_name_is_there():
    for name in simam_jax.__all__:
        assert getattr(simam_jax, name).__doc__, name


def test_a_package_that_is_missing_is_an_error_that_names_the_extra():
    code = """if True:
        import sys
        sys.modules["PIL"] = None
        from simam_jax.preprocessing import IMAGENET
        IMAGENET("image.png")
    """
    result = run("-c", code)
    assert "simam_jax.errors.MissingPackageError: This needs" in result.stderr
    assert "pip install 'simam-jax[predict]'" in result.stderr


def test_a_command_says_what_is_missing_before_it_reads_the_weights():
    code = """if True:
        import sys
        sys.modules["PIL"] = None
        from simam_jax import errors, predict
        errors.run_cli(lambda: predict.main(["--checkpoint", "no.npz", "--model", "resnet18", "README.md"]))
    """
    result = run("-c", code)
    assert (result.returncode, result.stderr.count("\n")) == (2, 1), result.stderr
    assert "pip install 'simam-jax[predict]'" in result.stderr


def test_modules_that_no_extra_brings_keep_their_own_error():
    with pytest.raises(ModuleNotFoundError, match="no_such_module"), errors.naming_extras():
        importlib.import_module("no_such_module")


@pytest.mark.parametrize("lines", [1, 100_000])  # written at the end, or on the way
def test_a_command_whose_reader_is_gone_ends_without_a_word(lines):
    code = f"import time; from simam_jax.errors import run_cli; run_cli(lambda: print(*range({lines}), sep=chr(10)) or time.sleep(0.2))"
    command = f"{sys.executable} -c '{code}' | true; echo ${{PIPESTATUS[0]}}"
    result = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (result.stdout, result.stderr) == ("141\n", "")


def test_a_command_keeps_what_it_compiles_for_the_next_start(tmp_path):
    code = """if True:
        import jax
        from simam_jax.command_line import run_compiling

        def main():
            jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)  # of a second for the command
            jax.jit(lambda x: x * x + 1)(jax.numpy.arange(3.0)).block_until_ready()

        run_compiling(main)
    """
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
    environment.pop("JAX_COMPILATION_CACHE_DIR", None)
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, check=True, timeout=120)
    assert list((tmp_path / "simam_jax" / "compiled").glob("*-cache"))


@pytest.mark.slow
def test_a_command_that_imports_tensorflow_prints_nothing_of_its_start():
    code = "import importlib; from simam_jax.errors import run_cli; run_cli(lambda: importlib.import_module('tensorflow') and 0)"
    quiet = ("TF_CPP_MIN_LOG_LEVEL", "TF_ENABLE_ONEDNN_OPTS")
    environment = {name: value for name, value in os.environ.items() if name not in quiet}
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
