"""Real Orbax folders: what is kept, what is verified, what is read back, on how many devices."""

import json
import logging
import shutil
import zlib
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import simam_jax
from simam_jax import UserError, checkpoints, models
from simam_jax.training.checkpointer import Checkpointer
from simam_jax.training.state import create_state
from simam_jax.training.step import replicated

MODEL = {"name": "cifar_resnet20", "num_classes": 10, "attention": "simam", "attention_param": 1e-4, "dtype": "float32"}
SPEC = {"task": "classification", "model": MODEL}
META = SPEC | {"elapsed_seconds": 1.5}


@pytest.fixture
def state(mesh_of):
    """A small one: what a checkpoint holds need not be a network."""
    variables = {"params": {"conv": {"kernel": jnp.arange(24.0).reshape(2, 3, 4)}, "fc": {"bias": jnp.ones(7)}}}
    made = create_state(variables, optax.sgd(0.1, momentum=0.9), seed=3, ema=True)
    return jax.device_put(made, replicated(mesh_of(1)))


@pytest.fixture(scope="module")
def variables():
    return models.init_variables(simam_jax.create_model("cifar_resnet20", num_classes=10), jax.random.key(0))


def at(state, step: int):
    return state.replace(step=jnp.array(step, jnp.int32), variables=jax.tree.map(lambda x: x + step, state.variables))


def saved(workdir, state, *steps, meta=META) -> Checkpointer:
    """A run's checkpoints after these updates."""
    store = Checkpointer(workdir, keep_last=9, keep_best=1)
    for step in steps:
        store.save(at(state, step), meta)
    store.wait()
    return store


def equal(a, b) -> bool:
    return jax.tree.all(jax.tree.map(lambda x, y: np.array_equal(x, y), jax.device_get(a), jax.device_get(b)))


