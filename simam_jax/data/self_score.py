"""COCO's scores of a ground truth against itself, which must be 1.0: what cannot be found is odd."""

import contextlib
import io
from typing import Any, cast

import numpy as np

from simam_jax import errors
from simam_jax.data import coco
from simam_jax.data.coco_index import Index

SHOWN = 5  # annotations that are not found


def score(index: Index) -> str:
    """Lines for people: AP of boxes and of masks, and which annotations cannot be found."""
    with errors.naming_extras():
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval

    lines, listed, masked = [], index.labels >= 0, np.diff(index.segmentation_ends) > 0
    for kind in ("bbox", "segm") if masked.any() else ("bbox",):
        which = listed & masked if kind == "segm" else listed
        numbers = index.annotation_ids[which]
        try:
            annotations = coco.annotations_of(index, masks=kind == "segm", which=which)
        except errors.UserError as error:
            lines.append(f"{'score':16} {kind}: {error}")
            continue
        with contextlib.redirect_stdout(io.StringIO()):
            truth: Any = COCO()
            truth.dataset = {
                "images": [
                    {"id": int(number), "height": int(height), "width": int(width)}
                    for number, (height, width) in zip(index.image_ids, index.sizes, strict=True)
                ],
                "categories": [{"id": int(number)} for number in index.category_ids],
                "annotations": [each | {"id": i} for i, each in enumerate(annotations, 1)],  # 0 would be none
            }
            truth.createIndex()
            kept = ("image_id", "category_id", "segmentation" if kind == "segm" else "bbox")
            results = [
                {name: each[name] for name in kept} | {"score": 1.0} for each in annotations if not each["iscrowd"]
            ]
            evaluation: Any = COCOeval(truth, truth.loadRes(results), cast(Any, kind)) if results else None
            if evaluation:
                evaluation.evaluate()
                evaluation.accumulate()
                evaluation.summarize()
        if evaluation is None:
            lines.append(f"{'score':16} {kind}: there is nothing to score")
            continue
        missed = [str(numbers[i - 1]) for i in _missed(evaluation)]
        text = f"{kind} AP {evaluation.stats[0]:.6f}"
        lines.append(f"{'score':16} {text}" + (f"; not found: annotation {', '.join(missed)}" if missed else ""))
        if left := int((listed & ~masked).sum()) if kind == "segm" else 0:
            lines.append(f"{'score':16} {kind}: {left} annotations without a mask are left out")
    return "\n".join(lines)


def _missed(evaluation: Any) -> list[int]:
    """The first annotations that no detection matches at the strictest threshold."""
    missed = [
        number
        for image in evaluation.evalImgs
        if image is not None and image["aRng"] == evaluation.params.areaRng[0]
        for number, match, ignored in zip(image["gtIds"], image["gtMatches"][-1], image["gtIgnore"], strict=True)
        if not match and not ignored
    ]
    return missed[:SHOWN]
