"""COCO's scores of a pass over an evaluation set, by pycocotools itself."""

import contextlib
import io
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np

from simam_jax.detection.masks import Masks
from simam_jax.errors import naming_extras
from simam_jax.task import Scores

KINDS = ("bbox", "segm")
# What COCOeval.summarize computes, in its order.
NAMES = ("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large")
NAMES += ("AR1", "AR10", "AR100", "AR_small", "AR_medium", "AR_large")

Rle = dict[str, Any]  # pycocotools' compressed form: "size" (H, W) and "counts", bytes


@dataclass(frozen=True)
class Truth:
    """The ground truth that detections are scored against.

    Attributes:
        image_ids: of the images that are evaluated, whether they have objects or not; in the order of the evaluation set.
        sizes: (n, 2) int32, height and width of each image.
        category_ids, class_names: of the labels.
        annotations: in COCO's form, with `bbox`, `area`, `iscrowd` and, for masks, `segmentation`.
    """

    image_ids: np.ndarray
    sizes: np.ndarray
    category_ids: np.ndarray
    class_names: Sequence[str]
    annotations: list[dict[str, Any]]


def truth_of(source: Any, annotations: list[dict[str, Any]]) -> Truth:
    """The ground truth of `Examples`, or of an `Index`, with its annotations in COCO's form."""
    return Truth(source.image_ids, source.sizes, source.category_ids, source.class_names, annotations)


class CocoEvaluator:
    """An `Evaluator` of boxes and masks. Masks are kept as run lengths: memory stays bounded."""

    def __init__(self, truth: Truth, *, masks: bool):
        self._truth, self._kinds = truth, KINDS if masks else KINDS[:1]
        self._results: list[dict[str, Any]] = []
        self._seen: set[int] = set()
        self._evaluated: dict[str, Evaluated] = {}  # by kind; until more detections come

    def add(self, outputs: Mapping[str, np.ndarray]) -> None:
        """Takes what `detection.task.measure` gave: the padded detections of some images with their `index` in the set."""
        for row, index in enumerate(outputs["index"].tolist()):
            if index in self._seen:
                raise ValueError(f"image {index} was evaluated twice")
            self._seen.add(index)
            count = int(outputs["count"][row])
            boxes, scores, labels = (outputs[name][row][:count] for name in ("boxes", "scores", "labels"))
            masks = None
            if "segm" in self._kinds:
                size = tuple(outputs["original_size"][row].tolist())
                masks = encode(Masks(outputs["masks"][row][:count], boxes, size))
            self.add_image(index, boxes, scores, labels, masks)

    def add_image(
        self, index: int, boxes: np.ndarray, scores: np.ndarray, labels: np.ndarray, masks: Sequence[Rle] | None = None
    ) -> None:
        """Takes the detections of one image: boxes x1 y1 x2 y2 in its pixels, labels in 0..classes - 1."""
        self._evaluated = {}
        sides = np.concatenate((boxes[:, :2], boxes[:, 2:] - boxes[:, :2]), axis=1).astype(np.float64)
        for i, (box, score, label) in enumerate(zip(sides.tolist(), scores.tolist(), labels.tolist(), strict=True)):
            result = {
                "image_id": int(self._truth.image_ids[index]),
                "category_id": int(self._truth.category_ids[label]),
                "bbox": box,
                "score": score,
            }
            self._results.append(result | ({"segmentation": masks[i]} if masks is not None else {}))

    def scores(self) -> Scores:
        """`bbox_AP` and so on, in 0..1; not a number where there is no ground truth to score."""
        return {
            f"{kind}_{name}": value
            for kind in self._kinds
            for name, value in zip(NAMES, self._of_kind(kind).stats, strict=True)
        }

    def _of_kind(self, kind: str) -> "Evaluated":
        if kind not in self._evaluated:
            self._evaluated[kind] = evaluate(self._truth, self._results, kind)
        return self._evaluated[kind]

    def results(self, kind: str) -> list[dict[str, Any]]:
        """The detections in COCO's results form, of boxes ("bbox") or of masks ("segm"), as JSON."""
        return [_as_json(result, kind) for result in self._results]

    def write(self, folder: Path) -> None:
        """Writes `results_bbox.json`, and `results_segm.json` of masks, in COCO's results form; and each class's AP."""
        folder.mkdir(parents=True, exist_ok=True)
        for kind in self._kinds:
            _write_json(folder / f"results_{kind}.json", self.results(kind))
            each = self._of_kind(kind).per_class()
            aps = {name: None if math.isnan(ap) else ap for name, ap in zip(self._truth.class_names, each, strict=True)}
            _write_json(folder / f"per_class_{kind}.json", aps)


