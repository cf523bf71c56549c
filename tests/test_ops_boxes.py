"""IoU decides as float32 does operation by operation; boxes are encoded and decoded as the reference implementation does."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from simam_jax.ops import boxes

GOLDEN = Path(__file__).parent / "golden" / "detection"


@pytest.fixture(scope="module")
def unit():
    with np.load(GOLDEN / "unit.npz") as arrays:
        return dict(arrays)


def pairs_at(threshold: float, count: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Two boxes of one size, the second moved right until the IoU is the threshold but for rounding: (4, count) each."""
    x, y = rng.uniform(0, 1300, (2, count)).astype(np.float32)
    w, h = rng.uniform(1, 500, (2, count)).astype(np.float32)
    moved = (x + w * np.float32((1 - threshold) / (1 + threshold))).astype(np.float32)
    return np.stack([x, y, x + w, y + h]), np.stack([moved, y, moved + w, y + h])


def iou_by_rule(a: np.ndarray, b: np.ndarray, min_union: float) -> np.ndarray:
    """NumPy rounds every operation to float32."""
    w = np.maximum(np.minimum(a[2], b[2]) - np.maximum(a[0], b[0]), np.float32(0))
    h = np.maximum(np.minimum(a[3], b[3]) - np.maximum(a[1], b[1]), np.float32(0))
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - w * h
    return w * h / np.maximum(union, np.float32(min_union))


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.7, 0.9])
def test_100_000_pairs_at_a_threshold_are_decided_as_float32_decides(threshold):
    a, b = pairs_at(threshold, 100_000, np.random.default_rng(0))
    expected = iou_by_rule(a, b, 1e-6)
    assert 0.2 < (expected > np.float32(threshold)).mean() < 0.8  # both sides are there

    above = jax.jit(lambda a, b: boxes.iou(a, b, min_union=1e-6) > jnp.float32(threshold))

    np.testing.assert_array_equal(above(a, b), expected > np.float32(threshold))
    np.testing.assert_array_equal(jax.jit(lambda a, b: boxes.iou(a, b, min_union=1e-6))(a, b), expected)


def test_empty_and_separate_boxes_have_no_overlap():
    empty = np.zeros((4, 1), np.float32)
    far = np.array([[5], [5], [6], [6]], np.float32)

    assert boxes.iou(empty, empty, min_union=1e-6) == 0
    assert boxes.iou(empty, far, min_union=1e-38) == 0
    assert boxes.iou(far, far, min_union=1e-38) == 1


def test_a_quotient_by_a_constant_is_rounded_once():
    x = np.random.default_rng(0).uniform(0, 400, 100_000).astype(np.float32)

    for divisor in (7, 14, 28):
        result = jax.jit(lambda x, by=divisor: boxes.exact_quotient(x, by))(x)
        np.testing.assert_array_equal(result, x / np.float32(divisor))


def test_decoding_equals_the_reference_implementation(unit):
    rois, deltas = unit["coder/rois"], unit["coder/deltas"]

    moved = boxes.decode(rois, deltas, (1.0, 1.0, 1.0, 1.0))
    np.testing.assert_allclose(moved, unit["coder/decode_std1_noclip"], rtol=1e-6, atol=1e-4)
    clipped = boxes.clip(moved, np.array([100, 150]))
    np.testing.assert_allclose(clipped, unit["coder/decode_std1_clip100x150"], rtol=1e-6, atol=1e-4)
    scaled = boxes.clip(boxes.decode(rois, deltas, (0.1, 0.1, 0.2, 0.2)), np.array([100, 150]))
    np.testing.assert_allclose(scaled, unit["coder/decode_std0.1_clip100x150"], rtol=1e-6, atol=1e-4)


@pytest.mark.parametrize("std", [1, 0.1])
def test_encoding_equals_the_reference_implementation(unit, std):
    stds = (1.0, 1.0, 1.0, 1.0) if std == 1 else (0.1, 0.1, 0.2, 0.2)

    deltas = boxes.encode(unit["coder/enc_src"], unit["coder/enc_gt"], stds)

    np.testing.assert_allclose(deltas, unit[f"coder/encode_std{std}"], rtol=1e-5, atol=1e-6)


def test_decoding_undoes_encoding():
    rng = np.random.default_rng(1)
    source, target = (np.sort(rng.uniform(0, 100, (50, 2, 2)), axis=1).reshape(50, 4) for _ in range(2))
    source, target = source.astype(np.float32), target.astype(np.float32)
    stds = (0.1, 0.1, 0.2, 0.2)
    near = np.abs(np.log((target[:, 2:] - target[:, :2]) / (source[:, 2:] - source[:, :2]))).max(1) < 4

    np.testing.assert_allclose(
        boxes.decode(source, boxes.encode(source, target, stds), stds)[near], target[near], atol=2e-4
    )


def test_class_specific_deltas_broadcast_over_rois(unit):
    rois, deltas = unit["coder/rois"], unit["coder/deltas"]
    both = np.stack([deltas, 2 * deltas], axis=1)

    result = boxes.decode(rois[:, None], both, (0.1, 0.1, 0.2, 0.2))

    np.testing.assert_array_equal(result[:, 1], boxes.decode(rois, 2 * deltas, (0.1, 0.1, 0.2, 0.2)))
