"""Weights go to PyTorch and back bit for bit, from every kind of file; a wrong file says all that is wrong with it."""

import logging

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from network_cases import COMBINATIONS

import simam_jax
from simam_jax import UserError, convert, create_model, load_torch
from simam_jax.models import variable_shapes
from simam_jax.torch_weights.files import read_state, write_state
from simam_jax.torch_weights.names import State, to_torch
from simam_jax.torch_weights.variables import from_torch

pytestmark = pytest.mark.usefixtures("quickly_compiled")

torch = pytest.importorskip("torch")


def random_variables(name: str, attention: str, num_classes: int = 7) -> dict:
    rng = np.random.default_rng(0)
    model = create_model(name, num_classes=num_classes, attention=attention)
    return jax.tree.map(lambda leaf: rng.random(leaf.shape, np.float32), variable_shapes(model))


def assert_equal(tree: dict, other: dict):
    flat, flat_other = flatten_dict(tree), flatten_dict(other)
    assert flat.keys() == flat_other.keys()
    for path in flat:
        np.testing.assert_array_equal(flat[path], flat_other[path], str(path))


@pytest.fixture(scope="module")
def state() -> State:
    """A small network of the reference implementation, with SE."""
    return to_torch(random_variables("cifar_resnet20", "se", 10), "cifar_resnet20", attention="se")


def in_torch(state: State) -> dict:
    return {key: torch.from_numpy(value) for key, value in state.items()}


@pytest.mark.parametrize(("name", "attention"), COMBINATIONS)
def test_round_trip_is_bit_identical(name: str, attention: str):
    variables = random_variables(name, attention)
    there = to_torch(variables, name, attention=attention)
    assert sum(key.endswith("num_batches_tracked") for key in there) == len(flatten_dict(variables["batch_stats"])) // 2
    model, back = from_torch(there, name, attention=attention)
    assert model.num_classes == 7
    assert_equal(back, variables)


@pytest.mark.parametrize(
    ("name", "attention", "key", "shape"),
    # How the reference implementation wraps its attention; for simam and the ImageNet ResNets the golden files say it.
    [
        ("mobilenet_v2", "se", "features.1.conv.3.fc.0.weight", (1, 16)),
        ("mobilenet_v2", "cbam", "features.2.conv.4.SpatialGate.spatial.bn.running_mean", (1,)),
        ("cifar_mobilenet_v2", "se", "layers.1.bn3.1.fc.2.weight", (24, 1)),
        ("cifar_mobilenet_v2", "se", "layers.1.bn3.0.weight", (24,)),
        ("cifar_resnet20", "se", "layer1.0.bn2.1.fc.0.weight", (1, 16)),
        ("cifar_resnet20_bottleneck", "cbam", "layer1.0.bn3.1.ChannelGate.mlp.3.bias", (64,)),
        ("cifar_preresnet20", "se", "layer1.0.conv2.1.fc.0.weight", (1, 16)),
        ("cifar_preresnet20_bottleneck", "se", "layer1.0.conv3.0.weight", (64, 16, 1, 1)),
        ("cifar_wideresnet28x10", "se", "block1.layer.0.conv2.1.fc.0.weight", (10, 160)),
    ],
)
def test_names_of_the_reference_implementation(name: str, attention: str, key: str, shape: tuple[int, ...]):
    assert to_torch(random_variables(name, attention), name, attention=attention)[key].shape == shape


@pytest.mark.parametrize("ending", [".pth", ".pth.tar", ".safetensors", ".npz"])
def test_every_format_round_trips(state: State, tmp_path, ending: str):
    path = tmp_path / f"weights{ending}"
    write_state(state, path)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    found = read_state(path).state
    kept = {key for key in state if not key.endswith("num_batches_tracked")}
    assert found.keys() == kept
    for key in kept:
        np.testing.assert_array_equal(found[key], state[key])


def test_both_forms_of_its_files(state: State, tmp_path, caplog: pytest.LogCaptureFixture):
    training = {"epoch": 3, "arch": "x", "best_acc": torch.tensor(71.0), "optimizer": {"state": {}, "param_groups": []}}
    scores = {"best_acc": np.float64(71.0), "losses": [np.float32(0.5), np.int64(2)]}
    torch.save({"state_dict": in_torch(state)} | scores, tmp_path / "scores.pth.tar")
    torch.save(
        training | {"state_dict": in_torch({f"module.{k}": v for k, v in state.items()})}, tmp_path / "a.pth.tar"
    )
    torch.save({"state_dict": in_torch(state)}, tmp_path / "b.pth")
    torch.save(in_torch(state), tmp_path / "bare.pth")
    with caplog.at_level(logging.WARNING):
        _, first = load_torch(tmp_path / "a.pth.tar", "cifar_resnet20", attention="se")
    assert "arch, best_acc, epoch, optimizer" in caplog.text
    for name in ("b.pth", "bare.pth", "scores.pth.tar"):
        assert_equal(load_torch(tmp_path / name, "cifar_resnet20", attention="se")[1], first)
    assert_equal(from_torch(state, "cifar_resnet20", attention="se")[1], first)


