"""COCO's jsons: what pycocotools reads from them, what training sees, and one message for each that is wrong."""

import contextlib
import io
import json
import os
from pathlib import Path

import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image
from pycocotools import mask as mask_utils
from pycocotools.coco import COCO

from simam_jax import UserError
from simam_jax.data import coco_index, coco_masks
from simam_jax.data.detection_sources import open_examples

SHARED = Path(__file__).parents[2] / "shared" / "data"
POLYGON = [[2.0, 3.0, 20.0, 4.0, 15.0, 25.5]]
BITMAP = np.zeros((30, 40), np.uint8)
BITMAP[3:20, 5:33] = 1
COMPRESSED = {"size": [30, 40], "counts": mask_utils.encode(np.asfortranarray(BITMAP))["counts"].decode()}
CHANGES = np.flatnonzero(np.diff(np.concatenate(([0], BITMAP.T.reshape(-1))))).tolist()
PLAIN = {"size": [30, 40], "counts": np.diff([0, *CHANGES, 1200]).tolist()}


def annotation(number, image=7, category=5, **changes):
    made = {"id": number, "image_id": image, "category_id": category, "bbox": [2, 3, 18, 22], "area": 200, "iscrowd": 0}
    return made | {"segmentation": POLYGON} | changes


def dataset(**changes):
    return {
        "images": [
            {"id": 7, "file_name": "a.png", "height": 40, "width": 50},
            {"id": 2, "file_name": "deep/b.png", "height": 40, "width": 50},
        ],
        "categories": [{"id": 9, "name": "dog"}, {"id": 5, "name": "cat"}],
        "annotations": [annotation(1), annotation(2, image=2, category=9), annotation(3)],
    } | changes


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def written(tmp_path):
    """Writes a json and its images; returns the config that names them."""

    def write(found, name="x.json"):
        (tmp_path / name).write_text(found if isinstance(found, str) else json.dumps(found))
        (tmp_path / "images" / "deep").mkdir(parents=True, exist_ok=True)
        for file in ("a.png", "deep/b.png"):
            Image.new("RGB", (50, 40)).save(tmp_path / "images" / file)
        fields = {"source": "coco", "data_dir": ""}
        for split in ("train", "eval"):
            fields |= {f"{split}_split": "", f"{split}_annotations": str(tmp_path / name)}
            fields |= {f"{split}_images": str(tmp_path / "images")}
        return ConfigDict(fields)

    return write


def test_labels_are_the_categories_in_the_jsons_order(written):
    examples = open_examples(written(dataset()), "train", masks=True)
    assert examples.class_names == ("dog", "cat")
    assert examples.category_ids.tolist() == [9, 5]
    assert examples.image_ids.tolist() == [7, 2]
    first, second = examples.read(0), examples.read(1)
    assert first.labels.tolist() == [1, 1]
    assert second.labels.tolist() == [0]
    np.testing.assert_array_equal(second.boxes, np.array([[2, 3, 20, 25]], np.float32))
    assert first.masks().shape == (2, 40, 50)
    assert examples.most_objects == 2


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"iscrowd": 1}, "1 annotations of a crowd"),
        ({"ignore": 1}, "1 annotations marked to be ignored"),
        ({"category_id": 77}, "1 annotations of a category that is not listed"),
        ({"area": 0}, "1 annotations without an area"),
        ({"bbox": [1, 1, 0.5, 9]}, "1 annotations without an area"),
        ({"bbox": [50, 1, 5, 9]}, "1 annotations outside the image"),
    ],
)
def test_what_cannot_be_learned_from_is_left_out_and_counted(written, change, reason, caplog):
    config = written(dataset(annotations=[annotation(1), annotation(2, image=2, **change)]))
    with caplog.at_level("WARNING"):
        examples = open_examples(config, "train", masks=False)
    assert reason in caplog.text
    if "category_id" in change:
        assert "1 images without annotations" in caplog.text
        assert examples.image_ids.tolist() == [7]
    else:  # the image itself stays, as one without objects
        assert examples.image_ids.tolist() == [7, 2]
        assert len(examples.read(1).labels) == 0


def test_corners_given_as_sizes_are_warned_of(written, caplog):
    boxes = [[20, 10, 48, 38], [30, 10, 45, 30], [10, 20, 45, 39]]
    with caplog.at_level("WARNING"):
        open_examples(
            written(dataset(annotations=[annotation(i, bbox=box) for i, box in enumerate(boxes)])), "train", masks=False
        )
    assert "the boxes look like x y x y, where COCO has x y width height" in caplog.text


