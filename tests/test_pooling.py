"""Pooling, and that the gradient of max pooling is that of its definition on every kind of map."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from simam_jax.ops.pooling import average_pool_2x2, max_pool


def test_pooling_of_odd_maps():
    x = jnp.arange(25.0).reshape(1, 5, 5, 1) - 50
    np.testing.assert_array_equal(max_pool(x)[0, :, :, 0] + 50, [[6, 8, 9], [16, 18, 19], [21, 23, 24]])
    np.testing.assert_array_equal(average_pool_2x2(x)[0, :, :, 0] + 50, [[3, 5, 6.5], [13, 15, 16.5], [20.5, 22.5, 24]])


def first_winners(x):
    """Values of max pooling, and the flat index in x of the first of the greatest in each window."""
    count, height, width, channels = x.shape
    values = np.empty((count, (height + 1) // 2, (width + 1) // 2, channels))
    winners = np.empty(values.shape, int)
    for n, i, j, c in np.ndindex(values.shape):
        rows, columns = (
            range(max(2 * i - 1, 0), min(2 * i + 2, height)),
            range(max(2 * j - 1, 0), min(2 * j + 2, width)),
        )
        best = max(((row, column) for row in rows for column in columns), key=lambda place: x[n, *place, c])
        values[n, i, j, c] = x[n, *best, c]
        winners[n, i, j, c] = np.ravel_multi_index((n, *best, c), x.shape)
    return values, winners


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(("height", "width"), [(7, 8), (8, 7), (1, 2)])
def test_max_pool_s_gradient_goes_to_the_first_of_the_greatest(height, width):
    rng = np.random.default_rng(0)
    x = np.maximum(rng.integers(-3, 4, (2, height, width, 3)), 0.0)  # many are equal
    values, winners = first_winners(x)
    dx, dy = rng.standard_normal(x.shape), rng.standard_normal(values.shape)
    expected = np.zeros(x.size)
    np.add.at(expected, winners.ravel(), dy.ravel())

    @jax.jit
    def everything(x, dx, dy):
        y, tangent = jax.jvp(max_pool, (x,), (dx,))
        return y, tangent, *jax.vjp(max_pool, x)[1](dy)

    y, tangent, gradient = everything(x, dx, dy)
    np.testing.assert_array_equal(y, values)
    np.testing.assert_array_equal(tangent, dx.ravel()[winners])
    np.testing.assert_allclose(gradient, expected.reshape(x.shape), rtol=1e-14, atol=1e-14)