def test_one_error_lists_everything(state: State):
    wrong = dict(state)
    wrong["layer1.0.conv1.wait"] = wrong.pop("layer1.0.conv1.weight")
    wrong["layer2.0.conv1.weight"] = np.zeros((32, 16, 1, 1), np.float32)
    del wrong["bn1.bias"]
    with pytest.raises(UserError) as caught:
        from_torch(wrong, "cifar_resnet20", attention="se")
    assert str(caught.value).splitlines()[1:-1] == [
        "  missing: bn1.bias (16,)",
        "  missing: layer1.0.conv1.weight (16, 16, 3, 3)",
        "  unexpected: layer1.0.conv1.wait (16, 16, 3, 3)",
        "  wrong shape: layer2.0.conv1.weight is (32, 16, 1, 1), must be (32, 16, 3, 3)",
    ]


def test_another_number_of_classes_needs_skip_head(state: State):
    with pytest.raises(UserError, match=r"linear\.weight is \(10, 64\), must be \(7, 64\)[^$]*skip the head"):
        from_torch(state, "cifar_resnet20", attention="se", num_classes=7)
    with pytest.raises(UserError, match="num_classes"):
        from_torch(state, "cifar_resnet20", attention="se", skip_head=True)
    model, variables = from_torch(state, "cifar_resnet20", attention="se", num_classes=7, skip_head=True)
    assert model.num_classes == 7
    assert variables["params"]["fc"]["kernel"].shape == (64, 7)
    assert float(np.std(variables["params"]["fc"]["kernel"])) > 0
    whole = from_torch(state, "cifar_resnet20", attention="se")[1]
    assert_equal(variables["params"]["layer1_0"], whole["params"]["layer1_0"])


@pytest.mark.parametrize("ending", [".pth.tar", ".safetensors", ".npz"])
def test_truncated_file(state: State, tmp_path, ending: str):
    write_state(state, tmp_path / f"whole{ending}")
    path = tmp_path / f"half{ending}"
    content = (tmp_path / f"whole{ending}").read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match="cannot be read as a file of weights"):
        read_state(path)


class Foreign:
    """Something a pickle could run."""

    def __reduce__(self):
        return (print, ("unpickled",))


def test_foreign_files_never_run(tmp_path, capsys: pytest.CaptureFixture):
    torch.save({"state_dict": {"a": Foreign()}}, tmp_path / "code.pth")
    np.savez(tmp_path / "code.npz", a=np.array([Foreign()], object))
    torch.save([1, 2], tmp_path / "list.pth")
    (tmp_path / "text.pth").write_text("hello")
    for name in ("code.pth", "code.npz", "list.pth", "text.pth"):
        with pytest.raises(UserError, match="cannot be read as a file of weights"):
            read_state(tmp_path / name)
    assert "unpickled" not in capsys.readouterr().out
    with pytest.raises(UserError, match="There is no file"):
        read_state(tmp_path / "nowhere.pth")


def test_command_both_ways(state: State, tmp_path, capsys: pytest.CaptureFixture):
    source, workdir, back = tmp_path / "in.npz", tmp_path / "run", tmp_path / "out.pth.tar"
    write_state(state, source)
    there = [str(source), str(workdir), "--model", "cifar_resnet20", "--attention", "se"]
    convert.main(there)
    model, variables = simam_jax.load(workdir)
    assert model.attention == "se"
    assert_equal(variables, from_torch(state, "cifar_resnet20", attention="se")[1])
    with pytest.raises(UserError, match="exists already"):
        convert.main(there)
    convert.main([str(workdir), str(back), "--to-torch", "--module-prefix"])
    found = read_state(back).state
    kept = {key for key in state if not key.endswith("num_batches_tracked")}
    assert found.keys() == kept
    for key in kept:
        np.testing.assert_array_equal(found[key], state[key])
    with pytest.raises(UserError, match="exists already"):
        convert.main([str(workdir), str(back), "--to-torch"])
    with pytest.raises(UserError, match="Unknown ending"):
        convert.main([str(workdir), str(tmp_path / "out.onnx"), "--to-torch"])
    assert f"Wrote {workdir}" in capsys.readouterr().out
