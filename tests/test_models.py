"""What every network promises, and the layers below them: shapes, types, groups of batch norm, dropout, errors."""

import functools
import math
from functools import partial
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from network_cases import COMBINATIONS

from simam_jax import UserError, create_model, list_models
from simam_jax.layers import BatchNorm, Conv, Dropout
from simam_jax.models import create_backbone, init_variables, variable_shapes
from simam_jax.ops import parts
from simam_jax.ops.activations import relu
from simam_jax.ops.dispatch import lowering_for
from simam_jax.ops.parts import apply_in_parts, apply_to_valid

pytestmark = pytest.mark.usefixtures("quickly_compiled")

shapes = functools.cache(variable_shapes)  # shared with the tests of conversion


def abstract(model, size: int):
    """Shapes of the model's variables and of what a training call returns."""
    x = jax.ShapeDtypeStruct((2, size, size, 3), jnp.float32)
    variables = shapes(model)
    call = partial(model.apply, train=True, features=True, mutable=["batch_stats"], rngs={"dropout": jax.random.key(0)})
    return variables, *jax.eval_shape(call, variables, x)


@pytest.mark.parametrize(("name", "attention"), COMBINATIONS)
def test_shapes(name: str, attention: str):
    """Logits and stages of every network with every attention, for images whose size no stride divides."""
    model = create_model(name, num_classes=7, attention=attention)
    variables, (logits, stages), updates = abstract(model, size=33)
    assert logits.shape == (2, 7)
    assert list(stages) == [f"layer{i + 1}" for i in range(len(stages))]
    sizes = [stage.shape[1] for stage in stages.values()]
    assert all(after in (before, math.ceil(before / 2)) for before, after in pairwise(sizes))
    assert jax.tree.structure(updates["batch_stats"]) == jax.tree.structure(variables["batch_stats"])


@pytest.mark.parametrize(
    ("name", "params"),
    # Beside those in the golden files: 9 or 18 further blocks of two 3x3 convolutions and two batch norms a stage.
    [("resnet152", 60_192_808), ("cifar_resnet110", 855_770 + 9 * 97_216), ("cifar_resnet164", 855_770 + 18 * 97_216)],
)
def test_parameter_counts(name: str, params: int):
    model = create_model(name, num_classes=10 if name.startswith("cifar") else 1000)
    variables = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    assert sum(leaf.size for leaf in jax.tree.leaves(variables["params"])) == params


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_relu_is_the_maximum_with_0_and_its_gradient(dtype):
    x = jax.random.normal(jax.random.key(0), (4, 50), dtype)
    x = x.at[0, :3].set(jnp.array([0, -0.0, jnp.inf], dtype)).at[1, 0].set(jnp.nan)

    @partial(jax.jit, static_argnums=0)
    def everything(f, x):
        y, pull = jax.vjp(f, x)
        return y, *pull(jnp.ones_like(x)), jax.jvp(f, (x,), (jnp.full_like(x, 2),))[1]

    for ours, theirs in zip(everything(relu, x), everything(jax.nn.relu, x), strict=True):
        assert ours.dtype == dtype
        np.testing.assert_array_equal(ours.astype(jnp.float32), theirs.astype(jnp.float32))


def test_stages_of_resnet50_for_detection():
    model = create_model("resnet50", num_classes=10)
    _, (_, stages), _ = abstract(model, size=64)
    assert {name: stage.shape[1:] for name, stage in stages.items()} == {
        "layer1": (16, 16, 256),
        "layer2": (8, 8, 512),
        "layer3": (4, 4, 1024),
        "layer4": (2, 2, 2048),
    }


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_computes_near_float32(dtype: str):
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 32, 32, 3)), jnp.float32)
    full, half = (create_model("cifar_resnet20", num_classes=10, dtype=d) for d in ("float32", dtype))
    variables = init_variables(half, jax.random.key(0))
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
    logits, stages = jax.jit(partial(half.apply, features=True))(variables, x)
    assert logits.dtype == jnp.float32
    assert stages["layer3"].dtype == jnp.dtype(dtype)
    expected = jax.jit(full.apply)(variables, x)
    np.testing.assert_allclose(logits, expected, atol=0.05 * float(jnp.abs(expected).max()))


def test_default_attention_param_is_the_papers():
    assert create_model("resnet18", num_classes=10).attention_param == 0.1
    assert create_model("cifar_resnet20", num_classes=10).attention_param == 1e-4
    assert create_model("resnet18", num_classes=10, attention="se").attention_param == 16


