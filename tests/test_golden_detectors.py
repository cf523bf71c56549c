"""Whole detectors against the reference implementation: detections, masks, losses, gradients, one update.

tests/golden/detection/README.md says where the numbers come from.
"""

from functools import cache
from pathlib import Path

import golden_detectors
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from simam_jax.models import create_model
from simam_jax.models.detector_losses import LOSSES, Chosen, Targets, losses, total
from simam_jax.rcnn.masks import paste
from simam_jax.rcnn.proposals import Proposals
from simam_jax.rcnn.sample import Sample

GOLDEN = Path(__file__).parent / "golden" / "detection"
MEAN = np.array([123.675, 116.28, 103.53], np.float32)
STD = np.array([58.395, 57.12, 57.375], np.float32)
MODELS = {"fr": "faster_rcnn", "mr": "mask_rcnn", "r50": "resnet50_fpn", "r101": "resnet101_fpn"}
TARGETS = 7  # room for ground truth, of which the images have fewer
ORIGINAL = 427, 640  # height and width of both photographs


@cache
def stored(file: str) -> dict[str, np.ndarray]:
    with np.load(GOLDEN / f"{file}.npz") as arrays:
        return dict(arrays)


def of(name: str, part: str) -> dict[str, np.ndarray]:
    prefix = f"{name}/{part}/"
    arrays = stored("stages") | stored("networks")
    return {key.removeprefix(prefix): value for key, value in arrays.items() if key.startswith(prefix)}


