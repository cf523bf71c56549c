"""Winograd's minimal filtering for 3x3 kernels: 16 products for 2x2 results where the definition takes 36.

F(2x2, 3x3) of Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks" (CVPR 2016), section 4.1. Its
coefficients are 0, 1 and 1/2, so little is lost to rounding: errors are of the order of the definition's own.
"""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp

from simam_jax.ops.parts import in_parts, overlapping_bands
from simam_jax.ops.pooling import windows_of_four

Arrays = Sequence[jax.Array]


def convolve_3x3(x: jax.Array, kernel: jax.Array, bands: int = 1) -> jax.Array:
    """Convolution of x (N, H, W, C) with kernel (3, 3, C, O) at stride 1, one zero on every side: (N, H, W, O).

    With several `bands` the rows are computed in that many groups, or fewer, one after the other, and for the gradient only
    x is kept.
    """
    count, height, width, _ = x.shape
    rows, columns = -(-height // (2 * bands)), (width + 1) // 2  # of tiles in a band
    bands = -(-height // (2 * rows))
    x = jnp.pad(x, ((0, 0), (1, 2 * rows * bands + 1 - height), (1, 2 * columns + 1 - width), (0, 0)))
    transformed = [
        _kernel_transform([row[0], row[1], row[2]]) for row in _kernel_transform([kernel[0], kernel[1], kernel[2]])
    ]
    if bands == 1:
        y = _of_tiles(x, transformed)
    else:
        of_band = jax.checkpoint(partial(_of_tiles, transformed=transformed), prevent_cse=False)
        y = in_parts(of_band, overlapping_bands(x, 2 * rows, overlap=2), size=1)
    return y.reshape(count, 2 * rows * bands, 2 * columns, -1)[:, :height, :width]


def _of_tiles(x: jax.Array, transformed: Sequence[Arrays]) -> jax.Array:
    """The convolution of x (N, 2 R + 2, 2 C + 2, C) without padding, by the transformed kernel: (N, 2 R, 2 C, O)."""
    count, height, width, channels = x.shape
    rows, columns = height // 2 - 1, width // 2 - 1
    tiles = [_input_transform(windows_of_four(row, axis=2)) for row in _input_transform(windows_of_four(x, axis=1))]
    products = [
        [tile.reshape(-1, channels) @ weights for tile, weights in zip(*pair, strict=True)]
        for pair in zip(tiles, transformed, strict=True)
    ]
    left, right = zip(*(_output_transform(row) for row in products), strict=True)
    halves = [jnp.stack(pair, 1) for pair in zip(_output_transform(left), _output_transform(right), strict=True)]
    y = jnp.stack([half.reshape(count, rows, 2 * columns, -1) for half in halves], 2)
    return y.reshape(count, 2 * rows, 2 * columns, -1)


def _input_transform(d: Arrays) -> Arrays:
    return [d[0] - d[2], d[1] + d[2], d[2] - d[1], d[1] - d[3]]


def _kernel_transform(g: Arrays) -> Arrays:
    return [g[0], (g[0] + g[1] + g[2]) / 2, (g[0] - g[1] + g[2]) / 2, g[2]]


def _output_transform(m: Arrays) -> Arrays:
    return [m[0] + m[1] + m[2], m[1] - m[2] - m[3]]
