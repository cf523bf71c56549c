"""Real Orbax folders: what is kept, what is verified, what is read back, on how many devices."""

import json
import logging
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from processes import wait_for

import simam_jax
from simam_jax import UserError, checkpoints
from simam_jax.checkpoints import Checkpoints
from simam_jax.training.state import create_state, init_variables
from simam_jax.training.step import whole_on

SPEC = {"name": "cifar_resnet20", "num_classes": 10, "attention": "simam", "attention_param": 1e-4, "dtype": "float32"}
META = {"model": SPEC, "elapsed_seconds": 1.5}


@pytest.fixture(scope="module")
def variables():
    model = simam_jax.create_model("cifar_resnet20", num_classes=10)
    return init_variables(model, jax.random.key(0))


@pytest.fixture
def state(variables, mesh_of):
    copy = jax.tree.map(jnp.copy, variables)
    return jax.device_put(create_state(copy, optax.sgd(0.1, momentum=0.9), seed=3, ema=True), whole_on(mesh_of(1)))


def at(state, step: int):
    return state.replace(step=jnp.array(step, jnp.int32), variables=jax.tree.map(lambda x: x + step, state.variables))


def steps_in(workdir) -> list[int]:
    return sorted(int(p.name) for p in (workdir / "checkpoints").iterdir() if p.name.isdigit())


def equal(a, b) -> bool:
    return jax.tree.all(jax.tree.map(lambda x, y: np.array_equal(x, y), jax.device_get(a), jax.device_get(b)))


def test_the_last_ones_and_the_best_one_are_kept_across_a_restart(tmp_path, state):
    for first, scores in ((1, [0.1, 0.9, 0.3]), (5, [0.2, 0.5])):
        store = Checkpoints(tmp_path, keep_last=2, keep_best=1)
        for step, top1 in enumerate([*scores, None], first):  # the last of each run on request, not evaluated
            store.save(at(state, step), META, top1)
        store.wait()
        store.close()
    assert steps_in(tmp_path) == [2, 6, 7]
    assert store.best_step() == 2


def test_a_state_comes_back_bit_by_bit_on_another_number_of_devices(tmp_path, state, mesh_of):
    store = Checkpoints(tmp_path, keep_last=1, keep_best=1)
    store.save(at(state, 7), META)
    store.wait()
    like = jax.device_put(state, whole_on(mesh_of(4)))
    restored, meta = store.restore(like, SPEC)
    assert equal(restored, at(state, 7))
    assert all(leaf.sharding == whole_on(mesh_of(4)) for leaf in jax.tree.leaves(restored))
    assert meta["elapsed_seconds"] == 1.5
    assert meta["step"] == 7


