"""A detector as one looks at images with it: `Predictor`, its preprocessing, its results, `predict`."""

import dataclasses
import json
import tracemalloc
from pathlib import Path

import golden_detectors
import jax
import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask
from sklearn.datasets import load_sample_images

from simam_jax import (
    DetectionPreprocessing,
    Predictor,
    UserError,
    checkpoints,
    create_model,
    predict,
    summary,
    visualize,
    weights,
)
from simam_jax.convert import write_state
from simam_jax.detection.apply import compiler_options
from simam_jax.detection.detections import Detections
from simam_jax.detection.masks import Masks
from simam_jax.models import init_variables
from simam_jax.ops.bilinear import resize_bilinear
from simam_jax.rcnn.masks import paste
from simam_jax.torch_weights.names import to_torch

pytestmark = pytest.mark.usefixtures("quickly_compiled")

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


def test_this_xla_has_the_order_that_needs_the_least_memory():
    assert compiler_options() or jax.default_backend() != "cpu"


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
    assert picture.shape == (320, 480, 3)  # eight times as large, or it could not be read
    assert picture[8 * 15, 8 * 20].any()  # within the mask
    assert not picture[8 * 35, 8 * 50].any()  # in the mask of the one whose score is too low to be shown


def test_objects_are_chosen_by_score_and_class():
    boxes = np.array([[10, 10, 30, 20], [0, 0, 5, 5], [1, 1, 9, 9]], np.float32)
    scores, labels = np.array([0.9, 0.3, 0.2], np.float32), np.array([1, 0, 1], np.int32)
    found = Detections(boxes, scores, labels, np.arange(3)[:, None, None] == np.ones((4, 4)), ("cat", "dog"))
    few = found.chosen(0.25, ["dog"])
    assert few.rows() == found.rows()[:1]
    assert found.chosen(classes=["dog", "cat"]).rows() == found.chosen().rows() == found.rows()
    assert len(found.chosen(0.95)) == len(found.chosen(0.95).chosen(0.5)) == 0
    with pytest.raises(UserError, match=r"Unknown class 'dag'\. Did you mean 'dog'"):
        found.chosen(classes=["dag"])


def test_masks_are_pasted_one_at_a_time_as_they_are_together():
    rng = np.random.default_rng(0)
    probabilities = rng.random((7, 28, 28), np.float32)
    corners = np.sort(rng.uniform(-20, 700, (7, 2, 2)), axis=1)
    corners[:, 1] = corners[:, 0] + (corners[:, 1] - corners[:, 0]) * np.linspace(0, 1, 7)[:, None]
    boxes = corners.reshape(7, 4).astype(np.float32)  # for windows of 128 and 512 pixels, and the whole image
    masks = Masks(probabilities, boxes, (700, 813))
    together = np.unpackbits(np.asarray(paste(probabilities, boxes, size=(768, 1024))), axis=-1)[:, :700, :813]
    array = np.asarray(masks)
    assert array.dtype == bool
    np.testing.assert_array_equal(array, together)
    assert array.any((1, 2)).all()
    np.testing.assert_array_equal(masks[2], array[2])
    np.testing.assert_array_equal(masks[np.arange(7) > 2][1:][-1], array[-1])
    assert [len(masks), len(masks[:0]), np.asarray(masks[:0]).shape] == [7, 0, (0, 700, 813)]


def test_objects_are_told_and_drawn_without_all_their_masks_in_memory():
    boxes = np.tile(np.array([[100, 100, 700, 500]], np.float32), (100, 1))
    masks = Masks(np.ones((100, 28, 28), np.float32), boxes, (600, 800))
    found = Detections(boxes, np.linspace(0, 1, 100, dtype=np.float32), np.zeros(100, np.int32), masks, ("a",))
    pixels = np.zeros((600, 800, 3), np.uint8)

    def show(found):
        assert len(found.rows()) == len(found.results(1, [1])) == len(found)
        found.draw(pixels, threshold=0)

    show(found.chosen(1.0))  # what is imported and compiled is none of it
    tracemalloc.start()
    try:
        show(found)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 15e6  # together they are 48 MB


