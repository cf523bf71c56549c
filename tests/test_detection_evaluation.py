"""COCO's scores: those of pycocotools run by hand on the files that are written, on all images that were evaluated."""

import contextlib
import io
import json
import math
from pathlib import Path

import numpy as np
import pytest
from ml_collections import ConfigDict
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from simam_jax.data.coco import open_coco
from simam_jax.detection.evaluation import NAMES, CocoEvaluator, Truth, describe_scores, encode, evaluate

COCO_OPEN = Path(__file__).parents[2] / "shared" / "data" / "coco_open"
SIZE = 64, 96


def truth_of(objects, num_images, masks):
    """Ground truth from (image, label, box x y w h, crowd)."""
    annotations = []
    for image, label, box, crowd in objects:
        x, y, w, h = box
        of = {"image_id": 10 * image, "category_id": 3 + label, "bbox": box, "area": w * h, "iscrowd": crowd}
        if masks:
            mask = np.zeros((1, *SIZE), bool)
            mask[0, int(y) : int(y + h), int(x) : int(x + w)] = True
            of |= {"segmentation": encode(mask)[0]}
        annotations.append(of)
    ids = 10 * np.arange(num_images)
    return Truth(ids, np.full((num_images, 2), SIZE), np.array([3, 4, 5]), ("a", "b", "c"), annotations)


def made_up(rng, num_images):
    """Random objects and detections near them: with ties, crowds, empty images, and a class that is nowhere."""
    objects, detections = [], []
    for image in range(num_images):
        for _ in range(rng.integers(0, 4)):
            x, y, w, h = *rng.integers(0, 40, 2), *rng.integers(5, 24, 2)
            objects.append((image, int(rng.integers(2)), [float(v) for v in (x, y, w, h)], int(rng.uniform() < 0.2)))
            for _ in range(rng.integers(0, 3)):
                dx = rng.integers(-3, 4, 4)
                box = np.array([x, y, x + w, y + h], np.float32) + dx
                detections.append((image, int(rng.integers(2)), box, np.float32(rng.integers(1, 6) / 5)))
    return objects, detections


def fill(evaluator, detections, num_images, masks):
    for image in range(num_images):
        own = [d for d in detections if d[0] == image]
        boxes = np.array([d[2] for d in own], np.float32).reshape(-1, 4)
        drawn = np.zeros((len(own), *SIZE), bool)
        for mask, (x1, y1, x2, y2) in zip(drawn, boxes.astype(int).clip(0), strict=True):
            mask[y1:y2, x1:x2] = True
        labels, scores = np.array([d[1] for d in own], np.int32), np.array([d[3] for d in own], np.float32)
        evaluator.add_image(image, boxes, scores, labels, encode(drawn) if masks else None)


def by_hand(truth, results_file, kind, folder):
    """The scores as anybody would compute them from the files."""
    annotations = [{**a, "id": i} for i, a in enumerate(truth.annotations, 1)]
    for a in annotations:
        if "segmentation" in a:
            a["segmentation"] = {**a["segmentation"], "counts": a["segmentation"]["counts"].decode()}
    dataset = {
        "images": [{"id": int(i), "height": SIZE[0], "width": SIZE[1]} for i in truth.image_ids],
        "categories": [{"id": int(i), "name": n} for i, n in zip(truth.category_ids, truth.class_names, strict=True)],
        "annotations": annotations,
    }
    (folder / "truth.json").write_text(json.dumps(dataset))
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(folder / "truth.json")
        scored = COCOeval(coco, coco.loadRes(str(results_file)), kind)
        scored.evaluate()
        scored.accumulate()
        scored.summarize()
    return scored.stats


@pytest.mark.parametrize("masks", [False, True])
def test_the_scores_are_those_of_the_files_that_are_written(masks, tmp_path):
    objects, detections = made_up(np.random.default_rng(3), 30)
    truth = truth_of(objects, 30, masks)
    evaluator = CocoEvaluator(truth, masks=masks)
    fill(evaluator, detections, 30, masks)
    scores = evaluator.scores()
    evaluator.write(tmp_path)
    kinds = ("bbox", "segm")[: 1 + masks]
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted(
        f"{name}_{kind}.json" for kind in kinds for name in ("results", "per_class")
    )
    for kind in kinds:
        wanted = by_hand(truth, tmp_path / f"results_{kind}.json", kind, tmp_path)
        got = [scores[f"{kind}_{name}"] for name in NAMES]
        np.testing.assert_allclose(got, np.where(wanted < 0, np.nan, wanted), rtol=0, atol=1e-12)
        assert 0 < got[0] < 1


