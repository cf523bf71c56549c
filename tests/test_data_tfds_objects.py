"""Boxes of TFDS data sets: those of a real builder with the features of coco/2017."""

import io
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from ml_collections import ConfigDict
from PIL import Image

import simam_jax
from simam_jax import UserError
from simam_jax.data.detection_sources import open_examples

SIZES = [(40, 50), (64, 32), (20, 100)]
# In pixels: x y width height; the label, whether it is a crowd.
OBJECTS = [[((5, 4, 20, 30), 3, False), ((0, 0, 50, 40), 79, True)], [((8, 16, 16, 32), 0, False)], []]
CLASSES = (Path(simam_jax.__file__).parent / "coco_classes.txt").read_text().splitlines()


class TinyObjects(tfds.core.GeneratorBasedBuilder):
    """Three images with the features of coco/2017."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = {
            "image": tfds.features.Image(encoding_format="jpeg"),
            "image/filename": tfds.features.Text(),
            "image/id": np.int64,
            "objects": tfds.features.Sequence(
                {
                    "area": np.int64,
                    "bbox": tfds.features.BBoxFeature(),
                    "id": np.int64,
                    "is_crowd": np.bool_,
                    "label": tfds.features.ClassLabel(names=CLASSES),
                }
            ),
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):  # noqa: ARG002
        return {"train": self._generate_examples(), "validation": self._generate_examples()}

    def _generate_examples(self):
        for i, ((height, width), objects) in enumerate(zip(SIZES, OBJECTS, strict=True)):
            file = io.BytesIO()
            Image.new("RGB", (width, height), (60 * i, 0, 0)).save(file, "JPEG")
            file.seek(0)
            found = [
                {
                    "area": w * h,
                    "bbox": tfds.features.BBox(y / height, x / width, (y + h) / height, (x + w) / width),
                    "id": 10 * i + k,
                    "is_crowd": crowd,
                    "label": label,
                }
                for k, ((x, y, w, h), label, crowd) in enumerate(objects)
            ]
            yield i, {"image": file, "image/filename": f"{i}.jpg", "image/id": 100 + i, "objects": found}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("tfds"))
    TinyObjects(data_dir=folder).download_and_prepare()
    return folder


@pytest.fixture
def config(place, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    fields = {"source": "tfds", "name": "tiny_objects:1.*.*", "data_dir": place}
    return ConfigDict(fields | {"train_split": "train", "eval_split": "validation"})


def test_boxes_are_in_pixels_and_crowds_are_no_objects_of_training(config):
    for _ in ("first", "from the cache"):
        train, evaluation = (open_examples(config, split, masks=False) for split in ("train", "eval"))
        assert train.class_names == tuple(CLASSES)
        assert train.category_ids[[0, 3, 79]].tolist() == [1, 4, 90]
        assert (len(train), train.most_objects) == (2, 1)
        assert sorted(evaluation.image_ids.tolist()) == [100, 101, 102]
        for i in range(len(evaluation)):
            number, example = evaluation.image_ids[i] - 100, evaluation.read(i)
            assert example.size == SIZES[number]
            with Image.open(io.BytesIO(example.image)) as image:
                assert image.size == SIZES[number][::-1]
                assert abs(image.convert("RGB").getpixel((3, 3))[0] - 60 * number) < 5
            corners = [(x, y, x + w, y + h) for (x, y, w, h), _, _ in OBJECTS[number]]
            np.testing.assert_allclose(example.boxes, np.reshape(corners, (-1, 4)), atol=1e-4)
            assert example.labels.tolist() == [label for _, label, _ in OBJECTS[number]]
        for i in range(len(train)):
            wanted = [label for _, label, crowd in OBJECTS[train.image_ids[i] - 100] if not crowd]
            assert train.read(i).labels.tolist() == wanted


def test_the_ground_truth_is_in_cocos_form(config):
    found = {each["image_id"]: each for each in open_examples(config, "eval", masks=False).annotations()}
    assert found[101]["category_id"] == 1
    assert found[101]["bbox"] == pytest.approx([8, 16, 16, 32], abs=1e-4)
    assert (found[101]["area"], found[101]["iscrowd"], found[100]["iscrowd"]) == (512, 0, 1)


def test_what_cannot_be_used_is_an_error(config):
    with pytest.raises(UserError, match="TFDS data sets have no masks"):
        open_examples(config, "train", masks=True)
    for name, value, message in (
        ("train_split", "trian", "Did you mean 'train'"),
        ("name", "tiny_object", "Did you mean 'tiny_objects'"),
        ("name", "coco/2017", r"python -m simam_jax\.data\.prepare coco/2017 --data_dir"),
    ):
        changed = config.copy_and_resolve_references()
        changed[name] = value
        with pytest.raises(UserError, match=message):
            open_examples(changed, "train", masks=False)
    from simam_jax.data.tfds import prepared

    prepared("digits", config.data_dir)
    config.name = "digits"
    with pytest.raises(UserError, match="is no detection data set of COCO's form"):
        open_examples(config, "train", masks=False)