def test_small_and_empty_images_are_left_out_of_training_alone(written):
    found = dataset(annotations=[annotation(1)])
    found["images"].append({"id": 3, "file_name": "a.png", "height": 31, "width": 50})
    found["annotations"].append(annotation(9, image=3))
    config = written(found)
    assert open_examples(config, "train", masks=False).image_ids.tolist() == [7]
    assert open_examples(config, "eval", masks=False).image_ids.tolist() == [7, 2, 3]


@pytest.mark.parametrize("segmentation", [POLYGON, COMPRESSED, PLAIN], ids=["polygon", "compressed", "plain"])
def test_masks_are_pycocotools(segmentation):
    wanted = mask_utils.decode(mask_utils.merge(mask_utils.frPyObjects(POLYGON, 30, 40)))
    wanted = wanted if segmentation is POLYGON else BITMAP
    np.testing.assert_array_equal(coco_masks.mask_of(segmentation, 30, 40), wanted.astype(bool))


def test_compressed_run_lengths_of_any_mask_are_accepted_and_none_that_is_cut_short():
    rng = np.random.default_rng(0)
    for height, width, share in ((1, 1, 0.5), (30, 40, 0.0), (30, 40, 1.0), (200, 300, 0.5), (700, 900, 0.001)):
        bitmap = rng.uniform(size=(height, width)) < share
        counts = mask_utils.encode(np.asfortranarray(bitmap, np.uint8))["counts"]
        np.testing.assert_array_equal(
            coco_masks.mask_of({"size": [height, width], "counts": counts}, height, width), bitmap
        )
        for length in range(min(len(counts), 50)):
            with pytest.raises(UserError, match=r"cut short|do not add up"):
                coco_masks.mask_of({"size": [height, width], "counts": counts[:length].decode()}, height, width)