def test_intermediates_hold_every_weight_when_asked():
    model = create_model("cifar_resnet20", num_classes=10)
    x = jnp.zeros((1, 32, 32, 3))
    variables = jax.eval_shape(model.init, jax.random.key(0), x)
    assert "intermediates" not in variables
    _, state = jax.eval_shape(partial(model.apply, mutable=["intermediates"]), variables, x)
    assert state["intermediates"]["layer2_1"]["attention"]["weights"][0].shape == (1, 16, 16, 32)
    assert len(state["intermediates"]) == 9


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "resnet51"}, "Did you mean 'resnet50'"),
        ({"attention": "sinam"}, "Did you mean 'simam'"),
        ({"attention_param": 0.0}, "lambda.*got 0.0"),
        ({"attention": "se", "attention_param": 0.5}, "reduction.*got 0.5"),
        ({"num_classes": 0}, "at least 1, got 0"),
        ({"bn_group_size": -1}, "got -1"),
        ({"dtype": "int8"}, "Unknown dtype 'int8'"),
        ({"dtype": "float64"}, "JAX_ENABLE_X64"),
    ],
)
def test_wrong_arguments(arguments: dict, message: str):
    with pytest.raises(UserError, match=message):
        create_model(**({"name": "resnet50", "num_classes": 10} | arguments))


@pytest.mark.parametrize(
    ("shape", "dtype"), [((32, 32, 3), "float32"), ((1, 3, 32, 32), "float32"), ((1, 32, 32, 3), "uint8")]
)
def test_wrong_images(shape: tuple[int, ...], dtype: str):
    with pytest.raises(UserError, match=r"takes (normalised )?.*images"):
        create_model("resnet18", num_classes=2).init(jax.random.key(0), jnp.zeros(shape, dtype))


def test_list_models():
    assert {"resnet152", "resnext50_32x4d", "mobilenet_v2", "cifar_preresnet164_bottleneck"} <= set(list_models())


def test_initial_convolutions_are_he_normal_by_fan_out():
    kernel = Conv(64, 3, groups=4).init(jax.random.key(0), jnp.zeros((1, 8, 8, 32)))["params"]["kernel"]
    assert kernel.shape == (3, 3, 8, 64)
    np.testing.assert_allclose(kernel.std(), math.sqrt(2 / (64 * 9)), rtol=0.05)


def normalise_in_groups(x: np.ndarray, group: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """x (N, H, W, C) normalised over groups of images, and the groups' means and unbiased variances, (groups, C)."""
    grouped = x.reshape(-1, group, *x.shape[1:])
    mean, var = grouped.mean((1, 2, 3), keepdims=True), grouped.var((1, 2, 3), keepdims=True)
    y = (grouped - mean) / np.sqrt(var + 1e-5)
    count = grouped[0, ..., 0].size
    return y.reshape(x.shape), mean.reshape(len(mean), -1), var.reshape(len(var), -1) * count / (count - 1)


@pytest.mark.parametrize(
    ("devices", "group"), [(1, 16), (1, 4), (2, 8), (2, 2), (2, 16), (4, 4), (4, 8), (4, 16), (8, 1), (8, 4), (8, 16)]
)
def test_batch_norm_groups(devices: int, group: int):
    """16 images on 1 to 8 devices: each group is normalised alone, and the running statistics are the groups' mean."""
    x = 3 * np.random.default_rng(0).standard_normal((16, 3, 3, 2)) + np.arange(16)[:, None, None, None]
    norm = BatchNorm(group_size=group, axis_name="data")
    weight = np.random.default_rng(1).standard_normal(x.shape)
    with jax.enable_x64(True):
        variables = norm.init(jax.random.key(0), x)

        def step(x, weight):
            y, updates = norm.apply(variables, x, train=True, mutable=["batch_stats"])
            return jax.lax.psum((y * weight).sum(), "data"), (y, jax.lax.pmean(updates["batch_stats"], "data"))

        mesh = Mesh(np.array(jax.devices()[:devices]), ("data",))
        mapped = jax.shard_map(step, mesh=mesh, in_specs=P("data"), out_specs=(P(), (P("data"), P())))
        (_, (y, stats)), grad = jax.jit(jax.value_and_grad(mapped, has_aux=True))(jnp.asarray(x), jnp.asarray(weight))
    expected, means, variances = normalise_in_groups(x, group)
    np.testing.assert_allclose(y, expected, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(stats["mean"], 0.1 * means.mean(0), rtol=1e-12)
    np.testing.assert_allclose(stats["var"], 0.9 + 0.1 * variances.mean(0), rtol=1e-12)
    # A change of one input reaches the outputs of its own group, and no others.
    step_size, bumped = 1e-6, x.copy()
    bumped[3, 1, 2, 0] += step_size
    slope = ((normalise_in_groups(bumped, group)[0] - expected) * weight).sum() / step_size
    np.testing.assert_allclose(grad[3, 1, 2, 0], slope, rtol=1e-4)


def test_batch_norm_keeps_accuracy_far_from_zero():
    """A batch whose mean is 1,000 deviations from zero, once the running mean knows about it."""
    x = jnp.asarray(np.random.default_rng(0).standard_normal((64, 8, 8, 3)) + 1000, jnp.float32)
    norm = BatchNorm()
    variables = norm.init(jax.random.key(0), x)
    variables["batch_stats"]["mean"] += 1000.5
    y, _ = norm.apply(variables, x, train=True, mutable=["batch_stats"])
    np.testing.assert_allclose(y, normalise_in_groups(np.float64(x), 64)[0], atol=1e-4)


@pytest.mark.parametrize(
    ("images", "group", "message"), [(6, 4, "over 4 images cannot"), (6, 12, "on each of 1 devices")]
)
def test_impossible_groups(images: int, group: int, message: str):
    norm = BatchNorm(group_size=group)
    x = jnp.zeros((images, 2, 2, 3))
    with pytest.raises(UserError, match=message):
        norm.apply(norm.init(jax.random.key(0), x), x, train=True, mutable=["batch_stats"])


def test_statistics_of_one_value():
    x = jnp.zeros((1, 1, 1, 3))
    with pytest.raises(UserError, match="one value per channel"):
        BatchNorm().apply(BatchNorm().init(jax.random.key(0), x), x, train=True, mutable=["batch_stats"])


def test_dropout_does_not_depend_on_the_number_of_devices():
    x = jnp.ones((8, 4, 4, 64))

    def masked(x):
        return Dropout(0.3, "data").apply({}, x, train=True, rngs={"dropout": jax.random.key(0)})

    def on(devices: int):
        mesh = Mesh(np.array(jax.devices()[:devices]), ("data",))
        return jax.jit(jax.shard_map(masked, mesh=mesh, in_specs=P("data"), out_specs=P("data")))(x)

    one, eight = on(1), on(8)
    np.testing.assert_array_equal(one, eight)
    assert abs(float((one == 0).mean()) - 0.3) < 0.01
    np.testing.assert_allclose(one[one != 0], 1 / 0.7, rtol=1e-6)
    assert (one[0] != one[1]).any()
    np.testing.assert_array_equal(Dropout(0.3).apply({}, x), x)


def test_a_large_batch_is_computed_in_parts_on_cpus(monkeypatch):
    model = create_model("cifar_resnet20", num_classes=10, attention="simam")
    images = jax.random.normal(jax.random.key(1), (6, 16, 16, 3))
    variables = init_variables(model, jax.random.key(0))
    seen = []

    def apply(images):
        seen.append(len(images))
        return model.apply(variables, images, features=True)

    whole = jax.jit(apply)(images)
    monkeypatch.setattr(parts, "PIXELS", 2 * 16 * 16)
    in_parts = jax.jit(partial(apply_in_parts, apply))(images)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4), in_parts, whole)
    assert seen == [6, 2]
    with lowering_for("gpu"):
        jax.eval_shape(partial(apply_in_parts, apply), images)
    jax.eval_shape(partial(apply_in_parts, apply), images[:5])  # parts of one image would be too small
    assert seen[2:] == [6, 5]


