"""SimAM, the batch norm that follows it and the activation after that as one function, which keeps only x for its gradient.

On its own batch norm keeps SimAM's output y, as large as x, which SimAM keeps. Here y is computed again for the gradient: on
CPUs once, with the weights that SimAM's gradient takes anyway; on GPUs, which compute cheaper than they move, in every pass,
so that neither y nor its gradient is ever stored. See docs/mathematics.md.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from simam_jax.attention import (
    attended,
    centred_and_weights,
    degrees_of_freedom,
    gradient_from_weights,
    simam,
    statistics,
    weights_after,
)
from simam_jax.layers import Affine, Normalise, at_least_float32, normalise

Activation = Callable[[jax.Array], jax.Array]  # of every number on its own

_LANES = 512  # numbers in a row from which on XLA computes elements and sums columns in one kernel


def simam_then_normalise(e_lambda: float, activation: Activation) -> Normalise:
    """`layers.normalise` of SimAM(x) instead of x (G, n, HW, C), and `activation` of what comes of it."""

    def f(x: jax.Array, shift: jax.Array, scale: jax.Array, bias: jax.Array, affine: Affine):
        def activated(normalised):
            def g(*args):
                z, moments = normalised(*args)
                return activation(z), moments

            return g

        def after_simam(y, shift, scale, bias):
            return normalise(y, shift, scale, bias, affine)

        def apart(x, *others):
            return after_simam(simam(x[..., None, :], e_lambda)[..., 0, :], *others)

        on_gpu, on_cpu = _in_every_pass(affine, e_lambda), _kept_as_x(activated(after_simam), e_lambda)
        forms = {"cuda": activated(on_gpu), "cpu": on_cpu, "default": activated(apart)}  # on TPUs nothing was measured
        return lax.platform_dependent(x, shift, scale, bias, **forms)

    return f


def _kept_as_x(after_simam: Callable[..., Any], e_lambda: float) -> Callable[..., Any]:
    """after_simam(SimAM(x), *others), which keeps x instead of SimAM(x) for its gradient, and computes x s again there."""

    @jax.custom_vjp
    def f(x, *others):
        return forward(x, *others)[0]

    def forward(x, *others):
        of_x = statistics(x[..., None, :], e_lambda)
        return after_simam(attended(x[..., None, :], *of_x)[..., 0, :], *others), (x, of_x, others)

    def backward(residuals, cotangents):
        x, of_x, others = residuals
        map_ = x[..., None, :]
        s = weights_after(cotangents[0], map_, *of_x)
        y = (map_ * s)[..., 0, :].astype(x.dtype)
        dy, *of_others = jax.vjp(after_simam, y, *others)[1](cotangents)
        return gradient_from_weights(dy[..., None, :], map_, s, *of_x)[..., 0, :], *of_others

    f.defvjp(forward, backward)
    return f


def _in_every_pass(affine: Affine, e_lambda: float) -> Callable[..., Any]:
    """SimAM and batch norm in three passes over x, and three over x and dz for the gradient."""

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
