"""What real people's files of weights look like: wrappers, counters, several places, and networks without SimAM."""

import argparse
import collections
import io
import logging
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

import simam_jax
from simam_jax import Predictor, UserError, convert, load_torch
from simam_jax.models import variable_shapes
from simam_jax.torch_weights.files import read_state, write_state
from simam_jax.torch_weights.names import to_torch
from simam_jax.torch_weights.variables import from_torch
from simam_jax.weights import check_class_names, start_from

pytestmark = pytest.mark.usefixtures("quickly_compiled")

torch = pytest.importorskip("torch")

NAME = "cifar_resnet20"
PUBLISHED = Path(os.environ.get("SIMAM_GOLDEN", Path(__file__).parents[2] / "shared" / "golden")) / "checkpoint"


@pytest.fixture(scope="module")
def variables():
    rng = np.random.default_rng(0)
    model = simam_jax.create_model(NAME)
    return jax.tree.map(lambda leaf: 0.5 + rng.random(leaf.shape, np.float32) / 9, variable_shapes(model))


@pytest.fixture(scope="module")
def state(variables):
    return {key: torch.from_numpy(value) for key, value in to_torch(variables, NAME).items()}


def loaded(contents, path, **settings):
    torch.save(contents, path)
    return load_torch(path, NAME, **settings)[1]


def assert_equal(tree, other):
    jax.tree.map(np.testing.assert_array_equal, tree, other)


def test_counters_of_other_tools_are_left_out_with_one_notice(state, variables, tmp_path, caplog):
    counted = dict(state)
    for module in ("", "conv1.", "layer1.0.conv2.1.", "linear."):
        counted |= {f"{module}total_ops": torch.zeros(1), f"{module}total_params": torch.zeros(1)}
    counted["n_averaged"] = torch.tensor(3)
    with caplog.at_level(logging.WARNING):
        assert_equal(loaded({"state_dict": counted}, tmp_path / "counted.pth.tar"), variables)
    assert caplog.text.count("left out 9 entries") == 1
    other = loaded(counted, tmp_path / "bare.pth", num_classes=7, skip_head=True)
    assert other["params"]["fc"]["kernel"].shape == (64, 7)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "model.backbone.", "net.module."])
def test_prefixes_of_wrappers_are_stripped_and_said(prefix, state, variables, tmp_path, caplog):
    wrapped = {prefix + key: value for key, value in state.items()} | {"n_averaged": torch.tensor(1)}
    with caplog.at_level(logging.WARNING):
        assert_equal(loaded(wrapped, tmp_path / "wrapped.pth"), variables)
    assert f"stripped {prefix!r}" in caplog.text


@pytest.mark.parametrize("key", ["state_dict", "model", "net", "model_state_dict", "weights"])
def test_weights_are_found_where_training_scripts_put_them(key, state, variables, tmp_path):
    contents = {key: state, "epoch": 3, 7: "a number as a key", "args": argparse.Namespace(lr=0.1)}
    contents["history"] = collections.defaultdict(list, {"loss": [np.float64(0.5)]})
    contents["confusion"] = np.eye(3)
    assert_equal(loaded(contents, tmp_path / "a.PTH"), variables)


def test_of_several_one_is_chosen_by_key_and_the_average_only_if_there_is_one(state, variables, tmp_path):
    average = {key: value + 1 if value.ndim else value for key, value in state.items()}
    two = tmp_path / "two.pth"
    with pytest.raises(UserError, match=r"weights under model, state_dict: choose one with --key"):
        loaded({"model": average, "state_dict": state}, two)
    assert_equal(load_torch(two, NAME, key="state_dict")[1], variables)
    with pytest.raises(UserError, match="Did you mean 'state_dict'"):
        load_torch(two, NAME, key="statedict")
    with pytest.raises(UserError, match="holds no average"):
        load_torch(two, NAME, ema=True)
    contents = {"state_dict": state, "state_dict_ema": average}
    found = loaded(contents, tmp_path / "average.pth", ema=True)
    assert_equal(found["params"], jax.tree.map(lambda x: x + 1, variables["params"]))
    assert_equal(load_torch(tmp_path / "average.pth", NAME)[1], variables)


def test_parameters_are_tensors(state, variables, tmp_path):
    parameters = {key: torch.nn.Parameter(x) if x.dtype.is_floating_point else x for key, x in state.items()}
    assert_equal(loaded(parameters, tmp_path / "parameters.pth"), variables)


class Custom:
    """What only its own code could make."""


