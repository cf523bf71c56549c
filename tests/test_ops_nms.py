"""Blocked suppression keeps exactly what the greedy loop keeps."""

from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest

from simam_jax.ops.nms import FORM, Form, nms

GOLDEN = Path(__file__).parent / "golden" / "detection"


@pytest.fixture(scope="module")
def unit():
    with np.load(GOLDEN / "unit.npz") as arrays:
        return dict(arrays)


def kept(boxes, scores, groups=None, valid=None, *, threshold=0.5, most=1000, form=FORM) -> np.ndarray:
    groups = np.zeros(len(boxes), np.int32) if groups is None else groups
    valid = np.ones(len(boxes), bool) if valid is None else valid
    indices, count = nms(boxes, scores, groups, valid, threshold=threshold, most=most, form=form)
    assert not np.asarray(indices)[int(count) :].any()
    return np.asarray(indices)[: int(count)]


def greedy(boxes, scores, groups, threshold) -> np.ndarray:
    """The definition: one box after the other, in float32."""
    moved = boxes + (groups.astype(np.float32) * (boxes.max(initial=0) + np.float32(1)))[:, None]
    x1, y1, x2, y2 = moved.T
    areas = (x2 - x1) * (y2 - y1)
    order = list(np.argsort(-scores, kind="stable"))
    result = []
    while order:
        best = order.pop(0)
        result.append(best)
        rest = np.array(order, int)
        w = np.maximum(np.minimum(x2[best], x2[rest]) - np.maximum(x1[best], x1[rest]), np.float32(0))
        h = np.maximum(np.minimum(y2[best], y2[rest]) - np.maximum(y1[best], y1[rest]), np.float32(0))
        with np.errstate(invalid="ignore"):
            overlap = w * h / (areas[best] + areas[rest] - w * h)
        order = [i for i, gone in zip(order, overlap > np.float32(threshold), strict=True) if not gone]
    return np.array(result, int)


def crowd(count: int, seed: int, spread: float = 60) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Boxes around a few objects, with many equal scores, some without an area."""
    rng = np.random.default_rng(seed)
    centres = rng.uniform(spread, 600, (12, 2))[rng.integers(0, 12, count)] + rng.normal(0, spread / 6, (count, 2))
    sides = rng.uniform(0.5, 1, (count, 2)) * spread * (rng.random((count, 1)) > 0.05)
    boxes = np.concatenate([centres - sides / 2, centres + sides / 2], axis=1).clip(0, 640).astype(np.float32)
    return boxes, rng.integers(0, 200, count).astype(np.float32) / 200, rng.integers(0, 5, count)


@pytest.mark.parametrize("threshold", [0.5, 0.7])
@pytest.mark.parametrize("name", ["", "rand_"])
def test_suppression_equals_the_reference_implementation(unit, name, threshold):
    boxes, scores, labels = (unit[f"nms/{name}{key}"] for key in ("boxes", "scores", "labels"))

    np.testing.assert_array_equal(kept(boxes, scores, threshold=threshold), unit[f"nms/{name}keep_{threshold}"])
    np.testing.assert_array_equal(
        kept(boxes, scores, labels, threshold=threshold), unit[f"nms/{name}batched_keep_{threshold}"]
    )


@pytest.mark.parametrize(
    ("count", "threshold", "form"),
    [
        (1, 0.5, FORM),
        (255, 0.3, FORM),
        (256, 0.5, FORM),
        (257, 0.7, FORM),
        (1500, 0.6, FORM),
        (1500, 0.6, Form(1024, 512)),
    ],
)
def test_any_number_of_boxes_is_cut_as_the_greedy_loop_cuts_it(count, threshold, form):
    boxes, scores, groups = crowd(count, seed=count)

    np.testing.assert_array_equal(
        kept(boxes, scores, groups, threshold=threshold, most=2000, form=form), greedy(boxes, scores, groups, threshold)
    )


def test_a_chain_in_which_every_box_depends_on_the_one_before():
    start = np.arange(700, dtype=np.float32)
    boxes = np.stack([start, start * 0, start + 3, start * 0 + 10], axis=1)  # neighbours overlap by 1/2, others by 1/5
    scores = -start

    result = kept(boxes, scores, threshold=0.4)

    np.testing.assert_array_equal(result, np.arange(0, 700, 2))


def test_it_stops_at_most_and_keeps_the_best():
    boxes, scores, groups = crowd(900, seed=3)

    np.testing.assert_array_equal(
        kept(boxes, scores, groups, most=37), greedy(boxes, scores, groups, threshold=0.5)[:37]
    )


def test_padding_is_never_kept_and_moves_no_group():
    boxes, scores, groups = crowd(300, seed=4)
    valid = np.random.default_rng(5).random(300) < 0.5
    padded = np.where(valid[:, None], boxes, np.float32(1e6))
    real = np.flatnonzero(valid)

    np.testing.assert_array_equal(
        kept(padded, np.where(valid, scores, 2), groups, valid),
        real[greedy(boxes[real], scores[real], groups[real], 0.5)],
    )


@pytest.mark.parametrize("count", [0, 7])
def test_no_candidates_give_no_boxes(count):
    boxes = np.zeros((count, 4), np.float32)

    assert len(kept(boxes, boxes[:, 0], valid=np.zeros(count, bool), most=5)) == 0


def test_images_side_by_side_do_not_touch():
    images = [crowd(600, seed=seed) for seed in (6, 7, 8)]
    boxes, scores, groups = (np.stack(arrays) for arrays in zip(*images, strict=True))
    valid = np.ones(scores.shape, bool)

    indices, counts = jax.vmap(partial(nms, threshold=0.5, most=400))(boxes, scores, groups, valid)

    for image, row, count in zip(images, np.asarray(indices), np.asarray(counts), strict=True):
        np.testing.assert_array_equal(row[:count], greedy(*image, 0.5)[:400])
