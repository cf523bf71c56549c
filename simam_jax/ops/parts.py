"""A batch, or an image, in parts, one after the other: on CPUs, what is computed of a few images or rows stays in the caches."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from simam_jax.ops.dispatch import choose, varying_as

ROWS = 32  # that are computed at once where others may be none
PIXELS = 2**19  # of images whose maps stay in a CPU's caches: eight of 224 x 224


def part_size(count: int, most: float) -> int:
    """The largest number of images, up to `most`, that divides `count` of them; at least 1, and 0 of none."""
    return max((n for n in range(1, count + 1) if count % n == 0 and (n == 1 or n <= most)), default=0)


def in_parts(f: Callable[[jax.Array], Any], x: jax.Array, size: int) -> Any:
    """f(x) of x (N, ...), `size` images at a time; f returns arrays (n, ...) of n images."""
    parts = lax.map(f, x.reshape(-1, size, *x.shape[1:]))
    return jax.tree.map(lambda y: y.reshape(-1, *y.shape[2:]), parts)


def overlapping_bands(x: jax.Array, step: int, overlap: int) -> jax.Array:
    """x (N, B * step + overlap, ...) as bands of step + overlap rows, of which neighbours share `overlap`: (N * B, ...)."""
    rows = x[:, : x.shape[1] - overlap].reshape(x.shape[0], -1, step, *x.shape[2:])
    shared = jnp.stack([x[:, first::step] for first in range(step, step + overlap)], 2)
    return jnp.concatenate((rows, shared), 2).reshape(-1, step + overlap, *x.shape[2:])


def apply_in_parts(f: Callable[[jax.Array], Any], images: jax.Array) -> Any:
    """f(images) for inference: on CPUs so few images of a large batch at a time that their maps stay in the caches.

    Args:
        f: from images (n, H, W, C) to arrays with a row an image, each of which depends on its own image alone.
        images: (N, H, W, C).
    """
    return choose(images, f, cpu=partial(_in_cached_parts, f))(images)


def _in_cached_parts(f: Callable[[jax.Array], Any], images: jax.Array) -> Any:
    count, height, width, _ = images.shape
    most = max(PIXELS / max(height * width, 1), 1)
    size = part_size(count, most)
    # Parts of half that size or less, of a batch that divides badly, would be slower than the whole.
    return f(images) if size == count or size <= most / 2 else in_parts(f, images, size)


def apply_to_valid(f: Callable[..., jax.Array], valid: jax.Array, *rows: jax.Array) -> jax.Array:
    """f(*rows), an array with a row for each of theirs; on CPUs some rows at a time, and zeros instead where none is valid.

    Args:
        f: each of its rows depends on that row of the inputs alone.
        valid: (R,) bool.
        rows: arrays (R, ...).
    """
    return choose(rows[0], _apply_to_all, cpu=_skip_invalid)(f, valid, *rows)


def _apply_to_all(f: Callable[..., jax.Array], valid: jax.Array, *rows: jax.Array) -> jax.Array:  # noqa: ARG001
    return f(*rows)


def _skip_invalid(f: Callable[..., jax.Array], valid: jax.Array, *rows: jax.Array) -> jax.Array:
    def of_part(part: tuple[jax.Array, ...]) -> jax.Array:
        valid, *rows = part
        result = jax.eval_shape(f, *rows)
        nothing = varying_as(jnp.zeros(result.shape, result.dtype), *rows)
        return lax.cond(valid.any(), f, lambda *_: nothing, *rows)

    size = part_size(len(valid), ROWS)
    y = lax.map(of_part, tuple(x.reshape(-1, size, *x.shape[1:]) for x in (valid, *rows)))
    return y.reshape(-1, *y.shape[2:])
