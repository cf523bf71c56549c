"""An image and its objects as the network sees them: the reference implementation's pixels, boxes and masks."""

import io
import json
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from simam_jax import UserError
from simam_jax.data.detection_sources import Example
from simam_jax.detection.rows import Layout, View, eval_row, pixels_of, train_row
from simam_jax.ops.bilinear import resize_bilinear
from simam_jax.preprocessing import DetectionPreprocessing

HOW = DetectionPreprocessing(min_size=48, max_size=80)
RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (30, 40, 3), dtype=np.uint8)
BOXES = np.array([[3, 4, 20, 25], [0, 0, 40, 30]], np.float32)
MASKS = np.zeros((2, 30, 40), bool)
MASKS[0, 4:25, 3:20] = True
MASKS[1] = RNG.uniform(size=(30, 40)) < 0.5


def png(pixels):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def example(**changes):
    fields = {
        "image": png(PIXELS),
        "size": (30, 40),
        "boxes": BOXES,
        "labels": np.array([3, 1], np.int32),
        "masks": lambda: MASKS,
    }
    return Example(**fields | changes)


def unpacked(row):
    return np.unpackbits(row["masks"], axis=-1, count=row["image"].shape[1]).astype(bool)


def nearest(masks, height, width):
    rows, columns = ((np.arange(m) * (1 / (m / n))).astype(int) for n, m in ((30, height), (40, width)))
    return masks[:, rows][:, :, columns]


@pytest.mark.parametrize("mirrored", [False, True])
def test_boxes_and_masks_go_with_the_resized_and_mirrored_image(mirrored):
    row = train_row(example(), HOW, Layout((64, 96), 4, True), View(mirrored=mirrored))
    assert row["image"].shape == (64, 96, 3)
    assert row["image_size"].tolist() == [48, 64]  # as 30 x 40
    wanted = resize_bilinear(PIXELS, (48, 64))
    masks = nearest(MASKS, 48, 64)
    boxes = BOXES * np.float32(1.6)
    if mirrored:
        wanted, masks = wanted[:, ::-1], masks[:, :, ::-1]
        boxes = np.stack((64 - boxes[:, 2], boxes[:, 1], 64 - boxes[:, 0], boxes[:, 3]), -1)
    np.testing.assert_array_equal(row["image"][:48, :64], wanted)
    assert not row["image"][48:].any()
    assert not row["image"][:, 64:].any()
    np.testing.assert_array_equal(row["boxes"], np.concatenate((boxes, np.zeros((2, 4)))).astype(np.float32))
    assert row["labels"].tolist() == [3, 1, 0, 0]
    assert row["count"] == 2
    np.testing.assert_array_equal(unpacked(row)[:2, :48, :64], masks)
    assert not unpacked(row)[2:].any()
    assert not unpacked(row)[:, 48:].any()


def test_boxes_are_cut_to_the_image():
    boxes = np.array([[-5, -5, 90, 90]], np.float32)
    row = train_row(example(boxes=boxes, labels=np.zeros(1, np.int32)), HOW, Layout((64, 96), 1, False), View())
    np.testing.assert_array_equal(row["boxes"], [[0, 0, 64, 48]])
    assert "masks" not in row


@pytest.mark.parametrize("corner", [(0.0, 0.0), (1.0, 1.0), (0.4, 0.7)])
def test_an_image_larger_than_its_shape_is_cropped_with_its_objects(corner):
    row = train_row(example(), HOW, Layout((64, 96), 2, True), View(scale=2.0, corner=corner))
    assert row["image_size"].tolist() == [64, 96]
    top, left = round(corner[0] * 32), round(corner[1] * 32)
    whole = resize_bilinear(PIXELS, (96, 128))
    np.testing.assert_array_equal(row["image"], whole[top : top + 64, left : left + 96])
    masks = nearest(MASKS, 96, 128)[:, top : top + 64, left : left + 96]
    np.testing.assert_array_equal(unpacked(row), masks)
    shifted = (BOXES * np.float32(3.2) - [left, top, left, top]).clip(0, [96, 64, 96, 64])
    np.testing.assert_allclose(row["boxes"], shifted, atol=1e-5)


def test_objects_that_a_crop_does_not_show_are_left_out():
    row = train_row(example(), HOW, Layout((64, 64), 2, True), View(scale=3.0, corner=(1.0, 1.0)))
    assert row["count"] == 1  # the first one ends at 80 of 144 rows
    assert row["labels"].tolist() == [1, 0]


def test_no_objects_are_no_rows():
    none = example(boxes=np.zeros((0, 4), np.float32), labels=np.zeros(0, np.int32), masks=lambda: MASKS[:0])
    row = train_row(none, HOW, Layout((64, 96), 3, True), View())
    assert row["count"] == 0
    assert not row["boxes"].any()
    assert not row["masks"].any()


