"""What `pip install simam-jax` alone must do, run by a Python that has the wheel and nothing else.

SimAM, its module, the networks, and weights from an .npz work; what needs more is an error that names the extra.
"""

import importlib.metadata
import subprocess
import sys
import tempfile
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

import simam_jax

TESTS = Path(__file__).parent.parent / "tests"
HEAVY = {
    "clu",
    "gradio",
    "matplotlib",
    "opencv-python-headless",
    "pycocotools",
    "ml-collections",
    "pillow",
    "scikit-learn",
    "tensorflow",
    "tensorflow-cpu",
    "torch",
}

assert "site-packages" in simam_jax.__file__, f"not the installed wheel: {simam_jax.__file__}"
assert importlib.metadata.version("simam-jax") == simam_jax.__version__
assert (Path(simam_jax.__file__).parent / "py.typed").is_file()
installed = {distribution.name.lower() for distribution in importlib.metadata.distributions()}
assert not HEAVY & installed, HEAVY & installed

x = jax.random.normal(jax.random.key(0), (2, 14, 14, 8))
squares = (x - x.mean((1, 2), keepdims=True)) ** 2
variance = squares.sum((1, 2), keepdims=True) / (14 * 14 - 1)
expected = x * jax.nn.sigmoid(squares / (4 * (variance + 0.1)) + 0.5)  # Eq. 5 and 6
assert jnp.allclose(jax.jit(lambda x: simam_jax.simam(x, 0.1))(x), expected, atol=1e-6)
assert jnp.allclose(simam_jax.SimAM(e_lambda=0.1).apply({}, x), expected, atol=1e-6)
assert isinstance(simam_jax.SimAM(), nn.Module)

sys.path.insert(0, str(TESTS))
from golden_cases import golden_images, golden_state, read_case  # noqa: E402

case, golden = read_case("cifar-resnet20-basic-simam-0.0001")
with tempfile.TemporaryDirectory() as folder:
    weights = Path(folder) / "weights.npz"
    np.savez(weights, **golden_state(case["state_dict"]))
    model, variables = simam_jax.load_torch(weights, "cifar_resnet20")
    logits = jax.jit(model.apply)(variables, golden_images(case)[0])
    assert jnp.allclose(logits, golden["eval_logits"], rtol=1e-4, atol=1e-4)

    # Each needs more than this install has: one line that says what to install.
    for module, extra, *arguments in (
        ("predict", "predict", "--checkpoint", str(weights), "--model", "cifar_resnet20", str(weights)),
        ("demo", "demo", "--checkpoint", str(weights), "--model", "cifar_resnet20", "--port", "0"),
    ):
        command = [sys.executable, "-m", f"simam_jax.{module}", *arguments]
        result = subprocess.run(command, capture_output=True, text=True, cwd=folder)
        assert (result.returncode, result.stderr.count("\n")) == (2, 1), result.stderr
        assert f"pip install 'simam-jax[{extra}]'" in result.stderr, result.stderr

print(f"The bare install works: {', '.join(sorted(installed))}.")
