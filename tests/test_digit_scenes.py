"""Digit scenes: deterministic, known exactly, and without anything of the training scenes in those for the test."""

import io

import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

from simam_jax.data import digit_scenes, digits
from simam_jax.data.detection_sources import open_examples


def opened(folder, split):
    config = ConfigDict({"source": "digit_scenes", "data_dir": str(folder)})
    return open_examples(config, split, masks=True)


@pytest.fixture
def few(monkeypatch):
    monkeypatch.setattr(digit_scenes, "NUM_SCENES", {"train": 12, "test": 6})


@pytest.mark.usefixtures("few")
@pytest.mark.parametrize("split", ["train", "eval"])
def test_boxes_are_what_is_seen_of_each_digit(tmp_path, split):
    examples = opened(tmp_path, split)
    assert len(examples) == (12 if split == "train" else 6)
    for index in range(len(examples)):
        example = examples.read(index)
        masks = example.masks()
        assert 1 <= len(masks) == len(example.labels) <= examples.most_objects
        assert masks.sum(0).max() == 1  # a pixel shows one digit
        for mask, (x1, y1, x2, y2) in zip(masks, example.boxes.astype(int), strict=True):
            rows, columns = np.nonzero(mask)
            assert (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1) == (x1, y1, x2, y2)
        assert Image.open(io.BytesIO(example.image)).size == (128, 128)
    of_truth = examples.annotations()
    assert len(of_truth) == sum(len(examples.read(i).labels) for i in range(len(examples)))
    assert {a["area"] for a in of_truth} == {
        int(m.sum()) for i in range(len(examples)) for m in examples.read(i).masks()
    }


@pytest.mark.usefixtures("few")
def test_preparing_them_again_gives_the_same(tmp_path):
    first, second = opened(tmp_path / "a", "train"), opened(tmp_path / "b", "train")
    assert [first.read(i).image for i in range(12)] == [second.read(i).image for i in range(12)]


def test_the_test_shows_other_digits_on_other_parts_of_the_photographs():
    _, _, test = digits.load_split()
    shown = {}
    for split in ("train", "test"):
        images, _, _ = digits.load_split()
        chosen = np.flatnonzero(test if split == "test" else ~test)
        drawn = [
            digit_scenes.scene(np.random.default_rng(i), images[..., 0], chosen, digit_scenes._backgrounds(split))[2]
            for i in range(20)
        ]
        shown[split] = {digit for each in drawn for digit in each}
    assert not shown["train"] & shown["test"]
    for train, held in zip(digit_scenes._backgrounds("train"), digit_scenes._backgrounds("test"), strict=True):
        assert train.shape[1] + held.shape[1] == 640
        assert held.shape[1] >= digit_scenes.SIZE


def test_no_digit_is_mostly_hidden():
    images, _, test = digits.load_split()
    for seed in range(20):
        rng = np.random.default_rng(seed)
        _, instances, shown = digit_scenes.scene(
            rng, images[..., 0], np.flatnonzero(test), digit_scenes._backgrounds("test")
        )
        assert sorted(set(instances.reshape(-1)) - {0}) == list(range(1, len(shown) + 1))
