"""Every test sees eight virtual CPU devices, as a small pod would have."""

import contextlib
import gc
import json
import os
import signal

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

# PyTorch's optimizers import it where it is installed, and loaded after TensorFlow (2.21) it crashes: both bring an LLVM.
with contextlib.suppress(ImportError):
    import triton  # noqa: F401

import jax
import jax.numpy as jnp
import processes
import pytest
import trained
from jax.sharding import Mesh
from PIL import Image
from sklearn.datasets import load_sample_images

from simam_jax.models import Classifier
from simam_jax.models.blocks import BasicBlock
from simam_jax.models.resnet import ResNet

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)

# Tracing makes many objects and few cycles: by Python's own threshold a tenth of the time goes into looking for them.
gc.set_threshold(200_000, 20, 100)

# A job in a shell's background ignores Ctrl-C, one under nohup a closed terminal, and so would the programs that tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture(autouse=True)
def no_run_goes_on():
    """A test that fails leaves none of its runs behind: one that nobody stops would take the time of all that follow."""
    yield
    processes.kill_all()


@pytest.fixture(scope="module")
def quickly_compiled():
    """For tests of what a network is and does, which run each program once or twice: LLVM optimizes little, XLA as ever."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture
def fully_compiled():
    """For a test in such a module that compares with the reference implementation's numbers: compiled as for users."""
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture
def x64():
    """64-bit mode for one test."""
    with jax.enable_x64(True):
        yield


@pytest.fixture
def mesh_of():
    """The first so many devices, as the training steps want them."""

    def make(devices: int) -> Mesh:
        return Mesh(jax.devices()[:devices], ("data",))

    return make


@pytest.fixture(scope="session")
def tiny_network():
    """A real network that compiles in a moment: three blocks with SimAM, 8 to 32 channels, 10 classes."""

    def make(dtype=jnp.float32, **changes) -> Classifier:
        backbone = ResNet(
            block=BasicBlock,
            stage_sizes=(1, 1, 1),
            width=8,
            stem="3x3",
            attention="simam",
            attention_param=1e-4,
            dtype=jnp.dtype(dtype),
            **changes,
        )
        return Classifier(architecture="tiny", backbone=backbone, num_classes=10)

    return make


@pytest.fixture(scope="session")
def workdir(tmp_path_factory):
    """A workdir of a real network with SimAM, seven classes and 16 x 16 images, as train.py leaves it. Do not write there."""
    folder = trained.write_workdir(tmp_path_factory.mktemp("run"), "cifar_resnet20", num_classes=7, image_size=16)
    rows = [{"step": k, "epoch": k / 4, "train/top1": k / 10, "eval/top1": k / 20} for k in range(1, 9)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="session")
def photographs(tmp_path_factory):
    """The paths of two photographs, 640 x 427."""
    folder = tmp_path_factory.mktemp("photographs")
    for name, pixels in zip(("temple.jpg", "flower.jpg"), load_sample_images().images, strict=True):
        Image.fromarray(pixels).save(folder / name)
    return [str(folder / "temple.jpg"), str(folder / "flower.jpg")]
