"""RoIAlign and its gradient, in the forms of all platforms, beside the reference implementation and beside the definition."""

import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from simam_jax.ops.roi_align import ACCELERATOR, CPU, roi_align

GOLDEN = Path(__file__).parent / "golden" / "detection"
FORMS = pytest.mark.parametrize("form", [CPU, ACCELERATOR], ids=["cpu", "accelerator"])


@pytest.fixture(scope="module")
def unit():
    with np.load(GOLDEN / "unit.npz") as arrays:
        return dict(arrays)


def one_roi(features: np.ndarray, box: np.ndarray, size: int, scale: float) -> np.ndarray:
    """The definition, sample by sample, float32 positions and float64 sums: (size, size, C) from (H, W, C)."""
    f32 = np.float32
    low, high = (box.astype(f32).reshape(2, 2) * f32(scale) - f32(0.5))[:, ::-1]
    bins = (high - low) / f32(size)
    grid = np.ceil(bins).astype(int)
    result = np.zeros((size, size, features.shape[-1]))
    if (grid <= 0).any():
        return result

    def axis(k: int, p: int) -> list[list[tuple[int, float]]]:
        length, samples = features.shape[k], []
        for i in range(grid[k]):
            at = low[k] + f32(p) * bins[k] + (f32(i) + f32(0.5)) * bins[k] / f32(grid[k])
            if not -1 <= at <= length:
                samples.append([])
                continue
            at = min(max(at, f32(0)), f32(length - 1))
            floor = math.floor(at)
            samples.append([(floor, 1 - float(at - floor)), (min(floor + 1, length - 1), float(at - floor))])
        return samples

    for p in range(size):
        for q in range(size):
            for ys in axis(0, p):
                for xs in axis(1, q):
                    for y, wy in ys:
                        for x, wx in xs:
                            result[p, q] += wy * wx * features[y, x]
    return result / grid.prod()


def odd_rois() -> np.ndarray:
    """Elongated, empty, inside out, outside, across every border, huge, and tiny, for an image of 80 by 112."""
    return np.array(
        [
            [0, 30, 112, 31], [50, 0, 51, 80], [0, 39.9, 112, 40.1], [20, 20, 20, 60], [5, 5, 5, 5], [60, 50, 40, 30],
            [200, 200, 260, 250], [-90, -70, -10, -5], [-30, -20, 12, 9], [100, 70, 140, 99], [-500, -400, 700, 600],
            [0, 0, 112, 80], [7.3, 9.1, 7.31, 9.12], [0, 0, 28, 28], [13, 27, 69, 83],
        ],
        np.float32,
    )  # fmt: skip


@FORMS
@pytest.mark.parametrize("size", [7, 14])
def test_values_and_gradients_equal_the_reference_implementation(unit, form, size):
    features = unit["roialign/feat"].transpose(0, 2, 3, 1)
    image, boxes = unit["roialign/rois"][:, 0], unit["roialign/rois"][:, 1:]
    valid = np.stack([image == 0, image == 1])
    extents = np.array([[80, 96]] * 2)

    def f(features):
        boxes_of_all = jnp.broadcast_to(boxes, (2, *boxes.shape))
        out = roi_align([features], extents, boxes_of_all, jnp.zeros(valid.shape, int), valid, size=size, form=form)
        return out.sum(0)  # every roi is valid in one of the images and zero in the other

    values, vjp = jax.vjp(jax.jit(f), features)
    np.testing.assert_allclose(values, unit[f"roialign/out{size}"].transpose(0, 2, 3, 1), atol=1e-6)
    (gradient,) = vjp(unit[f"roialign/cotangent{size}"].transpose(0, 2, 3, 1))
    expected = unit[f"roialign/grad_feat{size}"].transpose(0, 2, 3, 1)
    np.testing.assert_allclose(gradient, expected, atol=1e-6 * np.abs(expected).max(), rtol=1e-6)


