"""SimAM over maps of any axes and of any size: signals, volumes, channels first, symbolic sizes, nothing at all."""

from functools import partial

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest

from simam_jax import SimAM, UserError, simam, simam_weights

LAYOUTS = [
    ((2, 9, 3), (-2,)),
    ((2, 4, 3, 5, 3), (-4, -3, -2)),
    ((2, 3, 5, 4), (-2, -1)),
    ((2, 3, 5, 4), (3, 2)),
    ((7,), (0,)),
]


def with_the_map_last(x, axes):
    """x as (rest, positions of the map), and how to go back."""
    axes = [axis % x.ndim for axis in axes]
    rest = [axis for axis in range(x.ndim) if axis not in axes]
    moved = x.transpose(*rest, *axes)
    shape = [x.shape[axis] for axis in rest]
    return moved.reshape(*shape, -1), lambda y: y.reshape(moved.shape).transpose(np.argsort([*rest, *axes]))


def formula(x, axes, e_lambda=0.1):
    flat, back = with_the_map_last(x, axes)
    d = (flat - flat.mean(-1, keepdims=True)) ** 2
    v = d.sum(-1, keepdims=True) / max(flat.shape[-1] - 1, 1)
    return back(1 / (1 + np.exp(-(d / (4 * (v + e_lambda)) + 0.5))))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(("shape", "axes"), LAYOUTS)
def test_any_axes_are_the_map(shape, axes):
    rng = np.random.default_rng(0)
    x, dy = rng.standard_normal((2, *shape))
    np.testing.assert_allclose(simam_weights(x, 0.1, axes=axes), formula(x, axes), rtol=1e-13)
    np.testing.assert_array_equal(SimAM(0.1, axes=axes).apply({}, x), simam(x, 0.1, axes=axes))
    fast, plain = (
        jax.vjp(partial(simam, e_lambda=0.1, axes=axes, implementation=how), jnp.asarray(x))
        for how in ("auto", "reference")
    )
    np.testing.assert_allclose(fast[0], x * formula(x, axes), rtol=1e-13)
    np.testing.assert_allclose(fast[1](jnp.asarray(dy))[0], plain[1](jnp.asarray(dy))[0], rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("axes", [(), (-4,), (3,), (-2, 1)])
def test_axes_that_are_not_there_or_there_twice(axes):
    with pytest.raises(UserError, match="axes"):
        simam(np.ones((4, 4, 3), np.float32), axes=axes)


@pytest.mark.parametrize("function", [simam, simam_weights, lambda x: SimAM(1e-4).apply({}, x)])
def test_symbolic_sizes_are_exported(function):
    x = np.random.default_rng(0).standard_normal((2, 6, 5, 3), np.float32)
    shape = jax.export.symbolic_shape("n, h, w, 3")
    exported = jax.export.export(jax.jit(function))(jax.ShapeDtypeStruct(shape, np.float32))
    np.testing.assert_allclose(exported.call(x), function(x), rtol=1e-5)
    np.testing.assert_allclose(exported.call(x[:, :1, :1]), function(x[:, :1, :1]), rtol=1e-5)


@pytest.mark.parametrize("shape", [(0, 4, 4, 3), (2, 0, 4, 3), (2, 4, 0, 3), (2, 4, 4, 0)])
@pytest.mark.parametrize("implementation", ["auto", "reference"])
def test_of_nothing_there_is_nothing(shape, implementation):
    value, gradient = jax.value_and_grad(lambda x: simam(x, implementation=implementation).sum())(jnp.zeros(shape))
    assert value == 0
    assert gradient.shape == simam_weights(jnp.zeros(shape)).shape == shape


def test_forward_mode_says_how_to_get_it():
    x = jnp.ones((1, 4, 4, 3))
    with pytest.raises(UserError, match='implementation="reference"'):
        jax.jvp(simam, (x,), (x,))
    jax.jvp(partial(simam, implementation="reference"), (x,), (x,))