def warnings_of(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


# ---- what stays, and what comes back


def test_the_last_ones_and_the_best_one_are_kept_across_a_restart(tmp_path, state):
    for first, scores in ((1, [0.1, 0.9, 0.3]), (5, [0.2, 0.5])):
        store = Checkpointer(tmp_path, keep_last=2, keep_best=1)
        for step, score in enumerate([*scores, None], first):  # the last of each run on request, not evaluated
            store.save(at(state, step), META, score)
        store.wait()
        store.close()
    assert checkpoints.steps(tmp_path / "checkpoints") == [2, 6, 7]
    assert store.best_step() == 2


def test_of_equal_scores_the_latest_is_the_best_and_not_a_number_is_none(tmp_path, state):
    store = Checkpointer(tmp_path, keep_last=1, keep_best=1)
    for step, score in enumerate([0.5, 0.5, float("nan"), None], 1):
        store.save(at(state, step), META, score)
    store.wait()
    assert checkpoints.steps(tmp_path / "checkpoints") == [2, 4]
    assert store.best_step() == 2


def test_none_is_kept_for_its_score_where_none_is_asked_for(tmp_path, state):
    store = Checkpointer(tmp_path, keep_last=1, keep_best=0)
    for step, score in enumerate([0.9, 0.5], 1):
        store.save(at(state, step), META, score)
    store.wait()
    assert checkpoints.steps(tmp_path / "checkpoints") == [2]


def test_a_state_comes_back_bit_by_bit_on_another_number_of_devices(tmp_path, state, mesh_of):
    store = saved(tmp_path, state, 7)
    restored, meta = store.restore(jax.device_put(state, replicated(mesh_of(4))), SPEC)
    assert equal(restored, at(state, 7))
    assert all(leaf.sharding == replicated(mesh_of(4)) for leaf in jax.tree.leaves(restored))
    assert meta["elapsed_seconds"] == 1.5
    assert meta["step"] == 7


def test_a_checkpoint_that_is_not_complete_is_no_checkpoint(tmp_path, state):
    saved(tmp_path, state, 1).close()
    half = tmp_path / "checkpoints" / "2.orbax-checkpoint-tmp"
    half.mkdir()
    reopened = Checkpointer(tmp_path, keep_last=3, keep_best=1)
    assert reopened.latest_step() == 1
    assert not half.exists()


def test_a_save_that_did_not_happen_is_an_error(tmp_path, state):
    store = Checkpointer(tmp_path, keep_last=3, keep_best=1)
    store.save(at(state, 1), META)
    store._writer.wait_until_finished()
    shutil.rmtree(store.path(1) / "variables" / "d")  # as if a part of it had never been written
    (store.path(1) / "variables" / "manifest.ocdbt").unlink()
    with pytest.raises(UserError, match=r"could not be written.*variables has 0 of 2 arrays.*no checkpoint yet"):
        store.wait()
    assert checkpoints.steps(tmp_path / "checkpoints") == []


# ---- damage


def files_of(path: Path) -> list[Path]:
    return sorted(p for p in path.rglob("*") if p.is_file())


def damage(file: Path, how: str) -> None:
    content = bytearray(file.read_bytes())
    if how == "deleted":
        file.unlink()
        return
    if how == "empty":
        content = b""
    elif how == "half":
        content = content[: len(content) // 2]
    elif content:
        content[len(content) // 2] ^= 1
    file.write_bytes(bytes(content))


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """A workdir with two checkpoints, whose largest files are those of arrays."""
    state = create_state({"params": {"kernel": jnp.arange(600.0)}}, optax.sgd(0.1, momentum=0.9), seed=3, ema=False)
    workdir = tmp_path_factory.mktemp("two")
    saved(workdir, state, 1, 2).close()
    return workdir, state


@pytest.mark.parametrize("how", ["empty", "half", "flipped", "deleted"])
def test_whatever_file_of_the_newest_is_damaged_the_run_goes_on_and_readers_too(how, two, caplog):
    workdir, state = two
    newest, aside = workdir / "checkpoints" / "2", workdir / "checkpoints" / "damaged" / "2"
    store = Checkpointer(workdir, keep_last=9, keep_best=1)
    files = files_of(newest)
    assert len(files) > 20
    given_up = set()
    for file in files:
        content = file.read_bytes()
        damage(file, how)
        read = partial(checkpoints.read, like={"variables": state.variables}, spec=SPEC)
        item = checkpoints.first_readable(workdir, read)[0]["variables"]
        assert any(equal(item, at(state, step).variables) for step in (1, 2)), file
        caplog.clear()
        restored, _ = store.restore(state, SPEC)
        step = int(restored.step)
        assert equal(restored, at(state, step)), file
        if step == 1:
            given_up.add(str(file.relative_to(newest)))
            (warning,) = warnings_of(caplog)
            assert f"{newest} is damaged" in warning
            assert len(warning) < 600, warning
            assert "\n" not in warning, warning
            aside.rename(newest)
        else:  # a file that the content does not depend on
            assert step == 2
            assert not warnings_of(caplog)
        file.write_bytes(content)
    assert {"meta/metadata", "variables/manifest.ocdbt", "training/manifest.ocdbt"} <= given_up
    assert int(store.restore(state, SPEC)[0].step) == 2


@pytest.mark.parametrize("content", ["{}", "[]", "null", "7", '{"checksums": {}, "layouts": {}}', '{"checksums": 3}'])
def test_meta_data_of_another_shape_are_damage(content, tmp_path, state, caplog):
    store = saved(tmp_path, state, 1, 2)
    (store.path(2) / "meta" / "metadata").write_text(content)
    assert checkpoints.newest(tmp_path) == store.path(1)
    caplog.clear()
    assert int(store.restore(state, SPEC)[0].step) == 1
    (warning,) = warnings_of(caplog)
    assert "its meta data are not those of a checkpoint" in warning


def test_a_flipped_bit_in_any_byte_of_the_meta_data_is_noticed(tmp_path, state):
    store = saved(tmp_path, state, 1, meta=META | {"class_names": ["cat", "dog"]})
    file = store.path(1) / "meta" / "metadata"
    content, meta = file.read_bytes(), checkpoints.read_meta(tmp_path)
    for index in range(len(content)):
        changed = bytearray(content)
        changed[index] ^= 1 << index % 8
        file.write_bytes(changed)
        try:
            found = checkpoints.read_meta(tmp_path)
        except UserError:
            continue
        # What still reads says the same: white space, or the name of the checksum itself.
        for each in (found, meta):
            each["checksums"] = {name: each["checksums"][name] for name in ("variables", "ema", "training")}
        assert found == meta


def test_the_run_saves_again_what_was_damaged(tmp_path, state):
    store = saved(tmp_path, state, 1, 2)
    damage(store.path(2) / "meta" / "metadata", "half")
    assert int(store.restore(state, SPEC)[0].step) == 1
    store.save(at(state, 2), META)
    store.wait()
    assert equal(store.restore(state, SPEC)[0], at(state, 2))


def test_all_damaged_is_an_error_and_nothing_is_lost(tmp_path, state):
    store = saved(tmp_path, state, 1)
    damage(store.path(1) / "variables" / "manifest.ocdbt", "half")
    with pytest.raises(UserError, match="damaged"):
        store.restore(state, SPEC)
    assert (tmp_path / "checkpoints" / "damaged" / "1" / "meta").is_dir()


def test_what_was_set_aside_earlier_stays(tmp_path, state):
    for _ in range(2):
        store = saved(tmp_path, state, 1)
        damage(store.path(1) / "meta" / "metadata", "half")
        with pytest.raises(UserError, match="damaged"):
            store.restore(state, SPEC)
        store.close()
    assert sorted(p.name for p in (tmp_path / "checkpoints" / "damaged").iterdir()) == ["1", "1-1"]


def test_stray_names_are_no_checkpoints(tmp_path, state):
    store = saved(tmp_path, state, 1)
    folder = tmp_path / "checkpoints"
    (folder / "99").write_text("a file")
    (folder / "98").symlink_to("nowhere")
    for name in ("-5", "12 (copy)", "²", "٣", "1e3", "007"):
        shutil.copytree(store.path(1), folder / name)
    store.close()
    again = Checkpointer(tmp_path, keep_last=1, keep_best=0)
    assert again.latest_step() == 1
    assert int(again.restore(state, SPEC)[0].step) == 1
    assert checkpoints.newest(tmp_path) == again.path(1)
    for step in (98, 99):  # what is in the way of a checkpoint is moved, not lost
        again.save(at(state, step), META)
    again.wait()
    assert int(again.restore(state, SPEC)[0].step) == 99
    assert (folder / "damaged" / "99").read_text() == "a file"


def test_a_checkpoint_under_a_higher_name_neither_counts_nor_stops_later_ones(tmp_path, state, caplog):
    store = saved(tmp_path, state, 8, 9)
    shutil.copytree(store.path(9), store.path(99))
    store.close()
    store = Checkpointer(tmp_path, keep_last=2, keep_best=0)
    assert checkpoints.newest(tmp_path) == store.path(9)
    caplog.clear()
    assert int(store.restore(state, SPEC)[0].step) == 9
    (warning,) = warnings_of(caplog)
    assert "99 is damaged: it is that of step 9 under another name" in warning
    store.save(at(state, 10), META)
    store.wait()
    assert checkpoints.steps(tmp_path / "checkpoints") == [9, 10]


# ---- odd paths

ODD = [
    "lr[0.1]",
    "*",
    "a?b",
    "sp ace",
    "new\nline",
    "ünïcode 模型",
    "x" * 255,
    "back\\slash",
    "gs:",
    "~",
    "$HOME",
    "{a,b}",
]


@pytest.mark.parametrize("name", ODD)
def test_a_workdir_may_have_any_name(name, tmp_path, state, variables):
    workdir = tmp_path / name / "run"
    (tmp_path / "0" / "run").mkdir(parents=True)  # what a pattern could match
    workdir.mkdir(parents=True)
    saved(workdir, state, 1, 2).close()
    assert checkpoints.newest(workdir) == workdir / "checkpoints" / "2"
    store = Checkpointer(workdir, keep_last=3, keep_best=1)
    assert equal(store.restore(state, SPEC)[0], at(state, 2))
    checkpoints.write_weights(workdir / name, SPEC, variables)
    assert equal(simam_jax.load(workdir / name)[1], variables)


def test_a_workdir_may_be_relative_behind_a_link_or_very_deep(tmp_path, state, monkeypatch):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    monkeypatch.chdir(tmp_path)
    saved("link", state, 1).close()
    assert checkpoints.newest("link") == tmp_path / "link" / "checkpoints" / "1"
    deep = tmp_path.joinpath(*["d" * 200] * 18)
    deep.mkdir(parents=True)
    assert equal(saved(deep, state, 1).restore(state, SPEC)[0], at(state, 1))


# ---- of another kind, or older


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": MODEL | {"name": "cifar_resnet32"}}, "of another model.*cifar_resnet20.*cifar_resnet32"),
        ({"model": MODEL | {"attention": "se"}}, "of another model.*simam.*se"),
        ({"task": "detection"}, "of the task 'classification', the config's is 'detection'"),
    ],
)
def test_a_checkpoint_of_another_spec_is_refused_and_stays(change, message, tmp_path, state):
    store = saved(tmp_path, state, 1)
    with pytest.raises(UserError, match=message):
        store.restore(state, SPEC | change)
    assert checkpoints.steps(tmp_path / "checkpoints") == [1]


def test_leaves_that_differ_are_named_and_the_checkpoint_stays(tmp_path, state):
    store = saved(tmp_path, state, 1)
    with pytest.raises(UserError, match=r"'training'.*missing opt_state/0/nu/conv/kernel"):
        store.restore(create_state(state.variables, optax.adam(0.1), seed=0, ema=True), SPEC)
    wider = jax.tree.map(lambda x: jnp.zeros((*x.shape, 2)), state.variables)
    with pytest.raises(UserError, match=r"params/fc/bias is \(7,\) float32 and not \(7, 2\) float32"):
        store.restore(state.replace(variables=wider), SPEC)
    assert checkpoints.steps(tmp_path / "checkpoints") == [1]


def test_checkpoints_of_earlier_versions_are_read_and_continued(tmp_path, state):
    """They have no task, no checksum of the meta data, numbers for layouts, and the score in an item of its own."""

    def number(tree) -> int:
        leaves = jax.tree_util.tree_leaves_with_path(tree)
        text = [f"{jax.tree_util.keystr(path)} {leaf.shape} {leaf.dtype}" for path, leaf in leaves]
        return zlib.crc32("\n".join(text).encode())

    store = saved(tmp_path, state, 1, 2)
    items = {"variables": state.variables, "ema": state.ema}
    items["training"] = {"step": state.step, "opt_state": state.opt_state, "key": state.key}
    for step, score in ((1, 0.7), (2, 0.6)):
        file = store.path(step) / "meta" / "metadata"
        meta = json.loads(file.read_text())
        del meta["task"], meta["score"], meta["checksums"]["meta"]
        meta["layouts"] = {name: number(item) for name, item in items.items()}
        file.write_text(json.dumps(meta))
        (store.path(step) / "metrics").mkdir()
        (store.path(step) / "metrics" / "metrics").write_text(json.dumps({"top1": score}))
    store.close()
    again = Checkpointer(tmp_path, keep_last=1, keep_best=1)
    assert again.best_step() == 1
    assert equal(again.restore(state, SPEC)[0], at(state, 2))
    with pytest.raises(UserError, match="another optimizer"):
        again.restore(create_state(state.variables, optax.adam(0.1), seed=0, ema=True), SPEC)
    again.save(at(state, 3), META, 0.5)
    again.wait()
    assert checkpoints.steps(tmp_path / "checkpoints") == [1, 3]


# ---- weights


def test_load_reads_the_variables_and_the_average_without_the_optimizer(tmp_path, variables):
    state = create_state(variables, optax.sgd(0.1, momentum=0.9), seed=3, ema=True)
    store = saved(tmp_path, state, 1, 2)
    model, found = simam_jax.load(tmp_path)
    assert model.attention == "simam"
    assert equal(found, at(state, 2).variables)
    assert equal(simam_jax.load(store.path(1))[1], at(state, 1).variables)
    assert equal(simam_jax.load(tmp_path, ema=True)[1], state.ema)
    logits = jax.jit(model.apply)(found, jnp.zeros((2, 32, 32, 3)))
    assert logits.shape == (2, 10)


def test_weights_alone_are_loaded_but_not_continued(tmp_path, state, variables):
    checkpoints.write_weights(tmp_path, SPEC, variables)
    assert equal(simam_jax.load(tmp_path)[1], variables)
    store = Checkpointer(tmp_path, keep_last=3, keep_best=1)
    with pytest.raises(UserError, match=r"holds no 'ema'.*init_from"):
        store.restore(state.replace(variables=variables), SPEC)
    with pytest.raises(UserError, match="checkpoints already"):
        checkpoints.write_weights(tmp_path, SPEC, variables)


@pytest.mark.parametrize(("make", "message"), [(False, "no such folder"), (True, "There is no checkpoint in")])
def test_load_of_nothing_says_so(make, message, tmp_path):
    path = tmp_path / "empty"
    if make:
        path.mkdir()
    with pytest.raises(UserError, match=message):
        simam_jax.load(path)


def test_load_of_a_folder_of_runs_names_them(tmp_path, variables):
    for name in ("scenes", "digits"):
        checkpoints.write_weights(tmp_path / name, SPEC, variables)
    (tmp_path / "notes").mkdir()
    with pytest.raises(UserError, match="There are some in digits, scenes"):
        simam_jax.load(tmp_path)


def test_load_of_a_damaged_checkpoint_says_so(tmp_path, variables):
    checkpoints.write_weights(tmp_path, SPEC, variables)
    damage(max(files_of(tmp_path / "checkpoints" / "0" / "variables"), key=lambda p: p.stat().st_size), "flipped")
    for path in (tmp_path, tmp_path / "checkpoints" / "0"):
        with pytest.raises(UserError, match="damaged"):
            simam_jax.load(path)