def test_rows_that_are_not_valid_are_left_out(monkeypatch):
    monkeypatch.setattr(parts, "ROWS", 4)
    rows, weights = (jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate([(12, 3), (3, 5)]))
    valid = jnp.arange(12) < 5  # of three parts the last has none
    computed = []

    def f(weights, x):
        jax.debug.callback(lambda: computed.append(1))
        return jnp.tanh(x @ weights)

    @jax.jit
    def everything(weights):
        return jax.value_and_grad(lambda w: apply_to_valid(partial(f, w), valid, rows)[:5].sum())(weights)

    expected = jax.value_and_grad(lambda w: jnp.tanh(rows[:5] @ w).sum())(weights)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), everything(weights), expected)
    jax.effects_barrier()
    assert len(computed) == 2
    assert not apply_to_valid(partial(f, weights), valid, rows)[8:].any()
    with lowering_for("gpu"):
        assert apply_to_valid(partial(f, weights), valid, rows)[8:].any()


def test_a_backbone_has_no_head_and_trains_its_scales_by_running_statistics():
    backbone = create_backbone("cifar_resnet20")
    images = jax.random.normal(jax.random.key(1), (2, 16, 16, 3))
    variables = init_variables(backbone, jax.random.key(0))
    assert "fc" not in variables["params"]
    assert set(variables["params"]) | {"fc"} == set(variable_shapes(create_model("cifar_resnet20"))["params"])

    def loss(params):
        (features, _), updates = backbone.apply(variables | {"params": params}, images, mutable=["batch_stats"])
        return jnp.square(features).sum(), updates["batch_stats"]

    gradient, statistics = jax.jit(jax.grad(loss, has_aux=True))(variables["params"])
    jax.tree.map(np.testing.assert_array_equal, statistics, variables["batch_stats"])  # they stay
    norms = [layer for block in gradient.values() for name, layer in block.items() if name.startswith("bn")]
    assert norms
    for norm in norms:
        assert np.abs(norm["scale"]).max() > 0
        assert np.abs(norm["bias"]).max() > 0
