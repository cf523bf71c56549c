"""SimAM, the batch norm after it and the activation after that as one operation; on CPUs it keeps only x for its gradient.

Unfused, x and SimAM(x) are both stored for the backward pass. On CPUs this operation stores x and recomputes SimAM(x), with
the weights that SimAM's gradient needs anyway. The activation belongs to it because XLA recomputes the mask of a ReLU from
what batch norm read, and would keep SimAM(x) for that. On accelerators XLA fuses the three as well by itself.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax

from simam_jax.ops.batch_norm import GroupMoments, batch_norm
from simam_jax.ops.dispatch import choose
from simam_jax.ops.moments import Moments
from simam_jax.ops.simam import (
    channel_stats,
    gradient_from_weights,
    scale_by_attention,
    simam,
    weights_after,
)

Activation = Callable[[jax.Array], jax.Array]  # of every number on its own


class Settings(NamedTuple):
    """The static arguments: everything but arrays."""

    e_lambda: float
    epsilon: float
    group_moments: GroupMoments
    activation: Activation


def simam_batch_norm(
    x: jax.Array,
    shift: jax.Array,
    scale: jax.Array,
    bias: jax.Array,
    *,
    e_lambda: float,
    epsilon: float,
    group_moments: GroupMoments = lambda own: own,
    activation: Activation = lambda x: x,
) -> tuple[jax.Array, Moments]:
    """activation(batch_norm(simam(x))), and the moments of simam(x) - shift.

    Args:
        x: (G, n, HW, C), G groups of n images.
        e_lambda, activation: of SimAM, and what follows batch norm.
        The others as for `batch_norm`.
    """
    form = choose(x, _unfused, cpu=_recompute_once)
    return form(x, shift, scale, bias, Settings(e_lambda, epsilon, group_moments, activation))


def _unfused(x: jax.Array, shift: jax.Array, scale: jax.Array, bias: jax.Array, settings: Settings):
    return _after_simam(simam(x, settings.e_lambda, axes=(-2,)), shift, scale, bias, settings)


def _after_simam(y: jax.Array, shift: jax.Array, scale: jax.Array, bias: jax.Array, settings: Settings):
    z, moments = batch_norm(y, shift, scale, bias, epsilon=settings.epsilon, group_moments=settings.group_moments)
    return settings.activation(z), moments


# ---- on CPUs


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _recompute_once(x: jax.Array, shift: jax.Array, scale: jax.Array, bias: jax.Array, settings: Settings):
    return _forward_once(x, shift, scale, bias, settings)[0]


def _forward_once(x: jax.Array, shift: jax.Array, scale: jax.Array, bias: jax.Array, settings: Settings):
    stats = channel_stats(x, settings.e_lambda, (-2,))
    return _after_simam(scale_by_attention(x, stats), shift, scale, bias, settings), (x, stats, (shift, scale, bias))


def _backward_once(settings: Settings, residuals: Any, cotangents: Any) -> Any:
    x, stats, others = residuals
    s = weights_after(cotangents[0], x, stats)
    y = (x * s).astype(x.dtype)
    pullback: Any = jax.vjp(partial(_after_simam, settings=settings), y, *others)[1]
    dy, *of_others = pullback(cotangents)
    return gradient_from_weights(dy, x, s, stats, (-2,)), *of_others


_recompute_once.defvjp(_forward_once, _backward_once)