@pytest.mark.parametrize("masks", [False, True])
def test_the_ground_truth_scores_one(masks):
    objects, _ = made_up(np.random.default_rng(4), 20)
    objects = [(image, label, box, 0) for image, label, box, _ in objects]
    found = [(i, label, np.array([x, y, x + w, y + h], np.float32), 1.0) for i, label, (x, y, w, h), _ in objects]
    evaluator = CocoEvaluator(truth_of(objects, 20, masks), masks=masks)
    fill(evaluator, found, 20, masks)
    scores = evaluator.scores()
    assert scores["bbox_AP"] == pytest.approx(1.0, abs=1e-12)
    assert scores.get("segm_AP", 1.0) == pytest.approx(1.0, abs=1e-12)


def test_an_image_without_detections_counts():
    objects = [(0, 0, [1.0, 1.0, 20.0, 20.0], 0), (1, 0, [1.0, 1.0, 20.0, 20.0], 0)]
    evaluator = CocoEvaluator(truth_of(objects, 2, False), masks=False)
    fill(evaluator, [(0, 0, np.array([1, 1, 21, 21], np.float32), 0.9)], 2, False)
    assert evaluator.scores()["bbox_AR100"] == pytest.approx(0.5)


def test_no_detections_score_zero_and_no_ground_truth_scores_nothing():
    objects, _ = made_up(np.random.default_rng(5), 8)
    scores = CocoEvaluator(truth_of(objects, 8, True), masks=True).scores()
    assert scores["bbox_AP"] == scores["segm_AP"] == 0
    assert math.isnan(scores["bbox_AP_large"])  # no object is that large
    nothing = CocoEvaluator(truth_of([], 3, False), masks=False).scores()
    assert math.isnan(nothing["bbox_AP"])
    assert describe_scores(nothing).startswith("box AP n/a: no ground truth")


def test_each_class_has_an_ap_of_its_own():
    objects = [(0, 0, [1.0, 1.0, 20.0, 20.0], 0), (0, 1, [30.0, 1.0, 20.0, 20.0], 0)]
    truth = truth_of(objects, 1, False)
    evaluator = CocoEvaluator(truth, masks=False)
    fill(evaluator, [(0, 0, np.array([1, 1, 21, 21], np.float32), 0.9)], 1, False)
    first, second, third = evaluate(truth, evaluator.results("bbox"), "bbox").per_class()
    assert (first, second) == (pytest.approx(1.0), 0)
    assert math.isnan(third)


def test_an_image_that_comes_twice_is_a_fault():
    evaluator = CocoEvaluator(truth_of([], 1, False), masks=False)
    none = {"boxes": np.zeros((1, 5, 4)), "scores": np.zeros((1, 5)), "labels": np.zeros((1, 5)), "count": np.zeros(1)}
    evaluator.add(none | {"index": np.zeros(1, int)})
    with pytest.raises(ValueError, match="twice"):
        evaluator.add(none | {"index": np.zeros(1, int)})


@pytest.mark.skipif(not COCO_OPEN.is_dir(), reason="needs the shared data")
@pytest.mark.parametrize("split", ["train2017", "val2017"])
def test_real_annotations_score_one_against_themselves(split):
    fields = {f"eval_{name}": "" for name in ("annotations", "images")}
    examples = open_coco(ConfigDict({"data_dir": str(COCO_OPEN), "eval_split": split, **fields}), "eval", masks=True)
    names = ("image_ids", "sizes", "category_ids", "class_names")
    truth = Truth(**{name: getattr(examples, name) for name in names}, annotations=examples.annotations())
    evaluator = CocoEvaluator(truth, masks=True)
    crowds = {(a["image_id"], tuple(a["bbox"])) for a in truth.annotations if a["iscrowd"]}
    for index in range(len(examples)):
        example, image = examples.read(index), int(examples.image_ids[index])
        kept = [
            i for i, (x1, y1, x2, y2) in enumerate(example.boxes.astype(float).tolist())
            if not any(image == c and np.allclose(b, (x1, y1, x2 - x1, y2 - y1), atol=1e-3) for c, b in crowds)
        ]  # fmt: skip
        masks = encode(example.masks()[kept])
        evaluator.add_image(index, example.boxes[kept], np.ones(len(kept)), example.labels[kept], masks)
    scores = evaluator.scores()
    assert scores["bbox_AP"] == pytest.approx(1.0, abs=1e-12)
    assert scores["segm_AP"] == pytest.approx(1.0, abs=1e-12)
