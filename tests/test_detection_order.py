"""The order of images of several shapes: a function of seed and update; every image once an epoch."""

import itertools
from collections import Counter

import numpy as np
import pytest

from simam_jax import DetectionPreprocessing, UserError
from simam_jax.data import buckets
from simam_jax.data.buckets import Draw

SHAPES = [[(8, 12), (12, 8), (8, 8)][i] for i in np.random.default_rng(0).integers(0, 3, 50)]


def first(count, batch_size=4, seed=1, start=0):
    order = buckets.training_order(SHAPES, batch_size, seed)
    return list(itertools.islice(order, start, start + count))


def test_a_batch_has_one_shape_and_every_epoch_shows_every_image_once():
    batches = first(100)
    assert all(len({SHAPES[place.index] for place in batch}) == 1 for batch in batches)
    shown = Counter(place for batch in batches for place in batch)
    assert max(shown.values()) == 1
    whole = [epoch for epoch in range(7) if sum(place.epoch == epoch for place in shown) == len(SHAPES)]
    assert whole == list(range(7))  # 400 images are 8 epochs, of which the last may wait for others of their shape


def test_no_image_waits_for_more_than_a_batch_of_its_shape():
    for step, batch in enumerate(first(100)):
        assert all(abs(place.epoch - 4 * step / len(SHAPES)) < 2 for place in batch)


def test_the_order_depends_on_the_seed_and_a_later_start_continues_it():
    assert first(10, start=5) == first(15)[5:]
    assert first(10, seed=2) != first(10)


def test_epochs_have_orders_of_their_own():
    orders = [tuple(buckets.permutation(50, 1, epoch)) for epoch in range(3)]
    assert len(set(orders)) == 3
    assert all(sorted(order) == list(range(50)) for order in orders)


@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_evaluation_shows_every_image_once_and_fills_up_the_last_batch_of_a_shape(batch_size):
    seen = []
    for places, real in buckets.evaluation_order(SHAPES, batch_size):
        assert len(places) == batch_size
        assert len({SHAPES[place.index] for place in places}) == 1
        assert set(places[real:]) <= set(places[:real])
        seen += places[:real]
    assert sorted(seen) == [Draw(0, i) for i in range(len(SHAPES))]


def test_shapes_that_few_images_have_take_a_larger_one():
    shapes = [(8, 12)] * 5 + [(8, 16)] * 4 + [(12, 8)] * 1
    assert buckets.merged(shapes, 1) == shapes
    assert Counter(buckets.merged(shapes, 4)) == {(8, 16): 4, (12, 12): 6}  # no other one holds a tall image
    assert Counter(buckets.merged(shapes, 5)) == {(12, 16): 10}
    assert set(buckets.merged(shapes, 100)) == {(12, 16)}
    for least in range(1, 12):
        for before, after in zip(shapes, buckets.merged(shapes, least), strict=True):
            assert before[0] <= after[0]
            assert before[1] <= after[1]


BUCKETS = {
    1: {(1344, 1344)},
    2: {(800, 1344), (1344, 800)},
    6: {(800, 1088), (800, 1216), (800, 1344), (1088, 800), (1216, 800), (1344, 800)},
    100: {(800, side) for side in range(832, 1345, 128)} | {(side, 800) for side in range(832, 1345, 128)},
}


@pytest.mark.parametrize("count", BUCKETS)
def test_with_any_number_of_buckets_images_fit_and_every_one_is_shown_once_an_epoch(count):
    how, sizes = DetectionPreprocessing(buckets=count), np.random.default_rng(1).integers(200, 600, (60, 2)).tolist()
    resized = [how.resized(*size) for size in sizes]
    shapes = [how.bucket(*size) for size in resized]
    assert set(shapes) <= BUCKETS[count]
    assert {how.bucket(800, 800), how.bucket(800, 1333), how.bucket(1333, 800)} <= BUCKETS[count]
    assert all(h <= height and w <= width for (h, w), (height, width) in zip(resized, shapes, strict=True))
    assert count == 100 or {how.bucket(*how.resized(100, w)) for w in range(20, 500)} == BUCKETS[count]

    shapes = buckets.merged(shapes, 4)
    batches = list(itertools.islice(buckets.training_order(shapes, 4, 1), 90))  # 6 epochs
    assert all(len({shapes[place.index] for place in batch}) == 1 for batch in batches)
    shown = Counter(place for batch in batches for place in batch)
    assert max(shown.values()) == 1
    assert all(sum(place.epoch == epoch for place in shown) == len(shapes) for epoch in range(4))
    assert list(itertools.islice(buckets.training_order(shapes, 4, 1), 40, 50)) == batches[40:50]


@pytest.mark.parametrize("count", [-2, 0, 3])
def test_a_wrong_number_of_buckets_is_an_error(count):
    with pytest.raises(UserError, match=f"buckets={count} must be 1, a square for all images, or an even number"):
        DetectionPreprocessing(buckets=count)
