"""SimAM against the formula and its gradient in plain NumPy; what the attention modules promise of types and inputs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P

from simam_jax import CBAM, SimAM, SqueezeExcite, UserError, simam, simam_weights


def formula(x: np.ndarray, e_lambda: float) -> np.ndarray:
    """The weights of a float64 map (..., H, W, C), term by term as the paper has them."""
    n = x.shape[-3] * x.shape[-2] - 1
    d = (x - x.mean((-3, -2), keepdims=True)) ** 2
    v = d.sum((-3, -2), keepdims=True) / n
    return 1 / (1 + np.exp(-(d / (4 * (v + e_lambda)) + 0.5)))


def gradient(x: np.ndarray, g: np.ndarray, e_lambda: float) -> np.ndarray:
    """The gradient of sum(g * simam(x)) by hand."""
    axes, n = (-3, -2), x.shape[-3] * x.shape[-2] - 1
    s = formula(x, e_lambda)
    c = x - x.mean(axes, keepdims=True)
    a = (c**2).sum(axes, keepdims=True) / n + e_lambda
    h = g * x * s * (1 - s)
    through_x = h * c - (h * c).mean(axes, keepdims=True)
    return g * s + through_x / (2 * a) - c * (h * c**2).sum(axes, keepdims=True) / (2 * n * a**2)


def draw(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


FAST_AND_PLAIN = pytest.mark.parametrize("implementation", ["auto", "reference"])


@pytest.mark.parametrize("shape", [(2, 7, 5, 3), (6, 6, 4), (2, 3, 4, 4, 2), (2, 2, 1, 3)])
@pytest.mark.parametrize("e_lambda", [1e-4, 0.1])
@FAST_AND_PLAIN
def test_formula_and_gradient(shape: tuple[int, ...], e_lambda: float, implementation: str):
    x, g = 2 * draw(*shape) + 1, draw(*shape, seed=1)
    with jax.enable_x64(True):
        np.testing.assert_allclose(simam_weights(x, e_lambda), formula(x, e_lambda), rtol=1e-13)
        y, vjp = jax.vjp(lambda x: simam(x, e_lambda, implementation=implementation), jnp.asarray(x))
        np.testing.assert_allclose(y, x * formula(x, e_lambda), rtol=1e-13)
        np.testing.assert_allclose(vjp(jnp.asarray(g))[0], gradient(x, g, e_lambda), rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("mean", [0.0, 1e3])
@FAST_AND_PLAIN
def test_float32_is_as_accurate_as_float32_can_be(mean: float, implementation: str):
    """A mean of 1,000 times the deviation costs the weights nothing; y and dx are rounded at the size of x."""
    x, g = draw(2, 56, 56, 4), draw(2, 56, 56, 4, seed=1)
    x = np.float64((x + mean).astype(np.float32))
    y, vjp = jax.vjp(lambda x: simam(x, implementation=implementation), jnp.asarray(x, jnp.float32))
    np.testing.assert_allclose(y, x * formula(x, 1e-4), rtol=2e-6)
    exact = gradient(x, g, 1e-4)
    np.testing.assert_allclose(vjp(jnp.asarray(g, jnp.float32))[0], exact, atol=4e-6 * np.abs(exact).max())


def test_transformations_of_jax():
    """vmap and second derivatives (reverse over reverse) of the fast form; forward mode of the reference."""
    x, v = draw(2, 3, 4, 4, 2), draw(2, 3, 4, 4, 2, seed=1)
    with jax.enable_x64(True):
        x, v = jnp.asarray(x), jnp.asarray(v)

        def energy(implementation):
            return lambda x: (simam(x, 0.1, implementation=implementation) * v).sum()

        fast, plain = energy("auto"), energy("reference")
        np.testing.assert_allclose(jax.vmap(simam)(x), simam(x), rtol=1e-13)
        np.testing.assert_allclose(
            jax.vmap(jax.grad(lambda x: simam(x).sum()))(x), jax.grad(lambda x: simam(x).sum())(x)
        )
        curvature = jax.grad(lambda x: (jax.grad(fast)(x) * v).sum())(x)
        np.testing.assert_allclose(curvature, jax.jvp(jax.grad(plain), (x,), (v,))[1], rtol=1e-9, atol=1e-12)
        tangent = jax.jvp(plain, (x,), (v,))[1]
        np.testing.assert_allclose(tangent, (jax.grad(fast)(x) * v).sum(), rtol=1e-12)


def test_it_is_the_same_on_the_shards_of_a_batch(mesh_of):
    x = jnp.asarray(draw(4, 5, 6, 3), jnp.float32)
    shard = jax.shard_map(
        jax.value_and_grad(lambda x: lax.psum(simam(x).sum(), "data")),
        mesh=mesh_of(4),
        in_specs=P("data"),
        out_specs=(P(), P("data")),
    )
    value, grad = jax.jit(shard)(x)
    expected, expected_grad = jax.value_and_grad(lambda x: simam(x).sum())(x)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    np.testing.assert_allclose(grad, expected_grad, rtol=1e-5, atol=1e-6)


def test_what_is_kept_for_the_gradient_is_the_map_and_three_numbers_a_channel():
    x = jnp.asarray(draw(2, 16, 16, 8), jnp.bfloat16)
    _, vjp = jax.vjp(simam, x)
    kept = sorted(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(vjp))
    assert kept == [2 * 8 * 4] * 3 + [x.size * 2]


@pytest.mark.skipif(
    jax.default_backend() != "cpu", reason="what is kept is XLA's choice; this is the lowering for CPUs"
)
def test_compiled_for_a_cpu_the_weights_are_not_kept_either():
    x, layers = jnp.zeros((4, 32, 32, 16)), 10

    def loss(x):
        for i in range(layers):
            x = simam(jnp.sin(x + i))
        return x.sum()

    kept = jax.jit(jax.grad(loss)).lower(x).compile().memory_analysis().temp_size_in_bytes / x.nbytes
    assert kept < 2.5 * layers  # a layer: x, and of what x is the sine


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_result_has_the_dtype_of_the_input(dtype: str):
    x = jnp.asarray(draw(2, 8, 8, 3), dtype)
    y, weights = jax.jit(simam)(x), simam_weights(x)
    assert y.dtype == weights.dtype == x.dtype
    exact = np.float64(x) * formula(np.float64(x), 1e-4)
    np.testing.assert_allclose(np.float64(y), exact, rtol=2 * float(jnp.finfo(dtype).eps))


def test_numpy_input():
    x = draw(4, 4, 3).astype(np.float32)
    np.testing.assert_array_equal(simam(x), simam(jnp.asarray(x)))


def test_float16_statistics_do_not_overflow():
    x = jnp.asarray(100 * draw(1, 112, 112, 2), jnp.float16)
    assert float(jnp.sum(x.astype(jnp.float32) ** 2)) > float(jnp.finfo(jnp.float16).max)
    exact = formula(np.float64(x), 1e-4)
    np.testing.assert_allclose(np.float64(simam_weights(x)), exact, rtol=1e-3)
    assert np.isfinite(np.asarray(jax.grad(lambda x: simam(x).astype(jnp.float32).sum())(x), np.float32)).all()


@pytest.mark.parametrize("mean", [0.0, 1e3, -1e4])
def test_a_mean_far_from_zero_costs_no_accuracy(mean: float):
    x = jnp.asarray(draw(2, 56, 56, 4) + mean, jnp.float32)
    np.testing.assert_allclose(simam_weights(x), formula(np.float64(x), 1e-4), rtol=2e-6)


def test_map_of_one_position_and_constant_map():
    half = 1 / (1 + np.exp(-0.5))
    np.testing.assert_allclose(simam(jnp.full((2, 1, 1, 3), 2.0)), 2 * half, rtol=1e-6)
    np.testing.assert_allclose(simam(jnp.full((2, 4, 4, 3), 2.0)), 2 * half, rtol=1e-6)
    grad = jax.grad(lambda x: simam(x).sum())(jnp.full((2, 1, 1, 3), 2.0))
    np.testing.assert_allclose(grad, half, rtol=1e-6)


@pytest.mark.parametrize(
    ("x", "e_lambda", "message"),
    [
        (np.ones((4, 4), np.float32), 1e-4, r"shape \(4, 4\)"),
        (np.ones((4, 4, 3), np.int32), 1e-4, "int32"),
        (np.ones((4, 4, 3), np.float32), 0.0, "got 0.0"),
        (np.ones((4, 4, 3), np.float32), -1.0, "got -1.0"),
        (np.ones((4, 4, 3), np.float32), float("nan"), "got nan"),
    ],
)
def test_wrong_input(x: np.ndarray, e_lambda: float, message: str):
    for function in (simam, simam_weights):
        with pytest.raises(UserError, match=message):
            function(x, e_lambda)


def test_an_unknown_implementation_is_an_error():
    with pytest.raises(UserError, match="Unknown implementation 'plain'"):
        simam(np.ones((4, 4, 3), np.float32), implementation="plain")


def test_module_has_no_parameters_and_sows_only_when_asked():
    x, module = jnp.asarray(draw(2, 4, 4, 3), jnp.float32), SimAM(0.1)
    assert module.init(jax.random.key(0), x) == {}
    np.testing.assert_array_equal(module.apply({}, x), simam(x, 0.1))
    y, state = module.apply({}, x, mutable=["intermediates"])
    np.testing.assert_array_equal(y, simam(x, 0.1))
    np.testing.assert_array_equal(state["intermediates"]["weights"][0], simam_weights(x, 0.1))


def test_squeeze_excite_against_numpy():
    x, module = draw(2, 4, 5, 32), SqueezeExcite(16)
    with jax.enable_x64(True):
        variables = module.init(jax.random.key(0), x)
        params = variables["params"]
        hidden = np.maximum(x.mean((1, 2)) @ np.asarray(params["fc_0"]["kernel"]), 0)
        gate = 1 / (1 + np.exp(-hidden @ np.asarray(params["fc_2"]["kernel"])))
        assert gate.std() > 0
        np.testing.assert_allclose(module.apply(variables, jnp.asarray(x)), x * gate[:, None, None], rtol=1e-12)


@pytest.mark.parametrize("module", [SqueezeExcite(16), CBAM(16)])
def test_modules_keep_shape_and_dtype(module):
    x = jnp.asarray(draw(2, 5, 4, 32), jnp.bfloat16)
    variables = module.init(jax.random.key(0), x)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
    y = module.apply(variables, x)
    assert y.shape == x.shape
    assert y.dtype == x.dtype


@pytest.mark.parametrize("kind", [SqueezeExcite, CBAM])
def test_reduction_larger_than_the_channels(kind):
    with pytest.raises(UserError, match="reduction of 16 leaves nothing of 8 channels"):
        kind(16).init(jax.random.key(0), jnp.ones((1, 4, 4, 8)))
