"""The parts of detection one by one: anchors, levels, assignment, sampling, masks, the extent, the losses."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from simam_jax import simam
from simam_jax.ops import extent
from simam_jax.rcnn import anchors, losses, masks
from simam_jax.rcnn.assign import assign
from simam_jax.rcnn.levels import level_of
from simam_jax.rcnn.proposals import detect, propose
from simam_jax.rcnn.sample import Sample, sample, with_targets

GOLDEN = Path(__file__).parent / "golden" / "detection"


@pytest.fixture(scope="module")
def unit():
    with np.load(GOLDEN / "unit.npz") as arrays:
        return dict(arrays)


def random_boxes(count: int, rng: np.random.Generator, size: float = 200) -> np.ndarray:
    corners = rng.uniform(0, size, (count, 2))
    return np.concatenate([corners, corners + rng.uniform(5, size / 3, (count, 2))], axis=1).astype(np.float32)


# Anchors and levels

SIZES = [(12, 16), (6, 8), (3, 4), (2, 2), (1, 1)]


def test_anchors_equal_the_reference_implementation(unit):
    for i, (grid, flags) in enumerate(
        zip(anchors.all_anchors(SIZES), anchors.valid_anchors(SIZES, np.array([33, 50])), strict=True)
    ):
        np.testing.assert_array_equal(anchors.base_anchors(anchors.STRIDES[i]), unit["anchors/base"][i])
        np.testing.assert_array_equal(grid, unit[f"anchors/grid{i + 2}"])
        np.testing.assert_array_equal(flags, unit[f"anchors/valid{i + 2}_padshape_33x50"])


def test_levels_at_their_boundaries_equal_the_reference_implementation(unit):
    np.testing.assert_array_equal(jax.jit(level_of)(unit["levels/rois"][:, 1:]), unit["levels/out"])


def test_levels_around_every_boundary_are_those_of_float32_logarithms():
    sides = [np.float32(56 * 2**k) + np.arange(-200, 201) * np.spacing(np.float32(56 * 2**k)) for k in (0, 1, 2, 3)]
    sides = np.concatenate(sides).astype(np.float32)
    boxes = np.stack([sides * 0, sides * 0, sides, sides], axis=1)
    root = np.sqrt(sides * sides)

    expected = np.floor(np.log2(root / np.float32(56) + np.float32(1e-6))).clip(0, 3)

    np.testing.assert_array_equal(jax.jit(level_of)(boxes), expected)


# Assignment

RULES = {
    "rpn": {"positive": 0.7, "negative": 0.3, "low_quality": 0.3},
    "rcnn_fr": {"positive": 0.5, "negative": 0.5, "low_quality": None},
    "rcnn_mr": {"positive": 0.5, "negative": 0.5, "low_quality": 0.5},
}


def iou_matrix(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """(len(a), len(b)) in float32, operation by operation."""
    corner = np.minimum(a[:, None, 2:], b[:, 2:]) - np.maximum(a[:, None, :2], b[:, :2])
    inter = corner.clip(0)[..., 0] * corner.clip(0)[..., 1]
    areas = [(x[:, 2] - x[:, 0]) * (x[:, 3] - x[:, 1]) for x in (a, b)]
    return inter / np.maximum(areas[0][:, None] + areas[1] - inter, np.float32(1e-6))


def assigned_by_matrix(candidates, targets, positive, negative, low_quality) -> np.ndarray:
    """mmdetection's rule, on the whole matrix."""
    overlaps = iou_matrix(targets, candidates)
    best, first = overlaps.max(0), overlaps.argmax(0)
    result = np.where(best < np.float32(negative), 0, -1)
    result = np.where(best >= np.float32(positive), first + 1, result)
    for i, row in enumerate(overlaps if low_quality is not None else []):
        if row.max() >= np.float32(low_quality):
            result[row == row.max()] = i + 1
    return result


@pytest.mark.parametrize("rule", RULES)
def test_assignment_equals_the_reference_implementation(unit, rule):
    candidates, targets = unit["assign/cand"], unit["assign/gt"]

    matches, best = assign(candidates, np.ones(len(candidates), bool), targets, len(targets), **RULES[rule])

    np.testing.assert_array_equal(matches, unit[f"assign/{rule}_gt_inds"])
    np.testing.assert_array_equal(best, unit[f"assign/{rule}_max_iou"])


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("count", [1, 100])
def test_any_number_of_ground_truths_is_assigned_as_on_the_matrix(rule, count):
    rng = np.random.default_rng(count)
    targets = np.concatenate([random_boxes(count, rng), random_boxes(3, rng)])  # the last three are padding
    if count > 10:
        targets[5] = targets[2]  # a duplicate
    candidates = np.concatenate([random_boxes(900, rng), targets[:count] + rng.normal(0, 3, (count, 4))])
    candidates = candidates.astype(np.float32)
    valid = rng.random(len(candidates)) < 0.9

    matches, _ = assign(candidates, valid, targets, count, **RULES[rule])

    np.testing.assert_array_equal(
        np.asarray(matches)[valid], assigned_by_matrix(candidates[valid], targets[:count], **RULES[rule])
    )
    assert (np.asarray(matches)[~valid] == -1).all()


