"""Mean and variance in one pass, against NumPy in float64, near zero and far from it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from simam_jax.ops.moments import moments

AXES = 1, 2


def draw(mean: float, dtype: type = np.float64) -> np.ndarray:
    return (np.random.default_rng(0).standard_normal((2, 31, 17, 5)) + mean).astype(dtype)


@pytest.mark.parametrize("mean", [0.0, 3.0, 20.0, 1000.0])
@pytest.mark.parametrize("distance", [0.0, 0.5])  # of the shift from the mean, in deviations
def test_float32_keeps_five_digits_of_the_variance(mean: float, distance: float):
    x = draw(mean, np.float32)
    shift = jnp.full((2, 1, 1, 5), mean + distance, jnp.float32)
    of_x, var = jax.jit(moments, static_argnums=2)(x, shift, AXES)
    exact = np.float64(x)
    np.testing.assert_allclose(of_x, (exact - np.float64(shift)).mean(AXES, keepdims=True), atol=2e-6)
    np.testing.assert_allclose(var, exact.var(AXES, keepdims=True), rtol=1e-5)


def test_one_channel_far_from_zero_among_others():
    x = draw(0.0, np.float32)
    x[1, ..., 3] += 5000
    _, var = moments(x, jnp.asarray(x[:, :1, :1]), AXES)
    np.testing.assert_allclose(var, np.float64(x).var(AXES, keepdims=True), rtol=1e-5)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("mean", [0.0, 100.0])  # by either branch
def test_derivatives_are_those_of_the_formula(mean: float):
    def formula(x, shift):
        return (x - shift).mean(AXES, keepdims=True), x.var(AXES, keepdims=True)

    x, shift = jnp.asarray(draw(mean)), jnp.full((2, 1, 1, 5), mean + 0.3)
    tangents = jnp.asarray(draw(0.0))[::-1], jnp.full((2, 1, 1, 5), 0.7)
    ours = jax.jvp(lambda *inputs: tuple(moments(*inputs, AXES)), (x, shift), tangents)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9), ours, jax.jvp(formula, (x, shift), tangents))

    def curvature(f):
        return jax.grad(lambda x: jnp.vdot(jax.grad(lambda x: (f(x)[1] ** 2).sum())(x), tangents[0]))(x)

    np.testing.assert_allclose(
        curvature(lambda x: moments(x, shift, AXES)), curvature(lambda x: formula(x, shift)), rtol=1e-9, atol=1e-12
    )
    mapped = jax.vmap(lambda x, shift: tuple(moments(x[None], shift[None], AXES)))(x, shift)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a[:, 0], b, rtol=1e-9), mapped, ours[0])
