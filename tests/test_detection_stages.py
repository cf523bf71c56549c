"""Every stage of detection, from the stored input of the reference implementation to its stored output.

tests/golden/detection/README.md says where the numbers come from.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from simam_jax.ops.roi_align import roi_align
from simam_jax.rcnn import anchors, masks
from simam_jax.rcnn.assign import assign
from simam_jax.rcnn.levels import level_of
from simam_jax.rcnn.losses import box_losses, mask_losses, matched_deltas, roi_labels, rpn_losses
from simam_jax.rcnn.proposals import BOX_STDS, RPN_STDS, detect, propose
from simam_jax.rcnn.sample import Sample, with_targets

GOLDEN = Path(__file__).parent / "golden" / "detection"
DETECTORS = pytest.mark.parametrize("name", ["fr_r50", "mr_r50"])
IMAGES = pytest.mark.parametrize(("name", "image"), [("fr_r50", 0), ("mr_r50", 0), ("mr_r50", 1)])
NUM_CLASSES = 80
TARGETS = 7  # room for ground truth, of which the images have fewer


@pytest.fixture(scope="module")
def stages():
    with np.load(GOLDEN / "stages.npz") as arrays:
        arrays = dict(arrays)

    def of(name: str, part: str) -> dict[str, np.ndarray]:
        prefix = f"{name}/{part}/"
        return {key.removeprefix(prefix): value for key, value in arrays.items() if key.startswith(prefix)}

    return of


def by_level(array: np.ndarray, map_sizes: np.ndarray) -> list[np.ndarray]:
    return np.split(array, np.cumsum(3 * map_sizes.prod(1))[:-1])


def padded(array: np.ndarray, rows: int = TARGETS) -> np.ndarray:
    """Zeros up to so many rows: what comes after the real ones must not matter."""
    return np.pad(array, [(0, rows - len(array))] + [(0, 0)] * (array.ndim - 1))


def rpn_outputs(of: dict[str, np.ndarray]) -> tuple:
    sizes = of["map_sizes"]
    flags = anchors.valid_anchors(sizes, sizes[0] * 4)
    return by_level(of["rpn_logits"], sizes), by_level(of["rpn_deltas"], sizes), anchors.all_anchors(sizes), flags


# Inference


@DETECTORS
def test_proposals(stages, name):
    of = stages(name, "infer")

    found = propose(*rpn_outputs(of), of["image_size"], before_nms=1000)

    assert found.count == 1000
    np.testing.assert_allclose(found.boxes, of["proposals"][:, :4], atol=2e-4)
    np.testing.assert_allclose(found.scores, of["proposals"][:, 4], atol=1e-6)


@DETECTORS
def test_proposals_without_an_area_are_dropped_where_later_versions_drop_them(stages, name):
    of = stages(name, "infer")

    found = propose(*rpn_outputs(of), of["image_size"], before_nms=1000, min_bbox_size=0)

    assert found.count == len(of["proposals_newer"])
    np.testing.assert_allclose(found.boxes[: found.count], of["proposals_newer"][:, :4], atol=2e-4)


def test_proposals_of_a_map_padded_further_are_the_same(stages):
    of = stages("fr_r50", "infer")
    logits, deltas, _, _ = rpn_outputs(of)
    sizes = of["map_sizes"] + np.array([[16, 8], [8, 4], [4, 2], [2, 1], [1, 1]])

    def padded_map(level: np.ndarray, own: np.ndarray, size: np.ndarray) -> np.ndarray:
        level = level.reshape(*own, 3, -1)
        level = np.pad(level, [(0, size[0] - own[0]), (0, size[1] - own[1]), (0, 0), (0, 0)], constant_values=9)
        return level.reshape(-1, level.shape[-1])

    logits, deltas = (
        [padded_map(*level) for level in zip(maps, of["map_sizes"], sizes, strict=True)] for maps in (logits, deltas)
    )
    flags = anchors.valid_anchors(sizes, of["map_sizes"][0] * 4)
    args = [level[:, 0] for level in logits], deltas, anchors.all_anchors(sizes), flags, of["image_size"]

    found = propose(*args, before_nms=1000)

    np.testing.assert_allclose(found.boxes, of["proposals"][:, :4], atol=2e-4)


@DETECTORS
def test_levels_of_rois(stages, name):
    of = stages(name, "infer")

    np.testing.assert_array_equal(level_of(of["proposals"][:, :4]), of["roi_level"])
    if name == "mr_r50":
        np.testing.assert_array_equal(level_of(of["mask_rois"][:, 1:]), of["mask_level"])


def test_features_of_rois(stages):
    of = stages("fr_r50", "infer")
    chosen = of["roi_sample_idx"]
    maps = [of[f"P{level}"].transpose(0, 2, 3, 1) for level in range(2, 6)]
    rois, levels = of["proposals"][None, chosen, :4], of["roi_level"][None, chosen]

    features = roi_align(maps, of["map_sizes"][:1] * 4, rois, levels, np.ones(levels.shape, bool), size=7)

    expected = of["roi_sample_feat"].transpose(0, 2, 3, 1)
    np.testing.assert_allclose(features[0], expected, atol=1e-6 * np.abs(expected).max())


@pytest.mark.parametrize("rescaled", ["", "_rescaled"])
def test_final_detections(stages, rescaled):
    of = stages("fr_r50", "infer")
    scale = of["scale"] if rescaled else np.ones(4, np.float32)

    found = detect(of["cls_score"], of["bbox_pred"], of["proposals"][:, :4], 1000, of["image_size"], scale)

    expected, labels = of[f"det{rescaled}"], of[f"det_label{rescaled}"]
    assert found.count == len(expected) == 71
    np.testing.assert_array_equal(found.labels[:71], labels)
    np.testing.assert_allclose(found.boxes[:71], expected[:, :4], atol=5e-4)
    np.testing.assert_allclose(found.scores[:71], expected[:, 4], atol=1e-6)
    assert not found.boxes[71:].any()


def test_pasted_masks(stages):
    of = stages("mr_r50", "infer")
    height, width = (int(n) for n in of["original_size"])
    boxes = of["mask_rois"][:, 1:] / of["scale"]
    probabilities = jax.nn.sigmoid(of["mask_logits_of_label"])

    packed = masks.paste(probabilities, boxes[: len(probabilities)], size=(height, width))

    np.testing.assert_array_equal(packed, of["masks_packed"])


# Training, with the reference implementation's proposals and samples


@IMAGES
def test_valid_anchors(stages, name, image):
    of = stages(name, "train")

    flags = np.concatenate(anchors.valid_anchors(of["map_sizes"], of[f"pad_size_{image}"]))

    np.testing.assert_array_equal(flags, np.unpackbits(of[f"rpn_valid_{image}"])[: len(flags)])


@IMAGES
def test_assignment_of_anchors(stages, name, image):
    of = stages(name, "train")
    flags = np.concatenate(anchors.valid_anchors(of["map_sizes"], of[f"pad_size_{image}"]))
    boxes = of[f"gt_boxes_{image}"]

    matches, best = assign(
        jnp.concatenate(anchors.all_anchors(of["map_sizes"])), flags, padded(boxes), len(boxes),
        positive=0.7, negative=0.3, low_quality=0.3,
    )  # fmt: skip

    np.testing.assert_array_equal(matches, np.maximum(of[f"rpn_assign_gt_inds_{image}"], -1))
    np.testing.assert_array_equal(best, of[f"rpn_assign_max_iou_{image}"])


@IMAGES
def test_assignment_of_proposals(stages, name, image):
    of = stages(name, "train")
    boxes, proposals = of[f"gt_boxes_{image}"], of[f"proposals_{image}"][:, :4]

    matches, best = assign(
        proposals, np.ones(len(proposals), bool), padded(boxes), len(boxes),
        positive=0.5, negative=0.5, low_quality=0.5 if name == "mr_r50" else None,
    )  # fmt: skip

    np.testing.assert_array_equal(matches, of[f"roi_assign_gt_inds_{image}"])
    np.testing.assert_array_equal(best, of[f"roi_assign_max_iou_{image}"])


def replayed(positives: np.ndarray, negatives: np.ndarray, size: int) -> Sample:
    chosen = np.concatenate([positives, negatives])
    return Sample(*(jnp.asarray(x) for x in (padded(chosen, size), len(positives), len(chosen))))


@DETECTORS
def test_rpn_losses(stages, name):
    of = stages(name, "train")
    grid = jnp.concatenate(anchors.all_anchors(of["map_sizes"]))
    sums = np.zeros(3)
    for image in range(1 if name == "fr_r50" else 2):
        sample = replayed(of[f"rpn_pos_flat_{image}"], of[f"rpn_neg_flat_{image}"], 256)
        matches = jnp.asarray(of[f"rpn_assign_gt_inds_{image}"], jnp.int32)
        boxes = padded(of[f"gt_boxes_{image}"])
        logits, deltas = of[f"rpn_logits_{image}"][:, 0], of[f"rpn_deltas_{image}"]
        sums += np.array(rpn_losses(logits, deltas, grid, boxes, matches, sample))

        chosen = of[f"rpn_pos_flat_{image}"]
        goal = matched_deltas(grid[chosen], boxes, matches[chosen], np.ones(len(chosen), bool), RPN_STDS)
        np.testing.assert_allclose(goal, of[f"rpn_pos_bbox_target_{image}"], atol=2e-6)

    assert sums[0] / sums[2] == pytest.approx(of["loss_rpn_cls"].sum(), abs=2e-6)
    assert sums[1] / sums[2] == pytest.approx(of["loss_rpn_bbox"].sum(), abs=2e-6)


def second_stage(of: dict[str, np.ndarray], image: int) -> tuple:
    """The replayed sample, its rois, their matches and classes, with room for more ground truth than there is."""
    boxes, proposals = of[f"gt_boxes_{image}"], of[f"proposals_{image}"][:, :4]
    matches = jnp.asarray(of[f"roi_assign_gt_inds_{image}"])
    rois, matches = with_targets(padded(boxes), len(boxes), proposals, matches)
    moved = [
        np.where(of[key] < len(boxes), of[key], of[key] + TARGETS - len(boxes))
        for key in (f"roi_pos_inds_{image}", f"roi_neg_inds_{image}")
    ]
    sample = replayed(*moved, 512)
    labels = roi_labels(padded(of[f"gt_labels_{image}"]), matches, sample, NUM_CLASSES)
    return sample, rois[sample.indices], matches[sample.indices], labels, padded(boxes)


@DETECTORS
def test_second_stage_targets_and_box_loss(stages, name):
    of = stages(name, "train")
    images = 1 if name == "fr_r50" else 2
    predicted = np.zeros((images * 512, NUM_CLASSES, 4), np.float32)
    predicted[of["roi_pos_row"], of["roi_labels"][of["roi_pos_row"]]] = of["roi_pos_bbox_pred_of_label"]
    scores = of.get("roi_cls_score", np.zeros((images * 512, NUM_CLASSES + 1), np.float32))
    sums = np.zeros(3)
    for image in range(images):
        rows = slice(512 * image, 512 * (image + 1))
        sample, rois, matches, labels, boxes = second_stage(of, image)
        np.testing.assert_array_equal(rois, of["rois"][rows, 1:])
        np.testing.assert_array_equal(labels, of["roi_labels"][rows])
        goal = matched_deltas(rois, boxes, matches, sample.positive, BOX_STDS)
        np.testing.assert_allclose(goal, of["roi_bbox_targets"][rows], atol=2e-5, rtol=1e-6)

        deltas = predicted[rows].reshape(512, -1)
        sums += np.array(box_losses(scores[rows], deltas, rois, boxes, labels, matches, sample))

    assert sums[1] / sums[2] == pytest.approx(float(of["loss_bbox"]), abs=2e-6)
    if "roi_cls_score" in of:
        assert sums[0] / sums[2] == pytest.approx(float(of["loss_cls"]), abs=2e-6)


@pytest.mark.parametrize("tiled", [True, False])
def test_mask_targets_and_loss(stages, tiled):
    of = stages("mr_r50", "train")
    expected = np.unpackbits(of["mask_targets_packed"], axis=-1)[..., : masks.SIZE].astype(bool)
    sums, first = np.zeros(2), 0
    for image in range(2):
        sample, rois, matches, _, _ = second_stage(of, image)
        bitmaps = of[f"gt_masks_packed_{image}"]
        bitmaps = np.pad(bitmaps, [(0, TARGETS - len(bitmaps)), (0, 320 - bitmaps.shape[1]), (0, 3)])  # a larger bucket
        num, room = int(sample.num_positive), 128
        boxes, indices = rois[:room], matches[:room] - 1
        targets = masks.mask_targets(bitmaps, of[f"pad_size_{image}"], boxes, indices, num, tiled=tiled)
        rows = slice(first, first + num)
        np.testing.assert_array_equal(targets[:num], expected[rows])
        assert not targets[num:].any()

        logits = padded(of["mask_logits_of_label"][rows], room)
        sums += np.array(mask_losses(logits, targets, np.arange(room) < num))
        first += num

    assert first == len(expected)
    assert sums[0] / sums[1] == pytest.approx(float(of["loss_mask"]), abs=2e-6)