def test_without_ground_truth_every_candidate_is_negative():
    candidates, valid = random_boxes(20, np.random.default_rng(0)), np.arange(20) < 15

    for room in (0, 4):
        matches, _ = assign(candidates, valid, np.ones((room, 4), np.float32), 0, **RULES["rpn"])
        np.testing.assert_array_equal(matches, np.where(valid, 0, -1))


# Sampling


@pytest.mark.parametrize(
    ("positives", "negatives", "expected"),
    [(100, 500, (16, 48)), (3, 500, (3, 61)), (0, 500, (0, 64)), (100, 10, (16, 10)), (0, 0, (0, 0))],
)
def test_a_sample_has_the_numbers_that_the_reference_implementation_takes(positives, negatives, expected):
    rng = np.random.default_rng(0)
    matches = rng.permutation(np.repeat([5, 0, -1], [positives, negatives, 700 - positives - negatives]))

    chosen = sample(matches, jax.random.key(0), num=64, max_positive=16)

    found = matches[np.asarray(chosen.indices)]
    assert (int(chosen.positive.sum()), int(chosen.valid.sum() - chosen.positive.sum())) == expected
    assert (found[np.asarray(chosen.positive)] > 0).all()
    assert (found[np.asarray(chosen.valid & ~chosen.positive)] == 0).all()
    assert len(set(np.asarray(chosen.indices)[np.asarray(chosen.valid)])) == sum(expected)


def test_every_candidate_is_sampled_equally_often():
    matches = jnp.repeat(jnp.array([1, 0, -1]), 20)
    draws = jax.vmap(lambda key: sample(matches, key, num=8, max_positive=4))(jax.random.split(jax.random.key(1), 2000))

    counts = np.bincount(np.asarray(draws.indices).ravel(), minlength=60)

    assert (counts[40:] == 0).all()
    np.testing.assert_allclose(counts[:40], 400, atol=5 * np.sqrt(400 * 0.8))  # five standard deviations


def test_fewer_candidates_than_the_sample_has_room_for():
    chosen = sample(jnp.array([2, 0, -1]), jax.random.key(0), num=8, max_positive=2)

    np.testing.assert_array_equal(chosen.indices, [0, 1, 0, 0, 0, 0, 0, 0])
    assert (chosen.num_positive, chosen.count) == (1, 2)


def test_ground_truth_stands_before_the_proposals():
    targets, proposals = np.ones((3, 4), np.float32), np.zeros((2, 4), np.float32)

    candidates, matches = with_targets(targets, 2, proposals, jnp.array([0, 2]))

    np.testing.assert_array_equal(candidates, np.concatenate([targets, proposals]))
    np.testing.assert_array_equal(matches, [1, 2, -1, 0, 2])


# Proposals and detections of nothing


def test_nothing_valid_proposes_nothing_and_detects_nothing():
    zeros = np.zeros((12, 4), np.float32)
    found = propose([zeros[:, 0]], [zeros], [zeros], [zeros[:, 0] > 0], np.array([50, 60]), before_nms=8, most=6)
    assert found.count == 0
    assert not found.boxes.any()

    for count, logits in ((0, np.ones((6, 4), np.float32)), (6, np.array([[0, 0, 0, 9.0]] * 6, np.float32))):
        none = detect(logits, zeros[:6, [0] * 12], zeros[:6], count, np.array([50, 60]), np.ones(4, np.float32))
        assert none.count == 0
        assert not none.scores.any()


# Masks


def test_bits_are_packed_as_numpy_packs_them():
    bitmaps = np.random.default_rng(0).random((2, 5, 21)) < 0.5

    packed = masks.pack(bitmaps)

    np.testing.assert_array_equal(packed, np.packbits(bitmaps, axis=-1))
    np.testing.assert_array_equal(masks.unpack(packed, 21), bitmaps)


@pytest.mark.parametrize("tiled", [True, False])
def test_mask_targets_equal_the_reference_implementation(unit, tiled):
    packed = np.packbits(unit["mask_target/masks"], axis=-1)
    boxes, indices = unit["mask_target/boxes"], unit["mask_target/gt_inds"]

    targets = masks.mask_targets(packed, np.array([64, 80]), boxes, indices, len(boxes), tiled=tiled)

    np.testing.assert_array_equal(targets, unit["mask_target/out"].astype(bool))


