"""One update: equal to the reference implementation's, the same on any number of devices, with statistics over the groups asked for."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import simam_jax
from configs import base
from simam_jax.classification import task
from simam_jax.classification.metrics import hits
from simam_jax.models import init_variables
from simam_jax.task import AXIS, MeanEvaluator
from simam_jax.training.optimizer import sgd
from simam_jax.training.state import create_state
from simam_jax.training.step import batch_sharded, check_divisible, make_eval_step, make_train_step, replicated

pytestmark = pytest.mark.usefixtures("quickly_compiled")

BATCH = 16


def settings(**changes):
    config = base.get_config()
    config.batch_size = BATCH
    config.model.bn_group_size = 0
    config.update_from_flattened_dict(changes)
    return config


def random_batch(seed: int, size: int = BATCH) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (size, 8, 8, 3), dtype=np.uint8)
    return {"image": images, "label": rng.integers(0, 10, size, dtype=np.int32)}


def train_step(model, optimizer, config, mesh, trainable=lambda _path: True):
    return make_train_step(
        functools.partial(task.loss, model, config),
        optimizer,
        lambda _: 0.1,
        mesh,
        trainable=trainable,
        micro_batches=config.optimizer.grad_accum_steps,
        ema_decay=config.ema_decay,
    )


@functools.cache
def fresh_variables(tiny_network, dtype):
    return jax.device_get(init_variables(tiny_network(dtype), jax.random.key(0)))


def run(tiny_network, mesh, config, *, steps=3, dtype="float64", reorder=None):
    """The metrics of some updates, and the state after them."""
    check_divisible(config, mesh.size)
    model = tiny_network(dtype, bn_group_size=config.model.bn_group_size, axis_name=AXIS)
    optimizer = sgd(config.optimizer, lambda _: 0.1)
    variables = fresh_variables(tiny_network, dtype)
    state = jax.device_put(create_state(variables, optimizer, seed=0, ema=bool(config.ema_decay)), replicated(mesh))
    step = train_step(model, optimizer, config, mesh)
    history = []
    for seed in range(steps):
        batch = random_batch(seed)
        if reorder is not None:
            batch = {name: x[reorder] for name, x in batch.items()}
        state, values = step(state, jax.device_put(batch, batch_sharded(mesh)))
        history.append(jax.device_get(values))
    return history, jax.device_get(state)


def assert_close(a, b, **tolerance):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **tolerance), a, b)


MIXED = {
    "classification.mixup_alpha": 0.4,
    "classification.cutmix_alpha": 1.0,
    "classification.label_smoothing": 0.1,
}


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    "changes",
    [
        {"model.bn_group_size": BATCH},  # synchronised
        pytest.param({"model.bn_group_size": 4}, marks=pytest.mark.slow),  # two of eight devices share a statistic
        {"model.bn_group_size": 4, "optimizer.grad_accum_steps": 2, "ema_decay": 0.5},
        pytest.param({"model.bn_group_size": 8, **MIXED}, marks=pytest.mark.slow),
    ],
)
def test_eight_devices_equal_one(changes, tiny_network, mesh_of):
    config = settings(**changes)
    one = run(tiny_network, mesh_of(1), config)
    eight = run(tiny_network, mesh_of(8), config)
    assert_close(one, eight, rtol=1e-11, atol=1e-13)


def test_synchronised_batch_norm_in_float32_is_the_same_on_eight_devices(tiny_network, mesh_of):
    config = settings(**{"model.bn_group_size": BATCH})
    one, _ = run(tiny_network, mesh_of(1), config, dtype="float32", steps=4)
    eight, _ = run(tiny_network, mesh_of(8), config, dtype="float32", steps=4)
    np.testing.assert_allclose([v["scalars"]["loss"] for v in one], [v["scalars"]["loss"] for v in eight], rtol=1e-5)


@pytest.mark.usefixtures("x64")
def test_micro_batches_see_their_own_statistics_and_make_one_update(tiny_network, mesh_of):
    """Two micro-batches of 8 with groups of 4 are the four groups of one batch of 16 whose rows are dealt alike."""
    dealt = np.arange(BATCH).reshape(-1, 2).T.reshape(-1)  # rows 0, 2, 4, ... are the first micro-batch
    groups = {"model.bn_group_size": 4}
    micro, state = run(tiny_network, mesh_of(2), settings(**groups | {"optimizer.grad_accum_steps": 2}), steps=2)
    whole, expected = run(tiny_network, mesh_of(1), settings(**groups), steps=2, reorder=dealt)
    assert_close(micro, whole, rtol=1e-10)
    assert_close(state.variables["params"], expected.variables["params"], rtol=1e-10, atol=1e-14)


@pytest.mark.usefixtures("x64")
def test_the_ema_is_the_average_of_the_states(tiny_network, mesh_of):
    _, start = run(tiny_network, mesh_of(1), settings(ema_decay=0.75), steps=0)
    _, after = run(tiny_network, mesh_of(1), settings(ema_decay=0.75), steps=1)
    expected = jax.tree.map(lambda a, b: 0.75 * a + 0.25 * b, start.variables, after.variables)
    assert_close(after.ema, expected, rtol=1e-12, atol=1e-15)


def test_gradients_meet_in_one_all_reduce_and_the_state_is_donated(tiny_network, mesh_of):
    mesh, config = mesh_of(8), settings()
    model = tiny_network(axis_name=AXIS)
    optimizer = sgd(config.optimizer, lambda _: 0.1)
    state = jax.device_put(
        create_state(init_variables(model, jax.random.key(0)), optimizer, seed=0, ema=False), replicated(mesh)
    )
    batch = jax.device_put(random_batch(0), batch_sharded(mesh))
    text = train_step(model, optimizer, config, mesh).lower(state, batch).compile().as_text()
    assert 1 <= text.count(" all-reduce(") <= 2
    assert "input_output_alias" in text


@pytest.mark.usefixtures("x64", "fully_compiled")
def test_the_losses_of_the_reference_implementation_s_updates(mesh_of):
    """SGD on the golden case, through the real update: normalisation set to leave the golden images as they are."""
    from golden_cases import golden_images, golden_state, read_case

    from simam_jax.torch_weights.variables import from_torch

    case, _ = read_case("cifar-resnet20-basic-simam-0.0001")
    config = settings(
        **{"data.mean": (0.0, 0.0, 0.0), "data.std": (1 / 255, 1 / 255, 1 / 255), "batch_size": case["batch"]}
    )
    rate = case["sgd"]["lr"]
    optimizer = sgd(config.optimizer, lambda _: rate)
    model, variables = from_torch(golden_state(case["state_dict"]), "cifar_resnet20", dtype="float64")
    model = model.with_backbone(axis_name=AXIS)
    mesh = mesh_of(1)
    state = jax.device_put(create_state(variables, optimizer, seed=0, ema=False), replicated(mesh))
    step = train_step(model, optimizer, config, mesh)
    losses = []
    for s in range(len(case["sgd_losses"])):
        images, rng = golden_images(case, seed=500 + s)
        labels = rng.integers(0, case["num_classes"], case["batch"]).astype(np.int32)
        state, values = step(state, {"image": images, "label": labels})
        losses.append(float(values["scalars"]["loss"]))
    np.testing.assert_allclose(losses, case["sgd_losses"], rtol=1e-7)


def test_the_measures_of_an_evaluation_batch_are_those_of_its_images(tiny_network, mesh_of):
    mesh, config = mesh_of(8), settings()
    model = tiny_network()
    variables = init_variables(model, jax.random.key(1))
    batch = random_batch(5)
    step = make_eval_step(functools.partial(task.measure, model, config), mesh)
    outputs = jax.device_get(
        step(jax.device_put(variables, replicated(mesh)), jax.device_put(batch, batch_sharded(mesh)))
    )

    images = (batch["image"] / 255 - np.array(config.data.mean)) / np.array(config.data.std)
    logits = np.asarray(model.apply(variables, jnp.asarray(images, jnp.float32)))
    order = np.argsort(-logits, axis=1, kind="stable")
    found = order == batch["label"][:, None]
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
    expected = {"loss": np.asarray(losses), "top1": found[:, 0], "top5": found[:, :5].any(1)}
    assert_close(outputs, expected, rtol=1e-5)

    evaluator = MeanEvaluator()
    for rows in (slice(0, 11), slice(11, 16)):
        evaluator.add({name: x[rows] for name, x in outputs.items()})
    assert evaluator.scores()["top5"] == pytest.approx(expected["top5"].mean())


def test_ties_rank_by_index_and_nan_is_never_a_hit():
    logits = jnp.array([[1.0, 1.0, 0.0], [1.0, 1.0, 0.0], [jnp.nan, 0.0, 0.0]])
    found = hits(logits, jnp.array([0, 1, 0]))
    assert found["top1"].tolist() == [True, False, False]
    assert found["top5"].tolist() == [True, True, False]


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("micro_batches", [1, 2])
def test_frozen_parameters_have_no_gradient_no_optimizer_state_and_never_change(micro_batches, tiny_network, mesh_of):
    """Those of the first stage, with an average of the variables and a decay that would move them."""

    def trainable(path):
        return not path[0].startswith("layer1")

    mesh = mesh_of(2)
    config = settings(**{"optimizer.weight_decay": 0.1, "ema_decay": 0.9, "optimizer.grad_accum_steps": micro_batches})
    model, optimizer = tiny_network("float64", axis_name=AXIS), sgd(config.optimizer, lambda _: 0.1)
    variables = fresh_variables(tiny_network, "float64")
    state = create_state(variables, optimizer, seed=0, ema=True, trainable=trainable)
    momentum = [path for path, _ in jax.tree_util.tree_leaves_with_path(state.opt_state)]
    assert momentum
    assert not [path for path in momentum if "layer1" in jax.tree_util.keystr(path)]
    state = jax.device_put(state, replicated(mesh))
    step = train_step(model, optimizer, config, mesh, trainable)
    for seed in range(2):
        state, values = step(state, jax.device_put(random_batch(seed), batch_sharded(mesh)))
    moved = jax.tree.map(
        lambda a, b: bool(np.any(a != b)), jax.device_get(state.variables["params"]), variables["params"]
    )
    average = jax.tree.map(lambda a, b: bool(np.any(a != b)), jax.device_get(state.ema["params"]), variables["params"])
    for tree in (moved, average):
        for name, module in tree.items():
            assert jax.tree.all(module) if trainable((name,)) else not any(jax.tree.leaves(module)), name
    assert np.isfinite(values["scalars"]["grad_norm"])


@pytest.mark.parametrize(
    ("changes", "devices", "message"),
    [
        ({"batch_size": 30}, 8, "batch_size=30 does not divide over 8 devices.*such as 24 or 32"),
        ({"batch_size": 4}, 8, "multiple of 8, such as 8"),
        ({"batch_size": 8, "classification.mixup_alpha": 0.1}, 8, "pairs"),
        ({"model.bn_group_size": 3}, 2, "Possible: 0 .*, 1, 2, 4, 8, 16"),
        ({"model.bn_group_size": 6}, 8, "Possible: 0 .*, 1, 2, 4, 8, 16"),
    ],
)
def test_what_cannot_be_divided_is_an_error_that_names_what_can(changes, devices, message):
    config = settings(**changes)

    def check():
        check_divisible(config, devices)
        task.check_groups(config, devices)

    with pytest.raises(simam_jax.UserError, match=message):
        check()
