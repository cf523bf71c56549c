"""The loop in this process: what it refuses, how it stops, where it starts from; and every recipe."""

import importlib
from pathlib import Path

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict
from processes import pictures

import simam_jax
from configs import base, digits_resnet20_simam
from simam_jax import checkpoints, models
from simam_jax.data import digit_scenes
from simam_jax.models import mobilenet_v2
from simam_jax.tasks import make_task
from simam_jax.training import evaluation, loop
from simam_jax.training.run import build, initial_state
from simam_jax.training.state import create_state
from simam_jax.training.step import batch_sharded

pytestmark = pytest.mark.usefixtures("quickly_compiled")

RECIPES = sorted(p.stem for p in Path("configs").glob("*.py") if p.stem not in ("__init__", "base", "fields"))


def small(**changes):
    """A run of two updates on noise."""
    config = digits_resnet20_simam.get_config()
    config.update_from_flattened_dict(
        {
            "data.source": "synthetic",
            "data.image_size": 8,
            "data.crop_padding": 1,
            "batch_size": 8,
            "model.bn_group_size": 8,
            "num_steps": 2,
            "log_every_steps": 1,
            "eval_every_epochs": 0.0,
            "eval_batch_size": 512,
            "compilation_cache_dir": "",
        }
        | changes
    )
    return config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model.name": "cifar_resnett20"}, "Unknown model 'cifar_resnett20'. Did you mean 'cifar_resnet20'"),
        ({"model.attention": "siman"}, "Unknown attention 'siman'. Did you mean 'simam'"),
        ({"model.dtype": "float31"}, "Unknown dtype 'float31'. Did you mean 'float32'"),
        ({"data.source": "digit"}, "digits"),
        ({"data.source": "tfds", "data.name": "cifar1"}, "cifar10"),
        ({"batch_size": 12}, "does not divide over 8 devices"),
        ({"num_steps": 0, "num_epochs": 0.0}, "make no update"),
        ({"profile_steps": "ten"}, "FIRST:LAST"),
        ({"init_from": "nowhere.pth"}, "nowhere.pth"),
        ({"visualize_every_epochs": 1.0, "model.attention": "se"}, "draws SimAM's weights.*attention=se"),
    ],
)
def test_a_wrong_setting_is_one_message(changes, message, tmp_path):
    with pytest.raises(simam_jax.UserError, match=message):
        loop.train(small(**changes), str(tmp_path), make_task)
    assert not list(tmp_path.rglob("*.orbax*"))


def test_a_misspelt_field_is_refused():
    with pytest.raises(AttributeError, match="batch_size"):
        base.get_config().batch_siz = 3


def test_what_follows_a_recipe_s_name_chooses_the_model():
    module = importlib.import_module("configs.cifar10_resnet20_simam")
    config = module.get_config("model=cifar_preresnet56,attention=se")
    assert (config.model.name, config.model.attention) == ("cifar_preresnet56", "se")
    with pytest.raises(simam_jax.UserError, match=r"Did you mean 'attention=...'"):
        module.get_config("atention=se")


@pytest.fixture
def shallow(monkeypatch):
    """Networks have one block in every stage."""
    full = models.create_model

    def create(*args, **kwargs):
        model = full(*args, **kwargs)
        sizes = getattr(model.backbone, "stage_sizes", ())
        return model.with_backbone(stage_sizes=(1,) * len(sizes)) if sizes else model

    monkeypatch.setattr(models, "create_model", create)


@pytest.mark.usefixtures("shallow")
def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    changes = {"num_steps": 9, "schedule.learning_rate": 1e30, "schedule.warmup_epochs": 0.0, "log_every_steps": 9}
    with pytest.raises(simam_jax.UserError, match=r"In update \d the loss is .*learning_rate.*no checkpoint yet"):
        loop.train(small(**changes), str(tmp_path), make_task)
    assert checkpoints.newest_step(checkpoints.folder(tmp_path)) is None


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("trained")
    loop.train(small(visualize_every_epochs=1 / 1600), str(workdir), make_task)  # each update
    return workdir


def test_the_attention_is_drawn_for_tensorboard(trained):
    first, second = (pictures(trained, "attention")[step] for step in (1, 2))
    assert first.shape == second.shape
    height, width, _ = first.shape
    assert width > height > 400  # four images, one below the other; ten panels side by side
    assert (first != second).any()  # the weights have moved


