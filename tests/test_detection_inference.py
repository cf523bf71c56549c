"""A detector as one looks at images with it: `Predictor`, its preprocessing, its results, `predict`."""

import dataclasses
import json
from pathlib import Path

import golden_detectors
import jax
import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_sample_images

from simam_jax import DetectionPreprocessing, Predictor, UserError, checkpoints, create_model, export, predict, summary
from simam_jax.convert import write_state
from simam_jax.detection.detections import Detections
from simam_jax.models import init_variables
from simam_jax.ops.bilinear import resize_bilinear
from simam_jax.torch_weights.names import to_torch

TEMPLE, FLOWER = load_sample_images().images
SMALL = DetectionPreprocessing(min_size=64, max_size=96)
GOLDEN = Path(__file__).parents[2] / "shared" / "golden" / "detection"
needs_goldens = pytest.mark.skipif(not GOLDEN.is_dir(), reason="needs the reference implementation's own images")


@pytest.fixture(scope="module")
def predictor():
    """A detector that finds things: its scores are spread."""
    model = create_model("mask_rcnn_resnet18_fpn", num_classes=3)
    variables = init_variables(model, jax.random.key(0))
    for head, layer in (("rpn_head", "rpn_cls"), ("bbox_head", "fc_cls"), ("bbox_head", "fc_reg")):
        variables["params"][head][layer]["kernel"] *= 30
    return Predictor(model, variables, SMALL, ["cat", "dog", "bird"])


def assert_same(got: Detections, expected: Detections):
    """The same objects; those of drawn weights have scores so close that they may stand in another order."""
    assert len(got) == len(expected)
    for i, box in enumerate(expected.boxes):
        distance = np.abs(got.boxes - box).max(1) + 1000 * (got.labels != expected.labels[i])
        j = int(distance.argmin())
        assert distance[j] < 2e-4 * 640 / 96  # pixels of the image as it was read
        assert abs(got.scores[j] - expected.scores[i]) < 1e-5
        assert (got.masks[j] != expected.masks[i]).sum() <= 5


def test_resizing_is_the_reference_implementations_to_the_bit():
    with np.load(Path(__file__).parent / "golden" / "detection" / "unit.npz") as unit:
        for name in ("up_80x60", "down_30x20"):
            expected = unit[f"resize/{name}"]
            np.testing.assert_array_equal(resize_bilinear(unit["resize/in"], expected.shape[:2]), expected)


@needs_goldens
@pytest.mark.parametrize(("case", "size"), [("fr", (200, 333)), ("mr", (400, 667))])
def test_photographs_have_the_reference_implementations_pixels(case, size):
    with np.load(GOLDEN / f"{case}_r50_infer.npz") as stored:
        expected = stored["img_resized_bgr_u8"][..., ::-1]
    info = json.loads((GOLDEN / f"{case}_r50_infer.json").read_text())
    resized = DetectionPreprocessing(*size)(GOLDEN / info["input"]["image"])
    np.testing.assert_array_equal(resized.pixels, expected)
    assert resized.size == tuple(info["meta"]["ori_shape"][:2])


@needs_goldens
@pytest.mark.slow
@pytest.mark.parametrize(("case", "name", "size"), [
    ("fr", "faster_rcnn_resnet50_fpn", (200, 333)), ("mr", "mask_rcnn_resnet50_fpn", (400, 667)),
])  # fmt: skip
def test_from_the_image_file_to_the_reference_implementations_detections(case, name, size, tmp_path):
    model, variables = golden_detectors.golden_model(name)
    write_state(to_torch(variables, name), tmp_path / "weights.npz")
    predictor = Predictor.load(tmp_path / "weights.npz", name=name, preprocessing=DetectionPreprocessing(*size))
    assert predictor.model == model
    info = json.loads((GOLDEN / f"{case}_r50_infer.json").read_text())
    (found,) = predictor(GOLDEN / info["input"]["image"])
    with np.load(GOLDEN / f"{case}_r50_infer.npz") as stored:
        np.testing.assert_array_equal(found.labels, stored["det_label_rescaled"])
        np.testing.assert_allclose(found.boxes, stored["det_rescaled"][:, :4], atol=5e-4)
        np.testing.assert_allclose(found.scores, stored["det_rescaled"][:, 4], atol=1e-5)
        if case == "mr":
            height, width = info["meta"]["ori_shape"][:2]
            masks = np.unpackbits(stored["masks_packed"])[: 100 * height * width].reshape(100, height, width)
            assert (found.masks != masks).sum() <= 5


def test_images_of_any_sizes_have_results_in_their_order(predictor):
    images = [TEMPLE, TEMPLE.transpose(1, 0, 2).copy(), FLOWER[:300, :300]]
    found = predictor(images)
    assert [each.masks.shape[1:] for each in found] == [image.shape[:2] for image in images]
    for each, image in zip(found, images, strict=True):
        assert len(each) > 0
        assert each.boxes.dtype == each.scores.dtype == np.float32
        assert each.labels.dtype == np.int32
        assert each.masks.dtype == bool
        assert (np.diff(each.scores) <= 0).all()
        assert (each.boxes >= 0).all()
        assert (each.boxes <= np.array(image.shape)[[1, 0, 1, 0]] + 1e-3).all()
        assert set(each.names) <= {"cat", "dog", "bird"}