WRONG = {
    "no json": ("{", "cannot be read as JSON"),
    "a list": ("[]", "is no COCO json"),
    "no images": (json.dumps({"categories": [], "annotations": []}), "is no COCO json"),
    "no categories": (dataset(categories=[]), "has no categories"),
    "two categories of one id": (dataset(categories=[{"id": 5, "name": "a"}, {"id": 5, "name": "b"}]), "category id 5"),
    "two categories of one name": (
        dataset(categories=[{"id": 5, "name": "a"}, {"id": 6, "name": "a"}]), "category name 'a' stands there 2 times",
    ),
    "two images of one id": (dataset(images=dataset()["images"][:1] * 2), "image id 7 stands there 2 times"),
    "two annotations of one id": (dataset(annotations=[annotation(1), annotation(1)]), "annotation id 1"),
    "an unknown image": (dataset(annotations=[annotation(1, image=8)]), "1 annotations are of images .* image 8"),
    "an image without a size": (dataset(images=[{"id": 7, "file_name": "a.png"}]), r"missing required field `height` - at `\$\.images\[0\]`"),
    "an image without a file": (dataset(images=[{"id": 7, "height": 4, "width": 4}]), "image 7 has no file_name"),
    "an id that is text": (dataset(annotations=[annotation("1")]), r"Expected `int`, got `str` - at `\$\.annotations\[0\]\.id`"),
    "a box of three": (dataset(annotations=[annotation(1, bbox=[1, 2, 3])]), r"of length 4 - at `\$\.annotations\[0\]\.bbox`"),
    "a box of nothing": (dataset(annotations=[annotation(1, bbox=[1, 2, 3, float("nan")])]), "NaN and Infinity are no numbers of JSON"),
    "an image without pixels": (
        dataset(images=[{"id": 7, "file_name": "a.png", "height": 0, "width": 4}]), "image 7 is of 4 x 0 pixels",
    ),
    "a file that is not there": (
        dataset(images=[*dataset()["images"], {"id": 1, "file_name": "c.png", "height": 40, "width": 50}]),
        r"1 of 3 images .* are not in .*: c\.png\. Name their folder with --config\.data\.train_images",
    ),
    "masks that are not there": (
        dataset(annotations=[annotation(1, segmentation=[])]), "1 annotations have no segmentation.*take a Faster R-CNN",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_json_is_one_message(case, written):
    found, message = WRONG[case]
    with pytest.raises(UserError, match=message):
        open_examples(written(found), "train", masks=True)


@pytest.mark.parametrize(
    ("segmentation", "message"),
    [
        ({"size": [9, 9], "counts": [81]}, r"A mask is of \[9, 9\], and its image of \[40, 50\]"),
        ([[1.0, 2.0]], "A segmentation cannot be read"),
        ("mask.png", "A segmentation is str"),
        ([[1e9, 2.0, 3.0, 4.0, 5.0, 6.0]], "A polygon leaves its image of 50 x 40 pixels by far"),
        ({"size": [40, 50], "counts": [100]}, "do not add up to its 2000 pixels"),
        ({"size": [40, 50], "counts": []}, "do not add up"),
        ({"size": [40, 50], "counts": "PPPPo"}, "are cut short, or are none"),
        ({"size": [40, 50], "counts": "P~"}, "are cut short, or are none"),
        ({"size": [40, 50], "counts": ""}, "are cut short, or are none"),
        ({"size": [40, 50], "counts": "oooooooo0"}, "a number of more than 32 bits"),
        ({"size": [40, 50], "counts": "52"}, "do not add up to its 2000 pixels"),
    ],
)
def test_a_wrong_mask_is_an_error_of_its_image(segmentation, message, written):
    examples = open_examples(
        written(dataset(annotations=[annotation(1, segmentation=segmentation)])), "train", masks=True
    )
    with pytest.raises(UserError, match=message):
        examples.read(0).masks()


def test_a_polygon_that_is_no_number_is_an_error():
    with pytest.raises(UserError, match="or is not finite"):
        coco_masks.mask_of([[float("nan"), 2.0, 3.0, 4.0, 5.0, 6.0]], 40, 50)


def test_what_may_be_missing_is_filled_in_and_a_byte_order_mark_is_passed_over(written):
    bare = {"id": 1, "image_id": 7, "category_id": 5, "bbox": [2, 3, 18, 22], "area": None}
    config = written("\N{BYTE ORDER MARK}" + json.dumps(dataset(annotations=[bare, annotation(2, segmentation=[])])))
    index = coco_index.read_index(config.train_annotations)
    assert index.areas.tolist() == [396, 200]
    assert index.crowd.tolist() == index.ignore.tolist() == [False, False]
    assert [index.segmentation(a) for a in (0, 1)] == [None, None]


def test_files_and_folders_that_are_not_there_are_errors(written):
    config = written(dataset())
    for name, value, message in (
        ("train_annotations", "nowhere.json", "There is no file of annotations"),
        ("train_images", "nowhere", "There is no folder of images"),
        ("train_annotations", "", r"needs --config\.data\.data_dir"),
    ):
        changed = config.copy_and_resolve_references()
        changed[name] = value
        with pytest.raises(UserError, match=message):
            open_examples(changed, "train", masks=True)
    config.source = "tfrecords"
    with pytest.raises(UserError, match=r"Unknown config\.data\.source of a detector 'tfrecords'"):
        open_examples(config, "train", masks=True)


def test_the_index_is_kept_until_the_json_changes(written, tmp_path, monkeypatch):
    config = written(dataset())
    first = coco_index.read_index(config.train_annotations)
    monkeypatch.setattr(coco_index, "_parsed", lambda _path: pytest.fail("it was read again"))
    second = coco_index.read_index(config.train_annotations)
    for name, value in vars(first).items():
        np.testing.assert_array_equal(value, getattr(second, name), err_msg=name)
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    kept = Path(config.train_annotations)
    times = kept.stat().st_atime_ns, kept.stat().st_mtime_ns
    kept.write_text(json.dumps(dataset(categories=[{"id": 9, "name": "cow"}, {"id": 5, "name": "cat"}])))
    os.utime(kept, ns=times)
    assert coco_index.read_index(config.train_annotations).class_names == ["cow", "cat"]
    (damaged,) = (
        path for path in (tmp_path / "cache").rglob("coco-*.npz") if "cow" in path.read_bytes().decode("latin1")
    )
    damaged.write_bytes(b"")
    assert coco_index.read_index(config.train_annotations).class_names == ["cow", "cat"]


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the shared data")
@pytest.mark.parametrize(
    "file", ["coco_open/annotations/instances_train2017.json", "coco_open/annotations/instances_val2017.json",
             "bccd/instances_train.json"],
)  # fmt: skip
def test_real_jsons_are_read_as_pycocotools_reads_them(file):
    index = coco_index.read_index(SHARED / file)
    with contextlib.redirect_stdout(io.StringIO()):
        theirs = COCO(SHARED / file)
    assert index.image_ids.tolist() == [image["id"] for image in theirs.dataset["images"]]
    image_of = index.image_of()
    assert len(index.boxes) == len(theirs.anns)
    for place, number in enumerate(index.annotation_ids.tolist()):
        wanted = theirs.anns[number]
        assert index.image_ids[image_of[place]] == wanted["image_id"]
        assert index.category_ids[index.labels[place]] == wanted["category_id"]
        assert index.boxes[place].tolist() == wanted["bbox"]
        assert index.crowd[place] == wanted["iscrowd"]
        if wanted.get("segmentation"):
            height, width = index.sizes[image_of[place]].tolist()
            np.testing.assert_array_equal(
                coco_masks.mask_of(index.segmentation(place), height, width), theirs.annToMask(wanted).astype(bool)
            )