def test_what_cannot_be_read_says_why_and_what_to_do(state, tmp_path):
    torch.save({"state_dict": state, "config": Custom()}, tmp_path / "custom.pth")
    with pytest.raises(UserError, match=r"an object of \S*Custom.*Save the weights alone") as error:
        read_state(tmp_path / "custom.pth")
    assert "weights_only" not in str(error.value)
    (tmp_path / "noise.pth").write_bytes(np.random.default_rng(0).bytes(1000))
    (tmp_path / "opcode.pth").write_bytes(b"\x80\x02~.")
    for name in ("noise.pth", "opcode.pth"):
        with pytest.raises(UserError, match="cannot be read as a file of weights") as noise:
            read_state(tmp_path / name)
        assert "weights_only" not in str(noise.value)
        assert "an object of" not in str(noise.value)
    assert "\x1b" not in str(error.value)
    (tmp_path / "page.pth").write_text("<!DOCTYPE html><html>Not found</html>")
    with pytest.raises(UserError, match="an HTML page"):
        read_state(tmp_path / "page.pth")
    (tmp_path / "pointer.pth").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    with pytest.raises(UserError, match="git lfs pull"):
        read_state(tmp_path / "pointer.pth")


def test_an_archive_is_refused_by_what_it_declares(tmp_path):
    np.savez_compressed(tmp_path / "bomb.npz", a=np.zeros(2**26, np.float32))
    np.savez(tmp_path / "text.npz", a=np.array(["text"]))
    np.savez(tmp_path / "complex.npz", a=np.zeros(3, complex))
    for name, message in (("bomb", "unpacks to more than"), ("text", "no numbers"), ("complex", "no numbers")):
        with pytest.raises(UserError, match=message):
            read_state(tmp_path / f"{name}.npz")


@pytest.mark.parametrize("name", ["cifar_resnet20", "resnet18", "mobilenet_v2", "cifar_preresnet20", "resnext50_32x4d"])
def test_plain_weights_are_simam_s_and_the_other_way_round(name, caplog):
    rng = np.random.default_rng(0)
    shapes = variable_shapes(simam_jax.create_model(name, num_classes=7))
    tree = jax.tree.map(lambda leaf: rng.random(leaf.shape, np.float32), shapes)
    for there, here in (("none", "simam"), ("simam", "none")):
        with caplog.at_level(logging.WARNING):
            model, found = from_torch(to_torch(tree, name, attention=there), name, attention=here)
        assert f"trained with attention={there}, loaded with attention={here}" in caplog.text
        assert (model.attention, model.num_classes) == (here, 7)
        assert_equal(found, tree)
        caplog.clear()
    entries = to_torch(tree, name, attention="none")
    first = next(iter(entries))
    del entries[first]
    with pytest.raises(UserError, match=f"missing: {first}"):
        from_torch(entries, name)


def test_weights_that_are_not_finite_are_refused(variables):
    state = to_torch(variables, NAME)
    state["bn1.weight"] = np.full_like(state["bn1.weight"], np.nan)
    with pytest.raises(UserError, match=r"not finite.*bn1"):
        from_torch(state, NAME)


@pytest.mark.parametrize("ending", [".pth.tar", ".safetensors", ".npz"])
def test_a_round_trip_keeps_preprocessing_and_classes(ending, variables, tmp_path):
    source, run, back, again = tmp_path / "in.npz", tmp_path / "run", tmp_path / f"out{ending}", tmp_path / "again"
    write_state(to_torch(variables, NAME), source)
    names = tmp_path / "names.txt"
    names.write_text("\n".join(f"class {i}" for i in range(10)))
    seen = ["--mean", "0.1", "0.2", "0.3", "--std", "0.5", "0.5", "0.5", "--image-size", "16", "--eval-resize", "20"]
    convert.main([str(source), str(run), "--model", NAME, *seen, "--class-names", str(names)])
    convert.main([str(run), str(back), "--to-torch"])
    convert.main([str(back), str(again)])  # it says itself which network it is
    first, last = Predictor.load(run), Predictor.load(again)
    assert first.preprocessing == last.preprocessing == Predictor.load(back).preprocessing
    assert (first.preprocessing.image_size, first.preprocessing.mean) == (16, (0.1, 0.2, 0.3))
    assert first.class_names == last.class_names == tuple(names.read_text().splitlines())
    pixels = np.random.default_rng(0).integers(0, 256, (2, 30, 20, 3), np.uint8)
    np.testing.assert_array_equal(first(pixels).probabilities, last(pixels).probabilities)