@FORMS
def test_odd_rois_on_every_level_equal_the_definition(form):
    rng = np.random.default_rng(0)
    maps = [rng.standard_normal((2, 20 // 2**i, 28 // 2**i, 3), np.float32) for i in range(3)]
    rois = np.stack([odd_rois(), odd_rois() * np.float32(0.7)])
    levels = rng.integers(0, 3, rois.shape[:2])
    valid = rng.random(rois.shape[:2]) < 0.8
    extents = np.array([[80, 112]] * 2)

    result = roi_align(maps, extents, rois, levels, valid, size=7, form=form)

    for image in range(2):
        for row in range(rois.shape[1]):
            level = levels[image, row]
            expected = one_roi(maps[level][image], rois[image, row], 7, 1 / (4 * 2**level))
            np.testing.assert_allclose(result[image, row], expected * valid[image, row], atol=2e-6)


@FORMS
def test_the_gradient_is_the_transpose_of_the_value(form):
    rng = np.random.default_rng(1)
    shapes = [(2, 20 // 2**i, 28 // 2**i, 4) for i in range(3)]
    maps = tuple(rng.standard_normal(shape, np.float32) for shape in shapes)
    rois = np.stack([odd_rois(), odd_rois()[::-1]])
    levels, valid = rng.integers(0, 3, rois.shape[:2]), rng.random(rois.shape[:2]) < 0.8
    extents = np.array([[80, 112], [64, 100]])

    def f(maps):
        return roi_align(maps, extents, rois, levels, valid, size=7, form=form)

    values, vjp = jax.vjp(jax.jit(f), maps)
    dy = rng.standard_normal(values.shape, np.float32)
    (gradients,) = vjp(dy)

    inner = sum(float(np.vdot(x, dx)) for x, dx in zip(maps, gradients, strict=True))
    assert inner == pytest.approx(float(np.vdot(values, dy)), rel=1e-5, abs=1e-3)


@FORMS
def test_padding_beyond_the_extent_changes_nothing(form):
    rng = np.random.default_rng(2)
    own = rng.standard_normal((1, 16, 24, 3), np.float32)
    padded = np.full((1, 40, 24 + 9, 3), 7, np.float32)
    padded[:, :16, :24] = own
    rois = np.array([[[0, 0, 96, 64], [80, 40, 96, 64], [60.5, 50.2, 95.9, 63.9]]], np.float32)
    args = np.array([[64, 96]]), rois, np.zeros((1, 3), int), np.ones((1, 3), bool)

    np.testing.assert_allclose(
        roi_align([padded], *args, size=7, form=form), roi_align([own], *args, size=7, form=form), atol=1e-6
    )


@FORMS
def test_no_roi_at_all_gives_zeros_and_a_zero_gradient(form):
    maps = (np.ones((1, 8, 8, 2), np.float32),)
    rois, none = np.zeros((1, 3, 4), np.float32), np.zeros((1, 3), bool)

    def f(maps):
        return roi_align(maps, np.array([[32, 32]]), rois, np.zeros((1, 3), int), none, size=7, form=form)

    values, vjp = jax.vjp(f, maps)
    assert not values.any()
    assert not vjp(jnp.ones_like(values))[0][0].any()


@FORMS
def test_half_precision_maps_are_summed_in_float32(form):
    rng = np.random.default_rng(3)
    maps = jnp.asarray(rng.standard_normal((1, 20, 28, 3)), jnp.bfloat16)
    rois = odd_rois()[None]
    args = np.array([[80, 112]]), rois, np.zeros(rois.shape[:2], int), np.ones(rois.shape[:2], bool)

    result = roi_align([maps], *args, size=7, form=form)

    assert result.dtype == jnp.bfloat16
    exact = roi_align([maps.astype(jnp.float32)], *args, size=7, form=form)
    np.testing.assert_array_equal(result, exact.astype(jnp.bfloat16))
