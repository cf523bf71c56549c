"""One update: equal to the original's, the same on any number of devices, with statistics over the groups asked for."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import simam_jax
from configs import base
from simam_jax.training import metrics
from simam_jax.training.optimizer import sgd
from simam_jax.training.state import create_state, init_variables
from simam_jax.training.step import (
    AXIS,
    check_divisible,
    count_correct,
    make_eval_step,
    make_train_step,
    split_over,
    whole_on,
)

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


@functools.cache
def fresh_variables(tiny_network, dtype):
    return jax.device_get(init_variables(tiny_network(dtype), jax.random.key(0)))


def run(tiny_network, mesh, config, *, steps=3, dtype="float64", reorder=None):
    """The metrics of some updates, and the state after them."""
    check_divisible(config, mesh.size)
    model = tiny_network(dtype, bn_group_size=config.model.bn_group_size, axis_name=AXIS)
    optimizer = sgd(config.optimizer, lambda _: 0.1)
    variables = fresh_variables(tiny_network, dtype)
    state = jax.device_put(create_state(variables, optimizer, seed=0, ema=bool(config.ema_decay)), whole_on(mesh))
    step = make_train_step(model, optimizer, lambda _: 0.1, config, mesh)
    history = []
    for seed in range(steps):
        batch = random_batch(seed)
        if reorder is not None:
            batch = {name: x[reorder] for name, x in batch.items()}
        state, values = step(state, jax.device_put(batch, split_over(mesh)))
        history.append(jax.device_get(values))
    return history, jax.device_get(state)


def assert_close(a, b, **tolerance):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **tolerance), a, b)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    "changes",
    [
        {"model.bn_group_size": BATCH},  # synchronised
        {"model.bn_group_size": 4},  # two devices share a statistic where there are eight
        {"model.bn_group_size": 4, "optimizer.grad_accum_steps": 2, "ema_decay": 0.5},
        {"model.bn_group_size": 8, "mixup_alpha": 0.4, "cutmix_alpha": 1.0, "label_smoothing": 0.1},
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
    np.testing.assert_allclose([v["loss"] for v in one], [v["loss"] for v in eight], rtol=1e-5)


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
        create_state(init_variables(model, jax.random.key(0)), optimizer, seed=0, ema=False), whole_on(mesh)
    )
    batch = jax.device_put(random_batch(0), split_over(mesh))
    text = make_train_step(model, optimizer, lambda _: 0.1, config, mesh).lower(state, batch).compile().as_text()
    assert 1 <= text.count(" all-reduce(") <= 2
    assert "input_output_alias" in text


@pytest.mark.usefixtures("x64")
def test_the_losses_of_the_original_s_updates(mesh_of):
    """SGD on the golden case, through the real update: normalisation set to leave the golden images as they are."""
    from test_golden import golden_images, golden_state, read_case

    from simam_jax.convert import from_torch

    case, _ = read_case("cifar-resnet20-basic-simam-0.0001")
    config = settings(
        **{"data.mean": (0.0, 0.0, 0.0), "data.std": (1 / 255, 1 / 255, 1 / 255), "batch_size": case["batch"]}
    )
    rate = case["sgd"]["lr"]
    optimizer = sgd(config.optimizer, lambda _: rate)
    model, variables = from_torch(golden_state(case["state_dict"]), "cifar_resnet20", dtype="float64")
    model = model.clone(axis_name=AXIS)
    mesh = mesh_of(1)
    state = jax.device_put(create_state(variables, optimizer, seed=0, ema=False), whole_on(mesh))
    step = make_train_step(model, optimizer, lambda _: rate, config, mesh)
    losses = []
    for s in range(len(case["sgd_losses"])):
        images, rng = golden_images(case, seed=500 + s)
        labels = rng.integers(0, case["num_classes"], case["batch"]).astype(np.int32)
        state, values = step(state, {"image": images, "label": labels})
        losses.append(float(values["loss"]) / case["batch"])
    np.testing.assert_allclose(losses, case["sgd_losses"], rtol=1e-7)


def test_evaluation_counts_every_real_example_once(tiny_network, mesh_of):
    mesh, config = mesh_of(8), settings()
    model = tiny_network()
    variables = init_variables(model, jax.random.key(1))
    batch = random_batch(5)
    real = 11
    mask = (np.arange(BATCH) < real).astype(np.float32)
    step = make_eval_step(model, config, mesh)
    sums = step(jax.device_put(variables, whole_on(mesh)), jax.device_put(batch | {"mask": mask}, split_over(mesh)))

    images = (batch["image"][:real] / 255 - np.array(config.data.mean)) / np.array(config.data.std)
    logits = np.asarray(model.apply(variables, jnp.asarray(images, jnp.float32)))
    order = np.argsort(-logits, axis=1, kind="stable")
    hits = order == batch["label"][:real, None]
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"][:real])
    expected = {"count": real, "loss": np.sum(losses), "top1": hits[:, :1].sum(), "top5": hits[:, :5].sum()}
    assert_close(jax.device_get(sums), expected, rtol=1e-5)
    scores = metrics.means([jax.device_get(sums)] * 2, "eval")
    assert scores["eval/top5"] == pytest.approx(expected["top5"] / real)


def test_ties_rank_by_index_and_nan_is_never_correct():
    logits = jnp.array([[1.0, 1.0, 0.0], [1.0, 1.0, 0.0], [jnp.nan, 0.0, 0.0], [0.0, 0.0, 0.0]])
    labels, real = jnp.array([0, 1, 0, 2]), jnp.array([True, True, True, False])
    sums = count_correct(logits, labels, jnp.zeros(4), real)
    assert (sums["count"], sums["top1"], sums["top5"]) == (3, 1, 2)


@pytest.mark.parametrize(
    ("changes", "devices", "message"),
    [
        ({"batch_size": 30}, 8, "batch_size=30 does not divide over 8 devices.*such as 24 or 32"),
        ({"batch_size": 4}, 8, "multiple of 8, such as 8"),
        ({"batch_size": 8, "mixup_alpha": 0.1}, 8, "pairs"),
        ({"model.bn_group_size": 3}, 2, "Possible: 0 .*, 1, 2, 4, 8, 16"),
        ({"model.bn_group_size": 6}, 8, "Possible: 0 .*, 1, 2, 4, 8, 16"),
    ],
)
def test_what_cannot_be_divided_is_an_error_that_names_what_can(changes, devices, message):
    with pytest.raises(simam_jax.UserError, match=message):
        check_divisible(settings(**changes), devices)
