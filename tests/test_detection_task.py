"""A detector in the loop: its update on any number of devices, its batches, what it reports and what it refuses."""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from configs import base, digit_scenes_mask_rcnn
from simam_jax import UserError
from simam_jax.data import digit_scenes
from simam_jax.detection import task as detection
from simam_jax.training.optimizer import sgd
from simam_jax.training.state import create_state
from simam_jax.training.step import batch_sharded, make_eval_step, make_train_step, replicated

pytestmark = pytest.mark.usefixtures("quickly_compiled")


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    """A small data set of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(digit_scenes, "NUM_SCENES", {"train": 24, "test": 8})
        config = config_of(tmp_path_factory.mktemp("scenes"))
        detection.make_task(config)
    return config.data.data_dir


def config_of(data_dir, **changes):
    config = digit_scenes_mask_rcnn.get_config()
    config.data.data_dir = str(data_dir)
    config.visualize_every_epochs = 0.0
    config.update_from_flattened_dict(changes)
    return config


FROZEN = {"detection.batch_norm": "frozen", "detection.frozen_stages": 1}


@pytest.fixture(scope="module")
def frozen_task(scenes):
    return detection.make_task(config_of(scenes, **FROZEN))


def one_update(task, devices, batch):
    mesh = Mesh(jax.devices()[:devices], ("data",))
    config = base.get_config()
    rate = lambda _step: jnp.float32(0.01)  # noqa: E731
    step = make_train_step(task.loss, sgd(config.optimizer, rate), rate, mesh, trainable=task.trainable)
    variables = task.init(jax.random.key(0))
    state = create_state(variables, sgd(config.optimizer, rate), seed=0, ema=False, trainable=task.trainable)
    state, values = step(jax.device_put(state, replicated(mesh)), jax.device_put(batch, batch_sharded(mesh)))
    return jax.device_get((state.variables, values)), jax.device_get(variables)


@pytest.mark.slow
def test_eight_devices_make_the_update_of_one(frozen_task):
    batch = next(frozen_task.train_batches(0))
    (one, values_of_one), before = one_update(frozen_task, 1, batch)
    (eight, values_of_eight), _ = one_update(frozen_task, 8, batch)
    for part, scalars in values_of_one.items():
        for name, value in scalars.items():
            np.testing.assert_allclose(values_of_eight[part][name], value, rtol=2e-5, err_msg=name)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6), eight, one)
    # Statistics and the first stage are frozen to the bit, all else has moved.
    jax.tree.map(np.testing.assert_array_equal, one["batch_stats"], before["batch_stats"])
    for name, stage in one["params"]["backbone"].items():
        same = jax.tree.map(np.array_equal, stage, before["params"]["backbone"][name])
        frozen = name in ("conv1", "bn1") or name.startswith("layer1")
        assert all(jax.tree.leaves(same)) if frozen else not any(jax.tree.leaves(same)), name


@pytest.mark.slow
def test_the_evaluation_finds_the_same_on_eight_devices(frozen_task):
    batch = next(frozen_task.eval_batches())
    assert batch["mask"].tolist() == [1.0] * 8 + [0.0] * 8
    variables = frozen_task.init(jax.random.key(1))
    found = []
    for devices in (1, 8):
        mesh = Mesh(jax.devices()[:devices], ("data",))
        on_devices = jax.device_put(batch, batch_sharded(mesh))
        found.append(jax.device_get(make_eval_step(frozen_task.measure, mesh)(variables, on_devices)))
    np.testing.assert_array_equal(found[0]["count"], found[1]["count"])
    np.testing.assert_allclose(found[0]["boxes"], found[1]["boxes"], atol=1e-3)
    assert found[0]["masks"].shape == (16, 100, 28, 28)
    evaluator = frozen_task.evaluator()
    evaluator.add(jax.tree.map(lambda x: x[:8], found[0]))
    assert "box AP" in frozen_task.describe(evaluator.scores())
    assert frozen_task.best in evaluator.scores()


def test_batches_continue_where_they_stopped_and_are_as_announced(frozen_task):
    whole = list(itertools.islice(frozen_task.train_batches(0), 5))
    later = next(frozen_task.train_batches(4))
    jax.tree.map(np.testing.assert_array_equal, later, whole[4])
    (announced,) = frozen_task.example
    assert {name: (x.shape[1:], x.dtype) for name, x in later.items()} == {
        name: (x.shape, np.dtype(x.dtype)) for name, x in announced.items()
    }
    assert frozen_task.images_of(4).count("scene ") == 8


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model.name": "resnet18"}, "resnet18 is no detector"),
        ({"detection.frozen_stages": 1}, "frozen_stages=1 freezes: set it to 0"),
        (FROZEN | {"detection.images_per_group": 3}, "images_per_group=3 does not divide"),
        ({"data.source": "digits"}, "Unknown config.data.source of a detector 'digits'"),
    ],
)
def test_what_cannot_be_done_is_one_message(scenes, changes, message):
    with pytest.raises(UserError, match=message):
        detection.make_task(config_of(scenes, **changes))


def test_the_spec_is_all_that_a_reader_needs(frozen_task):
    spec = frozen_task.spec
    assert spec["class_names"] == list("0123456789")
    assert spec["category_ids"] == list(range(10))
    assert spec["preprocessing"]["min_size"] == 128
    assert spec["model"]["name"] == "mask_rcnn_tiny_fpn"


@pytest.mark.slow
def test_pictures_show_the_truth_beside_what_was_found(scenes):
    task = detection.make_task(config_of(scenes, visualize_every_epochs=1.0))
    drawn = task.pictures(task.init(jax.random.key(0)))
    assert list(drawn) == [f"detections/{i}" for i in range(4)]
    assert all(picture.shape == (1, 480, 960, 3) and picture.dtype == np.uint8 for picture in drawn.values())
