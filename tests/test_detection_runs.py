"""A detector's runs in processes of their own: interrupted, on two hosts, scored elsewhere, tuned to other classes."""

import json
import signal

import jax
import numpy as np
import pytest
from PIL import Image
from processes import Run, free_port, losses, pictures

import simam_jax

pytestmark = pytest.mark.slow

SMALL = {
    "batch_size": 4,
    "num_steps": 9,
    "log_every_steps": 1,
    "eval_every_epochs": 0.0,
    "visualize_every_epochs": 0.0,
    "checkpoint.every_epochs": 0.005,  # every second update
    "data.max_size": 64,
    "data.min_size": 64,
}


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


def start(workdir, cache, **changes) -> Run:
    return Run(workdir, cache, recipe="digit_scenes_mask_rcnn", small=SMALL, **changes)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, cache):
    workdir = tmp_path_factory.mktemp("undisturbed")
    run = start(workdir, cache, visualize_every_epochs=1.0)
    assert run.end(600) == 0, run.output
    assert "eval box AP" in run.output
    return workdir


def test_what_a_run_leaves_behind(undisturbed):
    results = json.loads((undisturbed / "results" / "eval" / "results_segm.json").read_text())
    assert all({"image_id", "category_id", "score", "segmentation"} == set(result) for result in results)
    lines = [json.loads(line) for line in (undisturbed / "metrics.jsonl").read_text().splitlines()]
    scores = next(line for line in lines if "eval/bbox_AP" in line)
    assert {"eval/bbox_AP50", "eval/segm_AP", "eval/bbox_AP_small", "eval/segm_AR100"} <= set(scores)
    updates = [line for line in lines if "train/loss" in line][1]  # the first one compiled, and is not timed
    assert {f"train/loss_{part}" for part in ("rpn_cls", "rpn_bbox", "cls", "bbox", "mask")} <= set(updates)
    assert {"train/positives", "train/recall", "data_wait_percent"} <= set(updates)
    assert pictures(undisturbed, "detections/0")[9].shape == (480, 960, 3)  # truth and detections, enlarged
    predictor = simam_jax.Predictor.load(undisturbed)
    assert predictor.class_names == tuple("0123456789")
    assert predictor.preprocessing.min_size == 64
    (found,) = predictor([np.zeros((50, 70, 3), np.uint8)])
    assert found.masks.shape[1:] == (50, 70)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_an_interrupted_run_ends_as_one_that_was_left_alone(number, tmp_path, cache, undisturbed):
    run = start(tmp_path, cache)
    run.until("step 5/9")
    run.kill(number)
    assert run.end() == (-signal.SIGKILL if number == signal.SIGKILL else 0), run.output
    run = start(tmp_path, cache)
    assert run.end(600) == 0, run.output
    assert "Continuing from" in run.output
    (_, a), (_, b) = simam_jax.load(tmp_path), simam_jax.load(undisturbed)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(a), jax.device_get(b))
    assert losses(tmp_path)[9] == losses(undisturbed)[9]


def test_two_processes_of_two_devices_are_one_of_four(tmp_path, cache):
    frozen = {"detection.batch_norm": "frozen", "num_steps": 3, "schedule.learning_rate": 0.01}
    single = start(tmp_path / "single", cache, devices=4, **frozen)
    assert single.end(600) == 0, single.output
    address = {"distributed.coordinator_address": f"127.0.0.1:{free_port()}", "distributed.num_processes": 2}
    pair = [
        start(tmp_path / "pair", cache, devices=2, **frozen, **address, **{"distributed.process_id": i})
        for i in range(2)
    ]
    for run in pair:
        assert run.end(600) == 0, run.output
    one, two = losses(tmp_path / "single"), losses(tmp_path / "pair")
    assert list(one) == list(two) == [1, 2, 3]
    np.testing.assert_allclose(list(two.values()), list(one.values()), rtol=1e-5)


@pytest.fixture
def two_letters(tmp_path):
    """A json of six images and two classes of other names."""
    images, annotations = [], []
    (tmp_path / "images").mkdir()
    for i in range(6):
        pixels = np.full((64, 64, 3), 40 * i, np.uint8)
        pixels[10:40, 20:44] = 255 - pixels[10:40, 20:44]
        Image.fromarray(pixels).save(tmp_path / "images" / f"{i}.png")
        images.append({"id": 100 + i, "file_name": f"{i}.png", "height": 64, "width": 64})
        polygon = [20, 10, 44, 10, 44, 40, 20, 40]
        of = {"id": 1 + i, "image_id": 100 + i, "category_id": 7 + i % 2, "bbox": [20, 10, 24, 30], "area": 720}
        annotations.append(of | {"iscrowd": 0, "segmentation": [polygon]})
    categories = [{"id": 7, "name": "alpha"}, {"id": 8, "name": "beta"}]
    found = {"images": images, "annotations": annotations, "categories": categories}
    (tmp_path / "letters.json").write_text(json.dumps(found))
    own = {"data.source": "coco"}
    for split in ("train", "eval"):
        own |= {f"data.{split}_annotations": tmp_path / "letters.json", f"data.{split}_images": tmp_path / "images"}
    return own


def test_a_detector_is_tuned_to_other_classes_and_scored_on_any_json(tmp_path, cache, undisturbed, two_letters):
    refused = start(tmp_path / "tuned", cache, init_from=undisturbed, **two_letters)
    assert refused.end() == 2
    assert "init_skip_head" in refused.output
    changes = two_letters | {"init_from": undisturbed, "init_skip_head": True, "schedule.learning_rate": 0.0}
    run = start(tmp_path / "tuned", cache, **changes | {"schedule.warmup_steps": 0, "num_steps": 1})
    assert run.end(600) == 0, run.output
    (_, old), (model, new) = simam_jax.load(undisturbed), simam_jax.load(tmp_path / "tuned")
    assert model.num_classes == 2
    old, new = jax.device_get((old["params"], new["params"]))
    jax.tree.map(np.testing.assert_array_equal, old["rpn_head"], new["rpn_head"])
    jax.tree.map(np.testing.assert_array_equal, old["bbox_head"]["shared_fcs_0"], new["bbox_head"]["shared_fcs_0"])
    assert new["bbox_head"]["fc_cls"]["bias"].shape == (3,)

    only = {name: value for name, value in two_letters.items() if "train" not in name} | {"data.data_dir": ""}
    scored = start(tmp_path / "tuned", cache, mode="eval", **only)
    assert scored.end() == 0, scored.output
    assert "eval box AP" in scored.output
    other = start(tmp_path / "tuned", cache, mode="eval")
    assert other.end() == 2
    assert "is of another model" in other.output or "classes" in other.output