def test_a_workdir_of_another_model_is_refused_and_stays(trained):
    for mode in (loop.train, evaluation.evaluate_checkpoint):
        with pytest.raises(simam_jax.UserError, match="of another model"):
            mode(small(**{"model.attention": "none"}), str(trained), make_task)
    assert checkpoints.newest_step(checkpoints.folder(trained)) == 2


def test_fine_tuning_starts_from_the_weights_with_a_new_head_on_request(trained):
    _, variables = simam_jax.load(trained)
    state = initial_state(build(small(init_from=str(trained)), make_task))
    jax.tree.map(np.testing.assert_array_equal, state.variables, variables)
    assert int(state.step) == 0

    other = small(init_from=str(trained), init_skip_head=True, seed=1)
    fresh = initial_state(build(small(seed=1), make_task)).variables
    state = initial_state(build(other, make_task))
    body = {name: value for name, value in state.variables["params"].items() if name != "fc"}
    jax.tree.map(np.testing.assert_array_equal, body, {name: variables["params"][name] for name in body})
    jax.tree.map(np.testing.assert_array_equal, state.variables["params"]["fc"], fresh["params"]["fc"])


def test_weights_that_do_not_fit_are_listed(trained):
    with pytest.raises(simam_jax.UserError, match=r"do not fit cifar_resnet32.*missing batch_stats/layer1_3.*more"):
        initial_state(build(small(init_from=str(trained), **{"model.name": "cifar_resnet32"}), make_task))


def test_fine_tuning_starts_from_a_file_of_pytorch(tmp_path, trained):
    from simam_jax.torch_weights.files import write_state
    from simam_jax.torch_weights.names import to_torch

    _, variables = simam_jax.load(trained)
    path = tmp_path / "weights.npz"
    write_state(to_torch(variables, "cifar_resnet20"), path)
    state = initial_state(build(small(init_from=str(path)), make_task))
    jax.tree.map(np.testing.assert_array_equal, state.variables, variables)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    """A few digit scenes, prepared."""
    folder = str(tmp_path_factory.mktemp("scenes"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(digit_scenes, "NUM_SCENES", {"train": 16, "test": 8})
        digit_scenes.open_scenes(ConfigDict({"data_dir": folder}), "train")
    return folder


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_builds_and_its_update_keeps_the_state_s_form(recipe, scenes):
    """At full size, traced and not run."""
    config = importlib.import_module(f"configs.{recipe}").get_config()
    source = "synthetic" if config.task == "classification" else "digit_scenes"
    config.update_from_flattened_dict({"data.source": source, "data.data_dir": scenes, "compilation_cache_dir": ""})
    base.check(config)
    run = build(config, make_task)
    (row,) = run.task.example
    batch = {name: jax.ShapeDtypeStruct((config.batch_size, *x.shape), x.dtype) for name, x in row.items()}
    made = {"seed": 0, "ema": bool(config.ema_decay), "trainable": run.task.trainable}
    state = jax.eval_shape(lambda v: create_state(v, run.optimizer, **made), run.task.shapes())
    after, values = jax.eval_shape(run.train_step(), state, batch)
    assert jax.tree.all(jax.tree.map(lambda a, b: (a.shape, a.dtype) == (b.shape, b.dtype), state, after))
    assert values["scalars"]["loss"].dtype == np.float32


@pytest.mark.slow  # ten programs to compile
@pytest.mark.usefixtures("shallow")
@pytest.mark.parametrize("recipe", [name for name in RECIPES if "rcnn" not in name])  # these: test_detection_task
def test_an_update_of_every_recipe_moves_every_parameter(recipe, monkeypatch):
    """At a small size and with one block in every stage; the golden files hold for the whole networks."""
    monkeypatch.setattr(mobilenet_v2, "STAGES", [(*shape, 1, stride) for *shape, _, stride in mobilenet_v2.STAGES])
    config = importlib.import_module(f"configs.{recipe}").get_config()
    small = {"data.source": "synthetic", "data.image_size": 32, "batch_size": 16, "model.bn_group_size": 4}
    config.update_from_flattened_dict(small | {"compilation_cache_dir": ""})
    run = build(config, make_task)
    state = initial_state(run)
    before = jax.device_get(state.variables["params"])
    step = run.train_step()
    for batch, _ in zip(run.task.train_batches(0), range(2), strict=False):  # the rate of a warm-up may begin at zero
        state, values = step(state, jax.device_put(batch, batch_sharded(run.mesh)))
    assert np.isfinite(values["scalars"]["loss"])
    moved = jax.tree.map(lambda a, b: bool(np.any(a != b)), before, jax.device_get(state.variables["params"]))
    assert jax.tree.all(moved)