def test_pasted_masks_equal_the_reference_implementation(unit):
    height, width = (int(n) for n in unit["paste_image_hw"])

    packed = masks.paste(unit["paste/prob"], unit["paste/boxes"], size=(height, width))

    np.testing.assert_array_equal(masks.unpack(packed, width), unit["paste/cpu_path"] >= 0.5)


def test_without_ground_truth_mask_targets_are_empty():
    none = np.zeros((0, 40, 5), np.uint8)

    targets = masks.mask_targets(none, np.array([40, 40]), np.zeros((3, 4), np.float32), np.zeros(3, int), 0)

    assert targets.shape == (3, 28, 28)
    assert not targets.any()


# The extent


@pytest.mark.parametrize("e_lambda", [0.1, 1e-4])
def test_simam_over_an_extent_equals_the_reference_implementation_without_padding(unit, e_lambda):
    x = unit["simam/x"].transpose(0, 2, 3, 1)
    dy = unit["simam/cotangent"].transpose(0, 2, 3, 1)
    padding = [(0, 0), (0, 4), (0, 6), (0, 0)]
    padded, sizes = np.pad(x, padding, constant_values=50), np.array([x.shape[1:3]] * 2)

    y, vjp = jax.vjp(lambda x: extent.simam(x, sizes, e_lambda), padded)

    expected = unit[f"simam/out_{e_lambda}"].transpose(0, 2, 3, 1)
    np.testing.assert_allclose(y, np.pad(expected, padding), rtol=1e-5, atol=1e-6)
    (dx,) = vjp(np.pad(dy, padding, constant_values=3))
    gradient = unit[f"simam/grad_{e_lambda}"].transpose(0, 2, 3, 1)
    np.testing.assert_allclose(dx, np.pad(gradient, padding), rtol=1e-4, atol=1e-5)