def test_what_is_assumed_of_a_file_without_a_word_is_said(variables, tmp_path, caplog):
    write_state(to_torch(variables, NAME), tmp_path / "in.npz")
    with caplog.at_level(logging.WARNING):
        Predictor.load(tmp_path / "in.npz", name=NAME)
    assert "do not say how images were prepared; assumed" in caplog.text


def test_safetensors_need_no_torch(variables, tmp_path):
    write_state(to_torch(variables, NAME), tmp_path / "in.npz")
    code = f"""if True:
        import sys
        sys.modules["torch"] = None
        from simam_jax.torch_weights.files import read_state, write_state
        write_state(read_state({str(tmp_path / "in.npz")!r}).state, {str(tmp_path / "out.safetensors")!r})
    """
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parent.parent)
    assert_equal(load_torch(tmp_path / "out.safetensors", NAME)[1], variables)


def test_class_names_of_data_and_weights_must_agree():
    cats, dogs = {"class_names": ["cat", "dog"]}, {"class_names": ["cat", "hound"]}
    with pytest.raises(UserError, match=r"1 of 2 differ; 1: 'dog' there, 'hound' in the data.*by_order"):
        check_class_names(cats, dogs, "the checkpoint")
    check_class_names(cats, dogs, "the checkpoint", "by_order")
    check_class_names(cats, {}, "the checkpoint")


def test_fine_tuning_refuses_a_head_for_other_classes(variables, tmp_path):
    model = simam_jax.create_model(NAME)
    spec = {"model": model.spec(), "class_names": [f"class {i}" for i in range(10)]}
    simam_jax.checkpoints.write_weights(tmp_path / "run", spec, variables)
    other = spec | {"class_names": [f"kind {i}" for i in range(10)]}
    with pytest.raises(UserError, match="10 of 10 differ"):
        start_from(str(tmp_path / "run"), model, other, variables, skip_head=False)
    assert_equal(start_from(str(tmp_path / "run"), model, other, variables, skip_head=True), variables)
    found = start_from(str(tmp_path / "run"), model, other, variables, skip_head=False, match_classes="by_order")
    assert_equal(found, variables)


def test_one_image_of_any_kind_is_one_prediction(variables, tmp_path):
    write_state(to_torch(variables, NAME), tmp_path / "in.npz")
    predictor = Predictor.load(tmp_path / "in.npz", name=NAME)
    pixels = np.random.default_rng(0).integers(0, 256, (40, 30, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "image.png")
    data = (tmp_path / "image.png").read_bytes()
    tensor = torch.from_numpy(pixels)
    images = [tmp_path / "image.png", data, io.BytesIO(data), pixels, tensor, tensor.permute(2, 0, 1)]
    together = predictor([*images[:2], io.BytesIO(data), *images[3:]]).probabilities
    for image, expected in zip(images, together, strict=True):
        np.testing.assert_array_equal(predictor(image).probabilities, together[:1])
        np.testing.assert_array_equal(expected, together[0])


def test_a_truncated_or_closed_pil_image_is_that_image_s_error(variables, tmp_path):
    write_state(to_torch(variables, NAME), tmp_path / "in.npz")
    predictor = Predictor.load(tmp_path / "in.npz", name=NAME)
    Image.fromarray(np.zeros((40, 30, 3), np.uint8)).save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:60])
    cut, closed, whole = Image.open(tmp_path / "cut.png"), Image.open(tmp_path / "whole.png"), tmp_path / "whole.png"
    closed.close()
    results = [result for _, result in predictor.stream([cut, closed, whole])]
    assert [isinstance(result, UserError) for result in results] == [True, True, False]


@pytest.mark.skipif(not PUBLISHED.is_dir(), reason="the published checkpoint is not part of the project")
@pytest.mark.usefixtures("fully_compiled")
def test_the_published_checkpoint_gives_the_reference_implementation_s_logits(tmp_path):
    path = PUBLISHED / "cifar100_resnet20_simam.pth.tar"
    with np.load(PUBLISHED / "cifar100_test_1000.npz") as file:
        images, labels, logits = (file[name] for name in ("image", "label", "logits"))
    predictor = Predictor.load(path, name=NAME)
    convert.main([str(path), str(tmp_path / "run"), "--model", NAME])
    model, variables = load_torch(path, NAME)
    found = np.asarray(jax.jit(predictor.logits)(predictor.variables, images))
    assert np.abs(found - logits).max() < 1e-5 * np.abs(logits).max()
    assert (found.argmax(1) == labels).sum() == 703
    for other in (Predictor.load(tmp_path / "run"), Predictor(model, variables, predictor.preprocessing)):
        assert (other.model, other.preprocessing) == (predictor.model, predictor.preprocessing)
        assert_equal(other.variables, predictor.variables)