def test_results_are_in_coco_s_form():
    mask = np.zeros((1, 40, 60), bool)
    mask[0, 10:20, 10:30] = True
    found = Detections(np.array([[10, 10, 30, 20]], "f4"), np.array([0.5], "f4"), np.array([1], "i4"), mask, ("a", "b"))
    (row,) = found.results("x.png", [7, 9])
    rle = row.pop("segmentation")
    np.testing.assert_array_equal(coco_mask.decode(rle), mask[0])
    assert row == {"image_id": "x.png", "category_id": 9, "category_name": "b", "bbox": [10, 10, 20, 10], "score": 0.5}
    assert "segmentation" not in dataclasses.replace(found, segmentation=None).results(5, [7, 9])[0]


@pytest.mark.parametrize(("stored", "ids"), [
    ({"category_ids": [4, 9, 2], "class_names": ["x", "y", "z"]}, (4, 9, 2)), ({}, (0, 1, 2))
])  # fmt: skip
def test_category_ids_come_from_the_weights(predictor, tmp_path, stored, ids):
    spec = {"task": "detection", "model": predictor.model.spec(), "preprocessing": dataclasses.asdict(SMALL)}
    checkpoints.write_weights(tmp_path / "run", spec | stored, predictor.variables)
    assert Predictor.load(tmp_path / "run").category_ids == ids


def test_the_80_classes_of_coco_have_its_numbers():
    names = (Path(predict.__file__).parent / "coco_classes.txt").read_text().splitlines()
    ids = weights.category_ids_of(weights.Weights(None, None, {}), names)
    numbers = dict(zip(names, ids, strict=True))
    assert (len(ids), ids[0], ids[-1]) == (80, 1, 90)
    assert (numbers["stop sign"], numbers["bench"], numbers["bed"], numbers["book"]) == (13, 15, 65, 84)
    assert weights.category_ids_of(weights.Weights(None, None, {}), names[:-1]) is None