def test_a_result_does_not_depend_on_the_images_beside_it(predictor):
    images = TEMPLE, FLOWER[:300]  # of one bucket, the second padded further
    for image, expected in zip(images, predictor(images), strict=True):
        (alone,) = predictor(image)
        assert_same(alone, expected)


def test_a_workdir_needs_no_name_and_keeps_preprocessing_and_names(predictor, tmp_path):
    spec = {
        "task": "detection",
        "model": predictor.model.spec(),
        "preprocessing": dataclasses.asdict(SMALL),
        "class_names": ["cat", "dog", "bird"],
    }
    checkpoints.write_weights(tmp_path / "run", spec, predictor.variables)
    loaded = Predictor.load(tmp_path / "run")
    assert loaded.preprocessing == SMALL
    assert loaded.class_names == ("cat", "dog", "bird")
    assert loaded.model == predictor.model


def test_an_unreadable_image_is_named_in_its_place(predictor, tmp_path):
    (tmp_path / "broken.jpg").write_bytes(b"nothing")
    results = [result for _, result in predictor.stream([TEMPLE, tmp_path / "broken.jpg", FLOWER])]
    assert [type(result) for result in results] == [Detections, UserError, Detections]
    assert "broken.jpg" in str(results[1])


@pytest.mark.parametrize("size", [(64, 96), (1, 300), (300, 1), (96, 64), (50, 51)])
def test_every_size_fits_a_bucket(size):
    height, width = SMALL.resized(*size)
    bucket = SMALL.bucket(height, width)
    assert bucket[0] >= height
    assert bucket[1] >= width
    assert all(side % 32 == 0 for side in bucket)


def test_six_buckets_hold_all_images_of_the_default_size():
    how = DetectionPreprocessing()
    rng = np.random.default_rng(0)
    buckets = {how.bucket(*how.resized(*size)) for size in rng.integers(1, 5000, (500, 2))}
    assert buckets == {(800, 1088), (800, 1216), (800, 1344), (1088, 800), (1216, 800), (1344, 800)}


def test_wrong_sizes_are_errors():
    with pytest.raises(UserError, match="min_size=10 must be at least 1, and max_size=5"):
        DetectionPreprocessing(10, 5)


def test_rows_lines_and_a_picture():
    mask = np.zeros((40, 60), bool)
    mask[10:20, 10:30] = True
    boxes = np.array([[10, 10, 30, 20], [0, 0, 5, 5]], np.float32)
    scores, labels = np.array([0.9, 0.2], np.float32), np.array([1, 0], np.int32)
    found = Detections(boxes, scores, labels, np.stack([mask, ~mask]), ("cat", "dog"))
    assert found.rows()[0] == {"class": "dog", "score": pytest.approx(0.9), "box": [10, 10, 30, 20], "area": 200}
    assert found.lines()[0] == " 90.00 %  dog  10 10 30 20"
    picture = np.asarray(found.draw(np.zeros((40, 60, 3), np.uint8)))
    assert picture.shape == (40, 60, 3)
    assert picture[15, 20].any()  # within the mask
    assert not picture[35, 50].any()  # in the mask of the one whose score is too low to be shown


def test_predict_prints_objects(predictor, tmp_path, capsys):
    spec = {"task": "detection", "model": predictor.model.spec(), "preprocessing": dataclasses.asdict(SMALL)}
    checkpoints.write_weights(tmp_path / "run", spec, predictor.variables)
    Image.fromarray(TEMPLE).save(tmp_path / "temple.png")
    assert predict.main(["--checkpoint", str(tmp_path / "run"), str(tmp_path / "temple.png"), "--json"]) == 0
    row = json.loads(capsys.readouterr().out)
    (expected,) = predictor(TEMPLE)
    assert [each["box"] for each in row["objects"]] == [each["box"] for each in expected.rows()]


def test_the_summary_has_the_reference_implementations_counts(capsys):
    summary.main(["--model", "mask_rcnn_resnet50_fpn"])
    table = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if line}
    counts = {"backbone": 23508032, "neck": 3344384, "rpn_head": 593935, "bbox_head": 14306705, "mask_head": 2643280}
    for part, count in (counts | {"total": 44396336}).items():
        assert f"{count:,}" in table[part]


def test_commands_for_classifiers_say_so(predictor, tmp_path):
    spec = {"task": "detection", "model": predictor.model.spec()}
    checkpoints.write_weights(tmp_path / "run", spec, predictor.variables)
    with pytest.raises(UserError, match="is a detector, and this command is for classifiers"):
        export.main(["--checkpoint", str(tmp_path / "run"), "--format", "stablehlo", str(tmp_path / "file")])