def test_evaluation_sees_the_same_pixels_and_no_objects():
    row = eval_row(example(), HOW, (64, 96))
    trained = train_row(example(), HOW, Layout((64, 96), 2, False), View())
    np.testing.assert_array_equal(row["image"], trained["image"])
    assert row["original_size"].tolist() == [30, 40]
    assert set(row) == {"image", "image_size", "original_size"}


def test_a_file_of_another_size_than_the_annotations_say_is_an_error():
    turned = example(size=(40, 30))
    with pytest.raises(UserError, match=r"30 x 40 pixels.*say 40 x 30.*on its side, without an EXIF tag"):
        eval_row(turned, HOW, (64, 96))
    with pytest.raises(UserError, match=r"say 31 x 40 \(height, width\)\."):
        eval_row(example(size=(31, 40)), HOW, (64, 96))


@pytest.mark.parametrize("tag", range(1, 9))
def test_an_exif_tag_turns_the_image_as_opencv_does(tag):
    exif, buffer = Image.Exif(), io.BytesIO()
    exif[0x0112] = tag
    smooth = cv2.resize(PIXELS[:3, :4], (40, 30), interpolation=cv2.INTER_LINEAR)
    Image.fromarray(smooth).save(buffer, "JPEG", exif=exif, quality=100)
    wanted = cv2.imdecode(np.frombuffer(buffer.getvalue(), np.uint8), cv2.IMREAD_COLOR)[..., ::-1]
    got = pixels_of(example(image=buffer.getvalue(), size=wanted.shape[:2]))
    assert np.abs(got.astype(int) - wanted).max() <= 1
    np.testing.assert_array_equal(HOW(buffer.getvalue()).pixels, HOW(got).pixels)  # as prediction shows it
    if tag > 4:  # annotated as it is stored
        stored = pixels_of(example(image=buffer.getvalue(), size=(30, 40)))
        np.testing.assert_array_equal(stored, np.asarray(Image.open(io.BytesIO(buffer.getvalue()))))


def test_masks_of_another_size_or_none_are_errors():
    layout = Layout((64, 96), 2, True)
    with pytest.raises(UserError, match=r"The masks are \(29, 40\)"):
        train_row(example(masks=lambda: MASKS[:, :29]), HOW, layout, View())
    with pytest.raises(UserError, match="objects without masks"):
        train_row(example(masks=None), HOW, layout, View())


def test_opencvs_resize_is_the_one_that_prediction_uses():
    rng = np.random.default_rng(1)
    for height, width, new_height, new_width in rng.integers(5, 300, (40, 4)):
        pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        ours = resize_bilinear(pixels, (new_height, new_width))
        np.testing.assert_array_equal(cv2.resize(pixels, (int(new_width), int(new_height))), ours)


def test_masks_take_the_pixel_that_opencv_calls_the_nearest():
    for height in np.random.default_rng(2).integers(5, 300, 40).tolist():
        how = DetectionPreprocessing(min_size=height, max_size=10_000)
        layout = Layout(how.resized(30, 40), 2, True)
        row = train_row(example(), how, layout, View())
        for got, mask in zip(unpacked(row), MASKS, strict=True):
            size = layout.shape[::-1]
            wanted = cv2.resize(mask.astype(np.uint8), size, interpolation=cv2.INTER_NEAREST)
            np.testing.assert_array_equal(got, wanted.astype(bool))


GOLDEN = Path(__file__).parents[2] / "shared" / "golden" / "detection"


@pytest.mark.skipif(not GOLDEN.is_dir(), reason="needs the shared data")
@pytest.mark.parametrize(("image", "name"), [(0, "img_china.png"), (1, "img_flower_crop.png")])
def test_boxes_and_masks_are_those_of_the_reference_implementations_pipeline(image, name):
    golden = np.load(GOLDEN / "mr_r50_train.npz")
    meta = json.loads((GOLDEN / "mr_r50_train.json").read_text())["meta"][image]
    (height, width), padded = meta["ori_shape"][:2], tuple(meta["pad_shape"][:2])
    wanted = golden[f"gt_boxes_{image}"]
    boxes = (np.rint(4 * wanted / np.array(meta["scale_factor"])) / 4).astype(np.float32)  # quarters of pixels there
    masks = np.unpackbits(golden[f"gt_mask_orig_packed_{image}"], axis=-1, count=width).astype(bool)
    given = Example(GOLDEN / name, (height, width), boxes, golden[f"gt_labels_{image}"], lambda: masks)
    row = train_row(given, DetectionPreprocessing(200, 333), Layout(padded, len(boxes), True), View())
    np.testing.assert_array_equal(row["boxes"], wanted)
    np.testing.assert_array_equal(row["masks"], golden[f"gt_masks_packed_{image}"])
    assert row["image_size"].tolist() == meta["img_shape"][:2]
