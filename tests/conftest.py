"""Every test sees eight virtual CPU devices, as a small pod would have."""

import contextlib
import os
import signal

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

# PyTorch's optimizers import it where it is installed, and loaded after TensorFlow (2.21) it crashes: both bring an LLVM.
with contextlib.suppress(ImportError):
    import triton  # noqa: F401

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import Mesh

from simam_jax.models import Classifier
from simam_jax.models.blocks import BasicBlock
from simam_jax.models.resnet import ResNet

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)

# A job in a shell's background ignores Ctrl-C, and so would the programs that tests start and interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)


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
