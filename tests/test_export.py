"""`python -m simam_jax.export`: every format, run by its own runtime in a process of its own, gives the network's logits."""

import subprocess
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from trained import preprocessing, variables_of, write_workdir

import simam_jax
from simam_jax import export
from simam_jax.inference import Predictor
from simam_jax.models import Classifier, create_backbone
from simam_jax.models.blocks import Bottleneck
from simam_jax.models.resnet import ResNet

# Of a fresh process: the file, then the batches to read and the logits to write.
RUNTIMES = {
    "stablehlo": """
        import jax
        exported = jax.export.deserialize(bytearray(open(path, "rb").read()))
        assert exported.platforms == ("cpu", "cuda", "tpu")
        network = exported.call
    """,
    "saved_model": """
        import tensorflow as tf
        served = tf.saved_model.load(path).signatures["serving_default"]
        network = lambda pixels: served(pixels=tf.constant(pixels))["logits"].numpy()
    """,
    "onnx": """
        import onnxruntime
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        network = lambda pixels: session.run(["logits"], {"pixels": pixels})[0]
    """,
}
TINY: dict = {"stage_sizes": (1, 1), "width": 16, "stem": "deep"}
FRESH = """if True:
        import sys
        import numpy as np
        path, folder = sys.argv[1:]
        {runtime}
        for batch in (2, 5):
            np.save(f"{{folder}}/logits{{batch}}.npy", network(np.load(f"{{folder}}/pixels{{batch}}.npy")))
        assert not any(name.startswith("simam_jax") for name in sys.modules)
"""


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    """By name: a workdir, seven images as pixels, their logits."""
    made = {}

    def make(name):
        if name not in made:
            folder, size = tmp_path_factory.mktemp(name), 32 if name == "resnet18" else 16
            predictor = Predictor.load(write_workdir(folder, name, num_classes=7, image_size=size))
            pixels = np.random.default_rng(1).integers(0, 256, (7, size, size, 3), np.uint8)
            made[name] = folder, pixels, np.asarray(jax.jit(predictor.logits)(predictor.variables, pixels))
        return made[name]

    return make


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "format"),
    [
        ("cifar_resnet20", "stablehlo"),
        ("cifar_resnet20", "saved_model"),
        ("cifar_resnet20", "onnx"),
        ("resnet18", "onnx"),
    ],
)
def test_a_fresh_process_computes_the_same_logits(name, format, network, tmp_path, capsys):
    workdir, pixels, expected = network(name)
    output = tmp_path / "exported"
    export.main(["--checkpoint", str(workdir), "--format", format, str(output)])
    assert "its logits differ by at most" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == [output]

    np.save(tmp_path / "pixels2.npy", pixels[:2])
    np.save(tmp_path / "pixels5.npy", pixels[2:])
    code = FRESH.format(runtime=RUNTIMES[format].strip())
    result = subprocess.run(
        [sys.executable, "-c", code, str(output), str(tmp_path)], capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    logits = np.concatenate([np.load(tmp_path / f"logits{batch}.npy") for batch in (2, 5)])
    assert np.ptp(expected, axis=0).max() > 0.05  # images are told apart at all
    np.testing.assert_allclose(logits, expected, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    "backbone",
    [
        ResNet(block=partial(Bottleneck, pool=True), attention="cbam", attention_param=4, **TINY),
        ResNet(block=partial(Bottleneck, groups=4), attention="se", attention_param=4, **TINY),
        create_backbone("mobilenet_v2"),
    ],
    ids=["pool, cbam", "groups, se", "inverted, simam"],
)
def test_onnx_knows_every_layer(backbone, tmp_path):
    model = Classifier(architecture="tiny", backbone=backbone, num_classes=5)
    predictor = Predictor(model, variables_of(model), preprocessing(35))  # odd sizes in every stage
    assert export.export(predictor, "onnx", tmp_path / "network.onnx") < 1e-5


def test_a_network_trained_in_bfloat16_is_exported_in_float32(tiny_network, tmp_path):
    model = tiny_network(jnp.bfloat16)
    variables = variables_of(model)
    export.export(Predictor(model, variables, preprocessing(16)), "onnx", tmp_path / "network")
    pixels = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), np.uint8)
    logits = export.read_onnx(tmp_path / "network")(pixels)
    exact = jax.jit(Predictor(tiny_network(), variables, preprocessing(16)).logits)(variables, pixels)
    np.testing.assert_allclose(logits, exact, atol=1e-5)


@pytest.mark.slow
def test_what_fails_its_check_leaves_nothing(tiny_network, tmp_path):
    model = tiny_network()
    diverged = jax.tree.map(lambda x: x * np.nan, variables_of(model))
    with pytest.raises(simam_jax.UserError, match="logits differ by nan, more than 1e-04: nothing was written"):
        export.export(Predictor(model, diverged, preprocessing(16)), "stablehlo", tmp_path / "network")
    assert not list(tmp_path.iterdir())


def test_wrong_requests_are_errors_before_anything_is_loaded(tmp_path, monkeypatch):
    def run(output, format="onnx"):
        export.main(["--checkpoint", str(tmp_path / "nothing"), "--format", format, str(output)])

    (tmp_path / "old").write_text("precious")
    with pytest.raises(simam_jax.UserError, match="old exists already: nothing was written"):
        run(tmp_path / "old")
    with pytest.raises(simam_jax.UserError, match=r"Unknown format 'onyx'\. Did you mean 'onnx'"):
        run(tmp_path / "new", "onyx")
    with pytest.raises(simam_jax.UserError, match=r"There is no folder .*nowhere"):
        run(tmp_path / "nowhere" / "new")
    with pytest.raises(simam_jax.UserError, match="no such folder"):
        run(tmp_path / "new")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)  # Python's way to say that there is none
    with pytest.raises(simam_jax.UserError, match=r"format onnx needs onnxruntime: pip install 'simam-jax\[export\]'"):
        run(tmp_path / "new")
    assert [path.name for path in tmp_path.iterdir()] == ["old"]
    assert (tmp_path / "old").read_text() == "precious"


def test_onnx_refuses_what_it_has_no_rule_for():
    from simam_jax.to_onnx import translate

    with pytest.raises(simam_jax.UserError, match="no rule for JAX's 'sin' in ONNX"):
        translate(jnp.sin, (3,), jnp.float32, ("x", "y"))