def damage(path, how: str) -> None:
    """Shortens, or changes one byte of, the largest file of arrays."""
    file = max((p for p in (path / "variables").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    content = bytearray(file.read_bytes())
    if how == "truncated":
        content = content[: len(content) // 2]
    else:
        content[len(content) // 2] ^= 1
    file.write_bytes(bytes(content))


@pytest.mark.parametrize("how", ["truncated", "flipped"])
def test_a_damaged_newest_checkpoint_gives_way_to_the_one_before(how, tmp_path, state, caplog):
    store = Checkpoints(tmp_path, keep_last=3, keep_best=1)
    for step in (1, 2):
        store.save(at(state, step), META)
    store.wait()
    damage(store.path(2), how)
    with caplog.at_level(logging.WARNING):
        restored, _ = store.restore(state, SPEC)
    assert int(restored.step) == 1
    assert f"{store.path(2)} is damaged" in caplog.text
    assert (tmp_path / "checkpoints" / "damaged" / "2").is_dir()
    store.save(at(state, 2), META)  # the same step again, as the resumed run will
    store.wait()
    assert int(store.restore(state, SPEC)[0].step) == 2


def test_a_checkpoint_that_is_not_complete_is_no_checkpoint(tmp_path, state):
    store = Checkpoints(tmp_path, keep_last=3, keep_best=1)
    store.save(at(state, 1), META)
    store.wait()
    store.close()
    half = tmp_path / "checkpoints" / "2.orbax-checkpoint-tmp-1"
    half.mkdir()
    reopened = Checkpoints(tmp_path, keep_last=3, keep_best=1)
    assert reopened.latest_step() == 1
    wait_for(lambda: not half.exists(), seconds=20)  # Orbax clears up in the background


def test_all_damaged_is_an_error_and_nothing_is_lost(tmp_path, state):
    store = Checkpoints(tmp_path, keep_last=3, keep_best=1)
    store.save(at(state, 1), META)
    store.wait()
    damage(store.path(1), "truncated")
    with pytest.raises(UserError, match="damaged"):
        store.restore(state, SPEC)
    assert (tmp_path / "checkpoints" / "damaged" / "1" / "meta").is_dir()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "cifar_resnet32"}, "of another model.*cifar_resnet20.*cifar_resnet32"),
        ({"attention": "se"}, "of another model.*simam.*se"),
    ],
)
def test_a_checkpoint_of_another_model_is_refused_and_stays(change, message, tmp_path, state):
    store = Checkpoints(tmp_path, keep_last=3, keep_best=1)
    store.save(at(state, 1), META)
    store.wait()
    with pytest.raises(UserError, match=message):
        store.restore(state, SPEC | change)
    assert steps_in(tmp_path) == [1]


def test_another_optimizer_is_refused_and_the_checkpoint_stays(tmp_path, state, variables):
    store = Checkpoints(tmp_path, keep_last=3, keep_best=1)
    store.save(at(state, 1), META)
    store.wait()
    with pytest.raises(UserError, match="another optimizer"):
        store.restore(create_state(variables, optax.adam(0.1), seed=0, ema=True), SPEC)
    assert steps_in(tmp_path) == [1]


def test_load_reads_the_variables_and_the_average_without_the_optimizer(tmp_path, state):
    store = Checkpoints(tmp_path, keep_last=3, keep_best=1)
    for step in (1, 2):
        store.save(at(state, step), META)
    store.wait()
    model, variables = simam_jax.load(tmp_path)
    assert model.attention == "simam"
    assert equal(variables, at(state, 2).variables)
    assert equal(simam_jax.load(store.path(1))[1], at(state, 1).variables)
    assert equal(simam_jax.load(tmp_path, ema=True)[1], state.ema)
    logits = jax.jit(model.apply)(variables, jnp.zeros((2, 32, 32, 3)))
    assert logits.shape == (2, 10)


def test_weights_alone_are_loaded_but_not_continued(tmp_path, state, variables):
    checkpoints.save_weights(tmp_path, SPEC, variables)
    assert equal(simam_jax.load(tmp_path)[1], variables)
    store = Checkpoints(tmp_path, keep_last=3, keep_best=1)
    with pytest.raises(UserError, match=r"holds no 'ema'.*init_from"):
        store.restore(state, SPEC)
    with pytest.raises(UserError, match="checkpoints already"):
        checkpoints.save_weights(tmp_path, SPEC, variables)


@pytest.mark.parametrize(("make", "message"), [(False, "no such folder"), (True, "There is no checkpoint in")])
def test_load_of_nothing_says_so(make, message, tmp_path):
    path = tmp_path / "empty"
    if make:
        path.mkdir()
    with pytest.raises(UserError, match=message):
        simam_jax.load(path)


def test_load_of_a_damaged_checkpoint_says_so(tmp_path, variables):
    checkpoints.save_weights(tmp_path, SPEC, variables)
    damage(tmp_path / "checkpoints" / "0", "flipped")
    with pytest.raises(UserError, match="damaged"):
        simam_jax.load(tmp_path)


def test_a_workdir_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text(json.dumps({}))
    with pytest.raises(UserError, match=r"workdir=.*cannot be written"):
        checkpoints.writable(Path(tmp_path / "file" / "run"))
