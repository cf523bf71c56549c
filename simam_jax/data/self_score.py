"""The scores of a ground truth against itself: below 1.0 something in it can never be found."""

import contextlib
import io
from typing import Any

import numpy as np

from simam_jax import errors
from simam_jax.data import coco
from simam_jax.data.coco_index import Index

SHOWN = 5  # annotations, by number


def score(index: Index) -> str:
    """COCO's scores of the ground truth against itself, and which annotations cannot be found."""
    with errors.naming_extras():
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval

    lines = []
    kinds: list[Any] = ["bbox", *(["segm"] if np.diff(index.segmentation_ends).any() else [])]
    numbers = index.annotation_ids[index.labels >= 0].tolist()
    for kind in kinds:
        with contextlib.redirect_stdout(io.StringIO()):
            truth: Any = COCO()
            truth.dataset = {
                "images": [
                    {"id": number, "height": height, "width": width}
                    for number, (height, width) in zip(index.image_ids.tolist(), index.sizes.tolist(), strict=True)
                ],
                "categories": [{"id": number} for number in index.category_ids.tolist()],
                "annotations": [
                    {"id": number} | annotation
                    for number, annotation in zip(
                        numbers, coco.annotations_of(index, masks=kind == "segm"), strict=True
                    )
                ],
            }
            truth.createIndex()
            results = [
                {"image_id": each["image_id"], "category_id": each["category_id"], "score": 1.0}
                | ({"bbox": each["bbox"]} if kind == "bbox" else {"segmentation": truth.annToRLE(each)})
                for each in truth.dataset["annotations"]
                if not each["iscrowd"] and (kind == "bbox" or each["segmentation"])
            ]
            evaluation: Any = COCOeval(truth, truth.loadRes(results), kind) if results else None
            if evaluation:
                evaluation.evaluate()
                evaluation.accumulate()
                evaluation.summarize()
        if evaluation is None:
            lines.append(f"{'score':16} {kind}: there is nothing to score")
            continue
        missed = _missed(evaluation)
        text = f"{kind} AP {evaluation.stats[0]:.6f}"
        lines.append(f"{'score':16} {text}" + (f"; not found: annotation {', '.join(missed)}" if missed else ""))
    return "\n".join(lines)


def _missed(evaluation: Any) -> list[str]:
    """The first annotations that no detection matches at the strictest threshold."""
    missed = [
        str(number)
        for image in evaluation.evalImgs
        if image is not None and image["aRng"] == evaluation.params.areaRng[0]
        for number, match, ignored in zip(image["gtIds"], image["gtMatches"][-1], image["gtIgnore"], strict=True)
        if not match and not ignored
    ]
    return missed[:SHOWN]
