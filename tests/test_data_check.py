"""What is said of a json before training: every fault is counted and named, and those that stop training stop the check."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from simam_jax import UserError
from simam_jax.data import check
from simam_jax.data.coco_index import read_index
from simam_jax.preprocessing import ORIENTATION, DetectionPreprocessing
from simam_jax.rcnn.anchors import all_anchors

SHARED = Path(__file__).parents[2] / "shared" / "data"


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def dataset(**changes):
    annotations = []
    for i, box in enumerate([[2, 3, 18, 20], [10, 5, 30, 30], [0, 0, 50, 40]], 1):
        x, y, w, h = box
        polygon = [x, y, x + w, y, x + w, y + h, x, y + h]
        of = {"id": i, "image_id": 1 + i % 2, "category_id": 5, "bbox": box, "area": w * h, "iscrowd": 0}
        annotations.append(of | {"segmentation": [polygon]})
    images = [{"id": i, "file_name": f"{i}.png", "height": 40, "width": 50} for i in (1, 2)]
    return {"images": images, "categories": [{"id": 5, "name": "cat"}], "annotations": annotations} | changes


@pytest.fixture
def run(tmp_path, capsys):
    """Runs the command on a json and its images; what it printed and its exit code."""

    def run(found, *options, sizes=None):
        (tmp_path / "x.json").write_text(json.dumps(found))
        (tmp_path / "images").mkdir(exist_ok=True)
        for number in (1, 2):
            Image.new("RGB", (sizes or {}).get(number, (50, 40))).save(tmp_path / "images" / f"{number}.png")
        command = ["--annotations", str(tmp_path / "x.json"), "--images", str(tmp_path / "images"), *options]
        return check.main(command), capsys.readouterr().out

    return run


def changed(number, **changes):
    """The data with one annotation changed."""
    found = dataset()
    found["annotations"][number - 1] |= changes
    return found


def test_good_data_are_described_and_can_start(run, tmp_path):
    code, said = run(dataset(), "--score", "--picture", str(tmp_path / "drawn.png"))
    assert code == 0
    for line in (
        "2, 0 without annotations",
        "3 cat",
        "at most 2 in an image",
        "padded to 800 x 1088",
        "bbox AP 1.000000",
    ):
        assert line in said, said
    assert "segm AP 1.000000" in said
    assert "Training can start." in said
    assert np.asarray(Image.open(tmp_path / "drawn.png")).any()


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (changed(1, bbox=[40, 3, 30, 20]), "1 leave their image (cut to it), annotation: 1"),
        (changed(2, bbox=[3, 3, 0, 20]), "1 are narrower or lower than a pixel (left out), annotation: 2"),
        (changed(3, iscrowd=1), "3, 1 of crowds"),
        (changed(1, bbox=[20, 3, 18, 20]), "1 do not fit their boxes, annotation: 1"),
        (changed(1, segmentation=[]), "1 annotations without one (a Mask R-CNN needs them): 1"),
        (dataset(annotations=dataset()["annotations"][1:2]), "2, 1 without annotations"),
    ],
)
def test_what_is_odd_is_counted_and_named(run, found, message):
    code, said = run(found)
    assert message in said
    assert code == 0


@pytest.mark.parametrize(
    ("found", "sizes", "message"),
    [
        (
            dataset(),
            {1: (40, 50)},
            "lie on their side, without an EXIF tag that says so; save them upright: 1.png",
        ),
        (dataset(), {2: (50, 41)}, "1 are of another size than the json says: 2.png"),
        (
            changed(1, segmentation={"size": [4, 4], "counts": [16]}),
            None,
            "1 cannot be read, annotation: 1 (A mask is of [4, 4]",
        ),
        (dataset(annotations=[]), None, "none has an annotation of a listed category"),
    ],
)
def test_what_stops_training_is_the_exit_code(run, found, sizes, message):
    code, said = run(found, sizes=sizes)
    assert code == 1
    assert message in said
    assert "Training cannot start: " in said.splitlines()[-1]


def test_corners_given_as_sizes_are_noticed(run):
    found = dataset()
    for annotation, box in zip(
        found["annotations"], ([20, 10, 48, 38], [30, 10, 45, 30], [10, 20, 45, 39]), strict=True
    ):
        annotation |= {"bbox": box, "segmentation": []}
    code, said = run(found)
    assert code == 1
    assert "annotations look like x y x y, where COCO has x y width height" in said


def test_missing_and_damaged_files_are_named(run, tmp_path):
    found = dataset()
    found["images"].append({"id": 9, "file_name": "9.png", "height": 40, "width": 50})
    code, said = run(found)
    assert code == 1
    assert "9.png" in said
    (tmp_path / "images" / "9.png").write_bytes(b"no image")
    code, said = run(found)
    assert code == 1
    assert "1 cannot be read: 9.png" in said


def test_the_overlap_with_anchors_is_that_of_all_of_them(tmp_path):
    (tmp_path / "x.json").write_text(json.dumps(dataset()))
    index, how = read_index(tmp_path / "x.json"), DetectionPreprocessing(64, 96)
    index.boxes[1] = [10, 5, 60, 90]  # is cut to [10, 5, 40, 35]
    got = check.anchor_overlap(index, np.ones(3, bool), index.image_of(), how)
    height, width = how.resized(40, 50)
    maps = [(-(-height // s), -(-width // s)) for s in (4, 8, 16, 32, 64)]
    anchors = np.concatenate([np.asarray(level) for level in all_anchors(maps)])
    for (x, y, w, h), best in zip(index.boxes, got, strict=True):
        box = np.array([x, y, min(x + w, 50), min(y + h, 40)]) * np.tile([width / 50, height / 40], 2)
        inter = np.clip(np.minimum(anchors[:, 2:], box[2:]) - np.maximum(anchors[:, :2], box[:2]), 0, None).prod(1)
        areas = (anchors[:, 2:] - anchors[:, :2]).prod(1) + (box[2:] - box[:2]).prod()
        assert best == pytest.approx((inter / (areas - inter)).max(), rel=1e-5)


def test_the_score_fills_in_what_may_be_missing(run):
    found = dataset()
    for annotation in found["annotations"]:
        del annotation["area"], annotation["iscrowd"]
    found["annotations"][0]["id"] = 0  # which pycocotools takes for no annotation
    found["annotations"][2]["segmentation"] = []
    code, said = run(found, "--score")
    assert code == 0
    assert "bbox AP 1.000000\n" in said
    assert "segm AP 1.000000\n" in said
    assert "segm: 1 annotations without a mask are left out" in said


def test_the_score_names_what_cannot_be_found_or_read(run):
    assert "not found: annotation 2" in run(changed(2, bbox=[3, 3, 0, 0]), "--score")[1]
    cut = {"size": [40, 50], "counts": "o"}
    code, said = run(changed(2, segmentation=cut), "--score")
    assert code == 1
    assert "segm: Annotation 2: The compressed run lengths of a mask are cut short" in said


def test_the_picture_says_which_images_it_lacks(run, tmp_path):
    found = dataset()
    found["images"].append({"id": 9, "file_name": "9.png", "height": 40, "width": 50})
    code, said = run(found, "--picture", str(tmp_path / "drawn.png"))
    assert code == 1
    assert "without 9.png: " in said
    assert np.asarray(Image.open(tmp_path / "drawn.png")).any()
    with pytest.raises(UserError, match=r"drawn\.nothing cannot be written: unknown file extension"):
        run(dataset(), "--picture", str(tmp_path / "drawn.nothing"))


def test_exif_tags_are_counted_and_said(run, tmp_path):
    found = dataset(images=[{"id": i, "file_name": f"{i}.jpg", "height": 40, "width": 50} for i in (1, 2)])
    (tmp_path / "images").mkdir()
    for number, size in ((1, (40, 50)), (2, (50, 40))):
        exif = Image.Exif()
        exif[ORIENTATION] = 6
        Image.new("RGB", size).save(tmp_path / "images" / f"{number}.jpg", exif=exif)
    code, said = run(found)
    assert code == 0
    assert "1 are turned as their EXIF tag says, which the json agrees with: 1.jpg" in said
    assert (
        "1 have an EXIF tag that turns them, but the json is of them as they are stored: so are they read: 2.jpg"
        in said
    )


def test_files_of_floating_values_are_named(run, tmp_path):
    found = dataset()
    found["images"].append({"id": 9, "file_name": "9.tif", "height": 40, "width": 50})
    (tmp_path / "images").mkdir()
    Image.new("F", (50, 40)).save(tmp_path / "images" / "9.tif")
    code, said = run(found)
    assert code == 1
    assert "Training cannot start: files: 1 cannot be read: 9.tif (floating-point values" in said


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the shared data")
def test_real_data_pass(capsys, tmp_path):
    place = SHARED / "coco_open"
    options = ["--score", "--picture", str(tmp_path / "drawn.jpg")]
    for split in ("train2017", "val2017"):
        annotations = place / "annotations" / f"instances_{split}.json"
        assert check.main(["--annotations", str(annotations), "--images", str(place / split), *options]) == 0
        assert "bbox AP 1.000000" in capsys.readouterr().out
