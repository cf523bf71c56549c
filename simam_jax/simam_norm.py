"""SimAM and the batch norm that follows it as one function, for GPUs: SimAM's output and its gradient are never stored.

On its own SimAM writes y = SimAM(x) for batch norm to read twice, and reads, twice, the dy that batch norm's gradient
wrote. Here every pass computes y anew from x, which costs a GPU less than moving it. See docs/mathematics.md.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from simam_jax.attention import centred_and_weights, degrees_of_freedom, simam, statistics
from simam_jax.layers import Affine, Normalise, at_least_float32, normalise

_LANES = 512  # numbers in a row from which on XLA computes elements and sums columns in one kernel


def simam_then_normalise(e_lambda: float) -> Normalise:
    """`layers.normalise` of SimAM(x) instead of x (G, n, HW, C)."""

    def f(x: jax.Array, shift: jax.Array, scale: jax.Array, bias: jax.Array, affine: Affine):
        def separate(x, shift, scale, bias):
            return normalise(simam(x[..., None, :], e_lambda)[..., 0, :], shift, scale, bias, affine)

        # On CPUs exponentials cost more than memory; on TPUs nothing was measured.
        return lax.platform_dependent(x, shift, scale, bias, cuda=_fused(affine, e_lambda), default=separate)

    return f


def _fused(affine: Affine, e_lambda: float) -> Callable[..., Any]:
    """The same in three passes over x, and three over x and dy for the gradient; x is all that is kept of a map's size."""

    @jax.custom_vjp
    def f(x, shift, scale, bias):
        return forward(x, shift, scale, bias)[0]

    def forward(x, shift, scale, bias):
        of_x = [each[..., 0, :] for each in statistics(x[..., None, :], e_lambda)]
        in_rows, per_place, sums = _views(x)
        of_x_in_rows, shift_in_rows = [per_place(each) for each in of_x], per_place(shift)

        def shifted(x):
            wide = in_rows(x).astype(at_least_float32(x.dtype))
            return wide * centred_and_weights(wide, *of_x_in_rows)[1] - shift_in_rows

        x = _hold(x, *of_x)
        about_shift = shifted(x)
        means = [(sums(each) / x.shape[2]).mean(1) for each in (about_shift, jnp.square(about_shift))]

        def on_each_device(mean, square, *others):
            # Under shard_map a sum varies over the devices as its terms do: so does what the gradient then sums over them.
            (factor, offset), statistics_of_y = affine(mean, jnp.maximum(square - jnp.square(mean), 0), *others)
            return (factor + jnp.zeros_like(mean), offset + jnp.zeros_like(mean)), statistics_of_y

        ((factor, offset), statistics_of_y), pullback = jax.vjp(on_each_device, *means, scale, bias)
        x = _hold(x, factor, offset)
        y = shifted(x) * per_place(factor[:, None, None]) + per_place(offset[:, None, None])
        return (y.astype(x.dtype).reshape(x.shape), statistics_of_y), (x, of_x, shift, factor, pullback)

    def backward(residuals, cotangents):
        x, of_x, shift, factor, pullback = residuals
        dz, of_statistics = cotangents
        in_rows, per_place, sums = _views(x)
        of_x_in_rows = [per_place(each) for each in of_x]
        a, a_in_rows = of_x[-1], of_x_in_rows[-1]

        def terms(x, dz):
            wide, dz = (in_rows(each).astype(at_least_float32(x.dtype)) for each in (x, dz))
            return wide, *centred_and_weights(wide, *of_x_in_rows), dz

        wide, _, s, dz_wide = terms(x, dz)
        dfactor = sums(dz_wide * (wide * s - per_place(shift))).sum(1)
        dmean, dsquare, dscale, dbias = pullback(((dfactor, sums(dz_wide).sum(1)), of_statistics))
        # dy = dz factor + (dmean + 2 dsquare (y - shift)) / count, in one number a channel for each of dz, 1 and y.
        count = x.shape[1] * x.shape[2]
        through_y = 2 * dsquare / count
        constant = dmean / count - through_y * shift
        coefficients = [each[:, None, None] for each in (factor, constant, through_y)]
        x, dz = _hold((x, dz), *coefficients)
        of_dz, of_1, of_y = map(per_place, coefficients)

        def of_simam(x, dz):
            wide, c, s, dz = terms(x, dz)
            dy = dz * of_dz + of_1 + of_y * (wide * s)
            return c, dy * s, dy * wide * s * (1 - s) * c

        c, _, h = of_simam(x, dz)
        mean_h = sums(h)[:, :, None] / x.shape[2]
        of_c = 8 * jnp.square(a) * sums(h * c)[:, :, None] / degrees_of_freedom(x[..., None, :])
        x, dz = _hold((x, dz), mean_h, of_c)
        c, through_x, h = of_simam(x, dz)
        dx = through_x + 2 * a_in_rows * (h - per_place(mean_h)) - c * per_place(of_c)
        return dx.astype(x.dtype).reshape(x.shape), jnp.zeros_like(shift), dscale, dbias

    f.defvjp(forward, backward)
    return f


def _views(x: jax.Array):
    """How x (G, n, HW, C) is seen as rows of several places, (G, n, HW / k, k C); what repeats a channel's numbers
    (..., C) in each place of a row; and the sums of such rows, (G, n, C): of rows first, then of the places in them."""
    places, channels = x.shape[2:]
    # One place to a row is no choice: in float32 XLA then transposes the map.
    k = next((k for k in range(2, places) if places % k == 0 and k * channels >= _LANES), 1)

    def in_rows(x):
        return x.reshape(*x.shape[:2], -1, k * channels)

    def per_place(values):
        return jnp.tile(values, (1,) * (values.ndim - 1) + (k,))

    def sums(rows):
        return rows.sum(2).reshape(*rows.shape[:2], k, channels).sum(2)

    return in_rows, per_place, sums


def _hold(x, *numbers):
    """x, once the numbers are there: what was computed from it before is then computed again and not stored."""
    return lax.optimization_barrier((x, numbers))[0]