def network_input(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """(*size, 3) float32: normalised, then padded with zeros."""
    height, width = pixels.shape[:2]
    normalised = (pixels.astype(np.float32) - MEAN) * (1 / STD.astype(np.float64)).astype(np.float32)
    return np.pad(normalised, [(0, size[0] - height), (0, size[1] - width), (0, 0)])


def own_size(pixels: np.ndarray) -> tuple[int, int]:
    height, width = (-(-n // 32) * 32 for n in pixels.shape[:2])
    return height, width


def inputs(pixels: np.ndarray, size: tuple[int, int] | None = None) -> tuple[np.ndarray, ...]:
    """What `model.apply` takes of one image, padded to `size`."""
    height, width = pixels.shape[:2]
    scale = np.array([width / ORIGINAL[1], height / ORIGINAL[0]] * 2, np.float32)
    extent = own_size(pixels)
    image = network_input(pixels, size or extent)
    return image[None], np.array([extent]), np.array([[height, width]]), scale[None]


def check(found, boxes: np.ndarray, labels: np.ndarray, atol: float = 5e-4) -> None:
    """The same set in the same order."""
    num = len(boxes)
    assert found.count == num
    np.testing.assert_array_equal(found.labels[0, :num], labels)
    np.testing.assert_allclose(found.boxes[0, :num], boxes[:, :4], atol=atol)
    np.testing.assert_allclose(found.scores[0, :num], boxes[:, 4], atol=5e-6)
    assert not found.boxes[0, num:].any()
    assert not found.scores[0, num:].any()


def model_of(name: str, **changes):
    detector, depth = name.split("_")
    model, variables = golden_detectors.golden_model(f"{MODELS[detector]}_{MODELS[depth]}")
    return model.clone(**changes), variables


# Inference


@pytest.mark.parametrize(
    "name", ["fr_r50", *(pytest.param(name, marks=pytest.mark.slow) for name in ("mr_r50", "fr_r101", "mr_r101"))]
)
def test_detections(name):
    golden = of(name, "infer")
    pixels = of(name if name == "mr_r50" else "fr_r50", "infer")["image"]
    model, variables = model_of(name)

    found = jax.jit(model.apply)(variables, *inputs(pixels))

    check(found, golden["det_rescaled"], golden["det_label_rescaled"])
    if name == "mr_r50":
        packed = paste(found.masks[0], found.boxes[0], size=ORIGINAL)
        different = np.unpackbits(np.asarray(packed), axis=-1) != np.unpackbits(golden["masks_packed"], axis=-1)
        assert different.sum() <= 5


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fr_r50", "mr_r50"])
def test_detections_without_the_proposals_that_later_versions_drop(name):
    golden = of(name, "infer")
    model, variables = model_of(name, min_bbox_size=0.0)

    found = jax.jit(model.apply)(variables, *inputs(golden["image"]))

    check(found, golden["newer/det_rescaled"], golden["newer/det_label_rescaled"])


@pytest.mark.slow
def test_detections_depend_neither_on_the_bucket_nor_on_the_batch():
    golden, other = of("fr_r50", "infer"), of("mr_r50", "infer")["image"]
    pixels, boxes, labels = golden["image"], golden["det_rescaled"], golden["det_label_rescaled"]
    model, variables = model_of("fr_r50")
    apply = jax.jit(model.apply)
    alone = apply(variables, *inputs(pixels))

    def check_same(found) -> None:
        check(jax.tree.map(lambda x: x[:1], found), boxes, labels)
        # 1.5e-4 pixels of the network's input; the photograph, in whose pixels boxes are, is twice as large.
        np.testing.assert_allclose(found.boxes[0], alone.boxes[0], atol=3e-4)

    for bucket in ((320, 320), (384, 640)):
        check_same(apply(variables, *inputs(pixels, bucket)))
    pair = inputs(pixels, (416, 608)), inputs(other, (416, 608))
    check_same(apply(variables, *map(np.concatenate, zip(*pair, strict=True))))


# Training, with the reference implementation's proposals and samples


def padded(array: np.ndarray, rows: int = TARGETS) -> np.ndarray:
    return np.pad(array, [(0, rows - len(array))] + [(0, 0)] * (array.ndim - 1))


def stacked(items: list):
    return jax.tree.map(lambda *x: jnp.asarray(np.stack(x)), *items)


def sample_of(positives: np.ndarray, negatives: np.ndarray, size: int) -> Sample:
    chosen = np.concatenate([positives, negatives]).astype(np.int32)
    return Sample(padded(chosen, size), np.int32(len(positives)), np.int32(len(chosen)))


def training_case(name: str) -> tuple[tuple, dict]:
    """The arguments of `losses` after the variables."""
    golden = of(name, "train")
    size = tuple(golden["batch_size"])
    pixels = [of("fr_r50", "infer")["image"]] + ([golden["second_image"]] if name == "mr_r50" else [])
    targets, anchors, rois, proposals = [], [], [], []
    for i in range(len(pixels)):
        boxes, found = golden[f"gt_boxes_{i}"], golden[f"proposals_{i}"]
        bitmaps = None
        if name == "mr_r50":
            bitmaps = golden[f"gt_masks_packed_{i}"]
            room = (0, size[0] - bitmaps.shape[1]), (0, -(-size[1] // 8) - bitmaps.shape[2])
            bitmaps = padded(np.pad(bitmaps, [(0, 0), *room]))
        labels = padded(golden[f"gt_labels_{i}"]).astype(np.int32)
        targets.append(Targets(padded(boxes), labels, np.int32(len(boxes)), bitmaps))
        anchors.append(sample_of(golden[f"rpn_pos_flat_{i}"], golden[f"rpn_neg_flat_{i}"], 256))
        # Stored are rows of the real ground truth and the proposals; here there is padding between them.
        rows = [golden[f"roi_{sign}_inds_{i}"].astype(np.int32) for sign in ("pos", "neg")]
        rois.append(sample_of(*(np.where(row < len(boxes), row, row + TARGETS - len(boxes)) for row in rows), size=512))
        proposals.append(Proposals(found[:, :4], found[:, 4], np.int32(len(found))))
    images = np.stack([network_input(image, size) for image in pixels])
    keys = jax.random.split(jax.random.key(0), len(pixels))
    chosen = Chosen(stacked(proposals), stacked(anchors), stacked(rois))
    sizes = {"extent": np.array([size] * len(pixels)), "image_size": golden["image_sizes"]}
    return (images, stacked(targets), keys), {**sizes, "chosen": chosen}


@pytest.mark.parametrize("name", ["fr_r50", pytest.param("mr_r50", marks=pytest.mark.slow)])
def test_losses(name):
    golden = of(name, "train")
    args, options = training_case(name)
    model, variables = model_of(name)

    found = jax.jit(lambda *args: losses(model, *args, **options)[0])(variables, *args)

    assert total(found) == pytest.approx(float(golden["total"]), abs=2e-6)
    for part in LOSSES[: 5 if model.masks else 4]:
        of_images, count = found[part]
        expected = float(golden[part].sum())  # the RPN's are stored level by level
        assert of_images.sum() / count.sum() == pytest.approx(expected, abs=2e-6), part
    np.testing.assert_array_equal(
        found["positives"][0], [len(golden[f"roi_pos_inds_{i}"]) for i in range(len(golden["image_sizes"]))]
    )


# One ReLU of layer2 in the Faster R-CNN sits at 6e-7, one of the Mask R-CNN's proposals has a neighbour of equal score:
# rounding decides what is behind them, in the reference implementation too.
GRADIENTS = {
    "fr_r50": {"backbone.layer2": (1e-3, 2e-3), "": (1e-6, 1e-5)},
    "mr_r50": {"": (1e-4, 1e-3)},
}


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", GRADIENTS)
def test_gradients_and_an_update(name):
    """In float64, up to the pyramid: in float32 a processor's way of rounding decides some ReLUs of so many near 0."""
    golden = of(name, "train")
    (images, *args), options = training_case(name)
    model, variables = model_of(name)
    model = create_model(**{**model.spec(), "dtype": "float64"})
    variables = jax.tree.map(lambda x: x.astype(np.float64), variables)

    def loss(params):
        return total(losses(model, {**variables, "params": params}, images.astype(np.float64), *args, **options)[0])

    gradients = jax.jit(jax.grad(loss))(variables["params"])

    by_name = golden_detectors.named(gradients)
    norms = dict(zip(golden["trained"], golden["grad_norms"], strict=True))
    assert not any(gradient.any() for key, gradient in by_name.items() if key not in norms)
    of_norm, of_value = (
        {key: next(t[i] for part, t in GRADIENTS[name].items() if key.startswith(part)) for key in norms}
        for i in range(2)
    )
    for key, norm in norms.items():
        assert np.linalg.norm(by_name[key]) == pytest.approx(norm, rel=of_norm[key]), key
    parameters = golden_detectors.named(variables["params"])
    for key, expected in golden.items():
        kind, _, parameter = key.partition("/")
        if kind == "grad":
            steps = [n // m for n, m in zip(by_name[parameter].shape, expected.shape, strict=True)]
            ours = by_name[parameter][tuple(slice(None, None, step) for step in steps)]
            np.testing.assert_allclose(ours, expected, atol=of_value[parameter] * np.abs(expected).max(), err_msg=key)
        elif kind == "after_sgd":
            before, gradient = parameters[parameter], by_name[parameter]
            decay = 1e-4 * before if parameter in norms else 0
            np.testing.assert_allclose(before - 0.01 * (gradient + decay), expected, atol=1e-6, err_msg=key)
