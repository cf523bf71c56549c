"""A batch in parts, one after the other: on CPUs, where what is computed of a few images stays in the caches."""

from collections.abc import Callable
from typing import Any

import jax
from jax import lax


def part_size(count: int, most: float) -> int:
    """The largest number of images, up to `most`, that divides `count` of them; at least 1, and 0 of none."""
    return max((n for n in range(1, count + 1) if count % n == 0 and (n == 1 or n <= most)), default=0)


def in_parts(f: Callable[[jax.Array], Any], x: jax.Array, size: int) -> Any:
    """f(x) of x (N, ...), `size` images at a time; f returns arrays (n, ...) of n images."""
    parts = lax.map(f, x.reshape(-1, size, *x.shape[1:]))
    return jax.tree.map(lambda y: y.reshape(-1, *y.shape[2:]), parts)
