"""mmdetection's files of detectors: names, layouts, numbers of classes, and a classifier as a backbone."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
from flax.traverse_util import flatten_dict
from golden_detectors import golden_model, key_of
from golden_detectors import to_torch as laid_out

import simam_jax
from simam_jax import Predictor, UserError, checkpoints, create_model
from simam_jax.convert import main as convert
from simam_jax.convert import write_state
from simam_jax.models import init_variables, variable_shapes
from simam_jax.torch_weights.names import to_torch
from simam_jax.weights import start_from

pytestmark = pytest.mark.usefixtures("quickly_compiled")

MASK = "mask_rcnn_resnet50_fpn"
SHARED = Path(__file__).parents[2] / "shared" / "golden" / "detection"


@pytest.fixture(scope="module")
def golden():
    return golden_model(MASK)


@pytest.fixture(scope="module")
def small():
    """A detector of three classes with the smallest backbone, and its variables."""
    model = create_model("mask_rcnn_resnet18_fpn", num_classes=3)
    return model, init_variables(model, jax.random.key(0))


def assert_equal(got, expected):
    jax.tree.map(np.testing.assert_array_equal, got, expected)


def test_names_and_layouts_are_those_of_the_reference_implementation(golden):
    _, variables = golden
    expected = {key_of(path): laid_out(path, x) for path, x in flatten_dict(variables).items()}
    state = to_torch(variables, MASK)
    counters = {key for key in state if key.endswith("num_batches_tracked")}
    assert set(state) - counters == set(expected)
    for key, x in expected.items():
        np.testing.assert_array_equal(state[key], x, err_msg=key)


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the reference implementation's list of entries")
@pytest.mark.parametrize(("name", "file"), [(MASK, "mr_r50"), ("faster_rcnn_resnet50_fpn", "fr_r50")])
def test_entries_are_those_that_the_reference_implementation_lists(name, file):
    _, variables = golden_model(name)
    state = to_torch(variables, name)
    entries = json.loads((SHARED / f"state_dict_{file}.json").read_text())
    assert {key: list(x.shape) for key, x in state.items()} == {entry["key"]: entry["shape"] for entry in entries}
    for entry in entries:
        if "sum" in entry:
            np.testing.assert_allclose(state[entry["key"]].sum(dtype=np.float64), entry["sum"], rtol=1e-6, atol=1e-4)


@pytest.mark.parametrize(
    ("ending", "prefix"), [(".pth", "module."), (".pth.tar", ""), (".npz", "module."), (".safetensors", "")]
)
def test_files_of_every_kind_load_with_as_many_classes_as_they_have(small, ending, prefix, tmp_path):
    model, variables = small
    state = to_torch(variables, model.architecture, prefix=prefix)
    path = tmp_path / f"detector{ending}"
    if ending.startswith(".pth"):  # as mmcv writes them
        tensors = {key: torch.from_numpy(x) for key, x in state.items()}
        meta = {"mmdet_version": "2.9.0", "CLASSES": ("cat", "dog", "bird"), "epoch": 12}
        torch.save(
            {
                "meta": meta,
                "state_dict": tensors,
                "optimizer": {"state": {0: tensors[f"{prefix}neck.fpn_convs.0.conv.bias"]}},
            },
            path,
        )
    else:
        write_state(state, path)
    loaded, got = simam_jax.load_torch(path, model.architecture, attention="simam", attention_param=0.1)
    assert loaded.num_classes == 3
    assert_equal(got, variables)


def test_class_names_are_mmdetections_or_cocos(small, tmp_path, caplog):
    model, variables = small
    tensors = {key: torch.from_numpy(x) for key, x in to_torch(variables, model.architecture).items()}
    torch.save({"meta": {"CLASSES": ("cat", "dog", "bird")}, "state_dict": tensors}, tmp_path / "pets.pth")
    predictor = Predictor.load(tmp_path / "pets.pth", name=model.architecture)
    assert predictor.class_names == ("cat", "dog", "bird")
    coco = create_model(model.architecture)
    write_state(to_torch(init_variables(coco, jax.random.key(0)), coco.architecture), tmp_path / "coco.npz")
    with caplog.at_level("WARNING"):
        names = Predictor.load(tmp_path / "coco.npz", name=coco.architecture).class_names
    assert "assumed: COCO's 80" in caplog.text
    assert (len(set(names)), names[0], names[79]) == (80, "person", "toothbrush")


def test_weights_without_simam_in_their_names_are_weights_with_it(small, tmp_path, caplog):
    model, variables = small
    write_state(to_torch(variables, model.architecture, attention="none"), tmp_path / "plain.npz")
    with caplog.at_level("WARNING"):
        _, got = simam_jax.load_torch(tmp_path / "plain.npz", model.architecture)
    assert "trained with attention=none, loaded with attention=simam" in caplog.text
    assert_equal(got, variables)


def test_missing_and_unexpected_entries_are_listed(small, tmp_path):
    model, variables = small
    state = to_torch(variables, model.architecture)
    state["neck.extra"] = state.pop("rpn_head.rpn_cls.bias")
    write_state(state, tmp_path / "other.npz")
    with pytest.raises(UserError, match=r"missing: rpn_head\.rpn_cls\.bias \(3,\)\n  unexpected: neck\.extra"):
        simam_jax.load_torch(tmp_path / "other.npz", model.architecture)


def test_convert_goes_both_ways(small, tmp_path):
    model, variables = small
    write_state(to_torch(variables, model.architecture), tmp_path / "detector.npz")
    convert([str(tmp_path / "detector.npz"), str(tmp_path / "run"), "--model", model.architecture])
    convert([str(tmp_path / "run"), str(tmp_path / "back.npz"), "--to-torch"])
    assert_equal(
        dict(np.load(tmp_path / "back.npz")) | {"simam_jax": 0},
        to_torch(variables, model.architecture) | {"simam_jax": 0},
    )
    again, got = simam_jax.load(tmp_path / "run")
    assert again == model
    assert_equal(got, variables)


@pytest.mark.parametrize("kind", ["workdir", "file", "file without SimAM"])
def test_a_classifiers_weights_are_a_detectors_backbone(small, kind, tmp_path):
    model, fresh = small
    classifier = create_model("resnet18", num_classes=7)
    weights = init_variables(classifier, jax.random.key(1))
    if kind == "workdir":
        path = tmp_path / "run"
        checkpoints.write_weights(path, {"task": "classification", "model": classifier.spec()}, weights)
    else:
        path = tmp_path / "resnet18.npz"
        write_state(to_torch(weights, "resnet18", attention="none" if "without" in kind else "simam"), path)
    spec = {"task": "detection", "model": model.spec()}
    got = start_from(str(path), model, spec, fresh, skip_head=False)
    for part in ("params", "batch_stats"):
        assert_equal(got[part]["backbone"], {name: x for name, x in weights[part].items() if name != "fc"})
        assert_equal(*({name: x for name, x in tree[part].items() if name != "backbone"} for tree in (got, fresh)))


def test_a_detector_for_other_classes_keeps_all_but_the_layers_for_classes(small, tmp_path):
    model, variables = small
    write_state(to_torch(variables, model.architecture), tmp_path / "detector.npz")
    other = create_model(model.architecture, num_classes=5)
    fresh = init_variables(other, jax.random.key(2))
    got = start_from(str(tmp_path / "detector.npz"), other, {"model": other.spec()}, fresh, skip_head=True)
    flat, old, new = map(flatten_dict, (got, variables, fresh))
    for path, x in flat.items():
        drawn = path[-2] in ("fc_cls", "fc_reg", "conv_logits")
        np.testing.assert_array_equal(x, (new if drawn else old)[path], err_msg=str(path))


def test_weights_of_another_backbone_are_an_error(small, tmp_path):
    model, fresh = small
    other = create_model("resnet34", num_classes=7)
    write_state(to_torch(init_variables(other, jax.random.key(1)), "resnet34"), tmp_path / "resnet34.npz")
    with pytest.raises(UserError, match="does not fit resnet18"):
        start_from(str(tmp_path / "resnet34.npz"), model, {"model": model.spec()}, fresh, skip_head=False)


def test_a_detector_comes_back_with_its_own_numbers_of_categories(tmp_path):
    model = create_model("faster_rcnn_tiny_fpn", num_classes=3, min_bbox_size=2)
    variables = jax.tree.map(lambda x: np.ones(x.shape, x.dtype), variable_shapes(model))
    how = {"min_size": 64, "max_size": 96, "mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.2]}
    known = {"class_names": ["car", "bus", "tram"], "category_ids": [4, 9, 2], "preprocessing": how}
    checkpoints.write_weights(tmp_path / "run", {"task": "detection", "model": model.spec()} | known, variables)
    file = str(tmp_path / "weights.npz")
    convert([str(tmp_path / "run"), file, "--to-torch"])
    convert([file, str(tmp_path / "back")])
    predictor = Predictor.load(tmp_path / "back")
    assert (predictor.category_ids, predictor.class_names) == ((4, 9, 2), ("car", "bus", "tram"))
    assert predictor.model == model
    assert predictor.preprocessing.max_size == 96