def test_predict_prints_objects(predictor, tmp_path, capsys):
    spec = {"task": "detection", "model": predictor.model.spec(), "preprocessing": dataclasses.asdict(SMALL)}
    checkpoints.write_weights(tmp_path / "run", spec, predictor.variables)
    Image.fromarray(TEMPLE).save(tmp_path / "temple.png")
    assert predict.main(["--checkpoint", str(tmp_path / "run"), str(tmp_path / "temple.png"), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    (expected,) = predictor(TEMPLE)
    expected = expected.results("temple.png", (0, 1, 2))
    assert [row["category_id"] for row in rows] == [row["category_id"] for row in expected]
    np.testing.assert_array_equal([row["bbox"] for row in rows], [row["bbox"] for row in expected])
    assert {row["file_name"] for row in rows} == {str(tmp_path / "temple.png")}


@pytest.fixture
def look(predictor, monkeypatch):
    """`predict` with the detector that is there already."""
    monkeypatch.setattr(predict, "load_predictor", lambda *_, **__: predictor)
    return lambda *arguments: predict.main(["--checkpoint", "a detector", *map(str, arguments)])


@pytest.fixture
def folder(tmp_path):
    """Two photographs, one of them in a folder of its own, and what is no image."""
    (tmp_path / "photos" / "more").mkdir(parents=True)
    Image.fromarray(TEMPLE).save(tmp_path / "photos" / "temple.jpg")
    Image.fromarray(FLOWER[:100, :100]).save(tmp_path / "photos" / "more" / "000000000007.gif")
    (tmp_path / "photos" / "broken.png").write_text("no image")
    return tmp_path / "photos"


def test_predict_draws_tells_and_skips(look, folder, predictor, capsys):
    out = folder / "out"
    assert look(folder, "--output", out, "--score", "0.5") == 1
    printed = capsys.readouterr()
    assert "broken.png cannot be read" in printed.err
    assert "3 images in " in printed.err
    assert {str(path.relative_to(out)) for path in out.rglob("*.*")} == {"temple.jpg", "000000000007.gif.png"}
    (expected,) = predictor(folder / "temple.jpg")
    lines = expected.chosen(0.5).lines() or ["nothing found"]
    assert [f"  {line}" for line in lines] == printed.out.partition("temple.jpg\n")[2].splitlines()[: len(lines)]
    with Image.open(out / "temple.jpg") as picture:
        assert picture.size == expected.draw(TEMPLE).size
    assert look(folder, "--output", out) == 1  # its own pictures are no images to look at
    assert "3 images in " in capsys.readouterr().err


def test_predict_lists_chosen_classes_in_coco_s_form(look, folder, capsys):
    assert look(folder / "*.jpg", folder / "**" / "*.gif", "--json") == 0
    everything = json.loads(capsys.readouterr().out)
    assert {row["image_id"] for row in everything} == {"temple.jpg", 7}
    assert look(folder / "temple.jpg", folder / "more", "--json", "--classes", "dog,bird", "--score", "0.1") == 0
    some = json.loads(capsys.readouterr().out)
    assert some == [row for row in everything if row["category_name"] != "cat" and row["score"] >= 0.1]


def test_predict_says_that_nothing_is_found(look, folder, predictor, monkeypatch, capsys):
    (found,) = predictor(TEMPLE)
    nothing = dataclasses.replace(
        found, **{name: getattr(found, name)[:0] for name in ("boxes", "scores", "labels", "segmentation")}
    )
    monkeypatch.setattr(type(predictor), "stream", lambda _, paths: ((path, nothing) for path in paths))
    path = folder / "more" / "000000000007.gif"
    assert look(path, "--json") == 0
    assert json.loads(capsys.readouterr().out) == []
    assert look(path, "--output", folder / "out") == 0
    printed = capsys.readouterr()
    assert printed.out == f"    score    class  x1 y1 x2 y2\n{path}\n  nothing found\n"
    assert f"drawn in {folder / 'out'}: 1\n" in printed.err
    with Image.open(folder / "out" / "000000000007.gif.png") as picture:
        assert picture.size == (480, 480)


def test_wrong_wishes_are_errors(look, folder, capsys):
    for wishes, message in (
        (["--classes", "dog,brd"], "Unknown class 'brd'. Did you mean 'bird'"),
        (["--score", "30"], r"--score must be in 0\.\.1, got 30"),
        (["--top", "3"], "--top is for classifiers"),
        (["--output", folder], "would write over the image .*broken.png"),
        (["--output", folder / "broken.png"], "broken.png is a file: name a folder"),
        ([folder / "*.bmp"], "no file or folder that the pattern .*bmp names"),
    ):
        with pytest.raises(UserError, match=message):
            look(folder, *wishes)
    assert capsys.readouterr().out == ""


def test_objects_are_not_asked_of_a_classifier(workdir, photographs, tmp_path):
    for wish in (["--output", str(tmp_path)], ["--score", "0.5"], ["--classes", "cat"]):
        with pytest.raises(UserError, match=f"{wish[0]} is for detectors"):
            predict.main(["--checkpoint", str(workdir), photographs[0], *wish])


def test_the_summary_has_the_reference_implementations_counts(capsys):
    summary.main(["--model", "mask_rcnn_resnet50_fpn"])
    table = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if line}
    counts = {"backbone": 23508032, "neck": 3344384, "rpn_head": 593935, "bbox_head": 14306705, "mask_head": 2643280}
    for part, count in (counts | {"total": 44396336}).items():
        assert f"{count:,}" in table[part]


def test_commands_for_classifiers_say_so(predictor, photographs, tmp_path):
    spec = {"task": "detection", "model": predictor.model.spec()}
    checkpoints.write_weights(tmp_path / "run", spec, predictor.variables)
    wish = ["grad-cam", "--checkpoint", str(tmp_path / "run"), photographs[0], "--output", str(tmp_path / "cam.png")]
    with pytest.raises(UserError, match="is a detector, and this command is for classifiers"):
        visualize.main(wish)
