"""Initial values: NumPy's draws have the documented distributions, and depend on the seed and the path alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import simam_jax
from simam_jax.initializers import Initializer, draw, he_normal, ones, torch_uniform, zeros
from simam_jax.models import init_variables, variable_shapes

SHAPE = (3, 3, 64, 128)


def by_numpy(initializer, shape, dtype=np.float32):
    return initializer.draw(np.random.default_rng(0), shape, dtype)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_he_normal_has_the_deviation_of_its_fan_out(dtype):
    values = by_numpy(he_normal, SHAPE, dtype)
    deviation = np.sqrt(2 / (9 * 128))
    assert values.dtype == dtype
    # Of n draws the mean and the deviation are off by 1 / sqrt(n) and 1 / sqrt(2 n): four of these are allowed.
    assert abs(values.mean()) < 4 * deviation / np.sqrt(values.size)
    assert values.std() == pytest.approx(deviation, rel=4 / np.sqrt(2 * values.size))
    assert np.mean(abs(values) > 3 * deviation) == pytest.approx(0.0027, rel=0.3)  # not truncated


def test_torch_uniform_fills_its_interval():
    values, bound = by_numpy(torch_uniform, SHAPE), 1 / np.sqrt(9 * 64)
    assert abs(values).max() <= bound
    counts, _ = np.histogram(values, 10, (-bound, bound))
    assert counts / values.size == pytest.approx(np.full(10, 0.1), rel=0.05)


@pytest.mark.parametrize("initializer", [he_normal, torch_uniform, zeros, ones, Initializer("normal", 0.01)])
def test_jax_and_numpy_draw_from_the_same_distribution(initializer):
    ours, flax = by_numpy(initializer, SHAPE), initializer(jax.random.key(0), SHAPE, jnp.float32)
    quantiles = np.linspace(0.01, 0.99, 25)
    scale = max(abs(ours).max(), 1e-9)
    assert np.quantile(flax, quantiles) / scale == pytest.approx(np.quantile(ours, quantiles) / scale, abs=0.01)


def test_variables_are_those_that_init_makes():
    model = simam_jax.create_model("cifar_resnet20", num_classes=10, attention="cbam")
    variables = init_variables(model, jax.random.key(0))
    shapes = variable_shapes(model)
    assert jax.tree.structure(variables) == jax.tree.structure(shapes)
    assert jax.tree.all(jax.tree.map(lambda x, s: x.shape == s.shape and x.dtype == s.dtype, variables, shapes))
    assert {type(leaf) for leaf in jax.tree.leaves(variables)} == {np.ndarray}
    np.testing.assert_array_equal(variables["batch_stats"]["bn1"]["var"], 1)


def test_values_depend_on_seed_and_path_alone():
    def parameters(seed, attention="none", num_classes=10):
        model = simam_jax.create_model("cifar_resnet20", num_classes=num_classes, attention=attention)
        return init_variables(model, jax.random.key(seed))["params"]

    one, same, other = parameters(0), parameters(0, "se", num_classes=7), parameters(1)
    kernels = [tree["layer1_0"]["conv1"]["kernel"] for tree in (one, same, other)]
    np.testing.assert_array_equal(kernels[0], kernels[1])
    assert not np.array_equal(kernels[0], kernels[2])
    assert not np.array_equal(kernels[0], one["layer1_1"]["conv1"]["kernel"])


def test_init_draws_by_jax_also_after_a_draw_by_numpy():
    model = simam_jax.create_model("cifar_resnet20", num_classes=10)
    init_variables(model, jax.random.key(0))
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    assert {type(leaf) for leaf in jax.tree.leaves(shapes)} == {jax.ShapeDtypeStruct}
    kernel = simam_jax.layers.Conv(4).init(jax.random.key(0), jnp.zeros((1, 4, 4, 8)))["params"]["kernel"]
    assert isinstance(kernel, jax.Array)


def test_a_foreign_initializer_is_named():
    with pytest.raises(TypeError, match=r"params/(kernel|bias) is none"):
        draw(nn.Dense(3), jax.random.key(0), jax.ShapeDtypeStruct((1, 4), jnp.float32))