def test_images_of_a_batch_have_extents_of_their_own():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 8, 10, 3), np.float32)
    sizes = np.array([[8, 6], [5, 10]])

    y = extent.simam(x, sizes, 0.1)

    for image, (height, width) in enumerate(sizes):
        own = simam(x[image, :height, :width], 0.1)
        np.testing.assert_allclose(y[image, :height, :width], own, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(extent.zero_beyond(y, sizes), y)


def test_a_map_of_one_place_is_weighted_by_the_sigmoid_of_a_half():
    x = np.full((4, 4, 2), 3, np.float32)

    y, vjp = jax.vjp(lambda x: extent.simam(x, np.array([1, 1]), 0.1), x)

    np.testing.assert_allclose(y[0, 0], 3 / (1 + np.exp(-0.5)), rtol=1e-6)
    assert np.isfinite(vjp(jnp.ones_like(y))[0]).all()


def test_extents_of_strided_maps_are_rounded_up():
    np.testing.assert_array_equal(extent.at_stride(np.array([800, 1344]), 64), [13, 21])


# Losses


def test_elementwise_losses_equal_the_reference_implementation(unit):
    targets = (unit["loss/bce_label_0_is_fg"] == 0).astype(np.float32)
    weight = unit["loss/bce_weight"]

    def bce(logits):
        return (losses.binary_cross_entropy(logits[:, 0], targets) * weight).sum() / 13

    def ce(logits):
        return losses.cross_entropy(logits, unit["loss/ce_label"]).sum() / 12

    def l1(predicted):
        return losses.l1(predicted, unit["loss/l1_target"], np.ones(9, bool)) / 512

    for f, x, value, gradient in (
        (bce, "bce_logits", "bce_avg13", "bce_grad"),
        (ce, "ce_logits", "ce_avg12", "ce_grad"),
        (l1, "l1_pred", "l1_avg512", "l1_grad"),
    ):
        y, dx = jax.value_and_grad(f)(unit[f"loss/{x}"])
        np.testing.assert_allclose(y, unit[f"loss/{value}"][0], rtol=1e-6)
        np.testing.assert_allclose(dx, unit[f"loss/{gradient}"], atol=1e-7)


def test_the_mask_loss_equals_the_reference_implementation(unit):
    logits = unit["loss/mask_logits"][np.arange(3), unit["loss/mask_label"]]

    loss, count = losses.mask_losses(logits, unit["loss/mask_target"], np.ones(3, bool))

    np.testing.assert_allclose(loss / count, unit["loss/mask"][0], rtol=1e-6)


def test_an_image_without_ground_truth_has_finite_losses_and_gradients():
    rng = np.random.default_rng(0)
    proposals = np.zeros((8, 4), np.float32)  # without an area, as padding is
    for room in (0, 3):
        targets = np.zeros((room, 4), np.float32)
        matches = jnp.zeros(8, jnp.int32)
        chosen = Sample(jnp.arange(8), jnp.int32(0), jnp.int32(6))
        labels = losses.roi_labels(np.zeros(room, int), matches, chosen, 4)
        assert (np.asarray(labels) == 4).all()

        def total(logits, deltas, targets=targets, matches=matches, chosen=chosen, labels=labels):
            cls, box, count = losses.box_losses(logits, deltas, proposals, targets, labels, matches, chosen)
            rpn = losses.rpn_losses(logits[:, 0], deltas[:, :4], proposals, targets, matches, chosen)
            assert count == 6
            assert rpn[2] == 1 + 6
            return (cls + box) / count + (rpn[0] + rpn[1]) / rpn[2]

        arrays = rng.standard_normal((8, 5), np.float32), rng.standard_normal((8, 16), np.float32)
        loss, gradients = jax.value_and_grad(total, argnums=(0, 1))(*arrays)
        assert np.isfinite(loss)
        assert np.isfinite(gradients[0]).all()
        assert not gradients[1].any()
        assert not gradients[0][6:].any()  # rows of padding


# Export


@pytest.mark.slow
def test_inference_and_training_lower_for_every_platform_without_custom_calls():
    from simam_jax.ops.roi_align import roi_align

    sizes = [(8, 12), (4, 6), (2, 3), (1, 2), (1, 1)]
    image, one = np.array([32, 48]), jnp.ones((1, 20), bool)

    def forward(maps, logits, deltas, scores, boxes):
        found = propose(
            logits, deltas, anchors.all_anchors(sizes), anchors.valid_anchors(sizes, image), image,
            before_nms=16, most=20,
        )  # fmt: skip
        levels = level_of(found.boxes)[None]
        features = roi_align(maps, image[None], found.boxes[None], levels, one, size=7)
        detections = detect(scores, boxes, found.boxes, found.count, image, jnp.ones(4))
        masks_ = masks.paste(jax.nn.sigmoid(features[0, :, :1, :1, 0] * jnp.ones((28, 28))), found.boxes, size=(32, 48))
        return features.sum(), (detections, masks_)

    def training(maps, logits, deltas, targets, bitmaps):
        grid, flags = jnp.concatenate(anchors.all_anchors(sizes)), anchors.valid_anchors(sizes, image)
        matches, _ = assign(grid, jnp.concatenate(flags), targets, 2, **RULES["rpn"])
        chosen = Sample(jnp.arange(20), jnp.int32(3), jnp.int32(20))

        def loss(maps, logits, deltas):
            cls, box, count = losses.rpn_losses(
                jnp.concatenate(logits), jnp.concatenate(deltas), grid, targets, matches, chosen
            )
            rois = grid[chosen.indices]
            features = roi_align(maps, image[None], rois[None], level_of(rois)[None], one, size=14)
            goal = masks.mask_targets(bitmaps, image, rois, matches[chosen.indices], chosen.num_positive)
            logits = jnp.repeat(jnp.repeat(features[0, ..., 0], 2, axis=1), 2, axis=2)
            mask = losses.mask_losses(logits, goal, chosen.positive)
            return (cls + box) / count + mask[0] / mask[1]

        return jax.value_and_grad(loss, argnums=(0, 1, 2))(maps, logits, deltas)

    rng = np.random.default_rng(0)
    maps = [rng.standard_normal((1, *size, 4), np.float32) for size in sizes[:4]]
    logits = [rng.standard_normal(3 * h * w, np.float32) for h, w in sizes]
    deltas = [rng.standard_normal((3 * h * w, 4), np.float32) for h, w in sizes]
    scores, boxes = rng.standard_normal((20, 4), np.float32) * 2, rng.standard_normal((20, 12), np.float32)
    bitmaps = np.full((3, 32, 6), 255, np.uint8)
    for f, args in (
        (forward, (maps, logits, deltas, scores, boxes)),
        (training, (maps, logits, deltas, random_boxes(3, rng, 30), bitmaps)),
    ):
        exported = jax.export.export(jax.jit(f), platforms=("cpu", "cuda", "tpu"))(*args)
        text = exported.mlir_module()
        called = {line.split("custom_call @")[1].split("(")[0] for line in text.splitlines() if "custom_call @" in line}
        assert called <= {"mhlo.topk"}  # how StableHLO writes top_k; every backend has it
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5),
            exported.call(*args),
            jax.jit(f)(*args),
        )