@dataclass(frozen=True)
class Evaluated:
    """What COCO's evaluation gives.

    Attributes:
        stats: `NAMES`, not a number where there is nothing to score.
        precision: (IoU thresholds, recalls, classes, areas, most detections), as in COCOeval; -1 where there is nothing.
    """

    stats: list[float]
    precision: np.ndarray

    def per_class(self) -> list[float]:
        """AP of each class."""
        return [_mean(self.precision[:, :, k, 0, -1]) for k in range(self.precision.shape[2])]


def evaluate(truth: Truth, results: Iterable[Mapping[str, Any]], kind: str) -> Evaluated:
    """COCO's evaluation of results against the ground truth, on all its images, by boxes ("bbox") or masks ("segm").

    Args:
        truth: what is right.
        results: in COCO's results form.
        kind: one of `KINDS`.
    """
    with naming_extras():
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints as it goes
        right: Any = COCO()
        found: Any = COCO()
        images = [
            {"id": int(image), "height": int(height), "width": int(width)}
            for image, (height, width) in zip(truth.image_ids, truth.sizes, strict=True)
        ]
        categories = [
            {"id": int(category), "name": name}
            for category, name in zip(truth.category_ids, truth.class_names, strict=True)
        ]
        annotations = [{**annotation, "id": i} for i, annotation in enumerate(truth.annotations, 1)]
        right.dataset = {"images": images, "categories": categories, "annotations": annotations}
        right.createIndex()
        other = "segmentation" if kind == "bbox" else "bbox"
        results = [{name: x for name, x in result.items() if name != other} for result in results]
        if results:
            found = right.loadRes(results)
        else:  # which pycocotools cannot read
            found.dataset = {"images": images, "categories": categories, "annotations": []}
            found.createIndex()
        evaluation = COCOeval(right, found, cast(Any, kind))
        evaluation.params.imgIds = [image["id"] for image in images]
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    stats = [math.nan if value < 0 else float(value) for value in evaluation.stats]
    return Evaluated(stats, evaluation.eval["precision"])


def describe_scores(scores: Scores) -> str:
    """COCO's scores as a reader wants them."""
    parts = []
    for kind, title in zip(KINDS, ("box", "mask"), strict=True):
        if f"{kind}_AP" in scores:
            ap, ap50, ap75 = (_percent(scores[f"{kind}_{name}"]) for name in NAMES[:3])
            parts.append(f"{title} AP {ap} (AP50 {ap50}, AP75 {ap75})")
    return ", ".join(parts)


def encode(masks: Iterable[np.ndarray]) -> list[Rle]:
    """Masks (H, W) bool as compressed run lengths."""
    with naming_extras():
        from pycocotools import mask

    bits = (np.asfortranarray(each, dtype=bool).view(np.uint8) for each in masks)
    return [cast(Any, mask.encode(each)) for each in bits]


def _write_json(path: Path, content: Any) -> None:
    """Writes the whole file, or leaves the one that is there."""
    partial = path.with_name(path.name + ".part")
    partial.write_text(json.dumps(content))
    partial.replace(path)


def _as_json(result: Mapping[str, Any], kind: str) -> dict[str, Any]:
    kept = {name: x for name, x in result.items() if name not in ("bbox", "segmentation")}
    if kind == "bbox":
        return kept | {"bbox": result["bbox"]}
    rle = result["segmentation"]
    return kept | {"segmentation": {"size": list(rle["size"]), "counts": rle["counts"].decode()}}


def _mean(values: np.ndarray) -> float:
    real = values[values > -1]
    return float(real.mean()) if real.size else math.nan


def _percent(value: float) -> str:
    return "n/a: no ground truth" if math.isnan(value) else f"{100 * value:.2f}"
