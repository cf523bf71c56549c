"""RoIAlign along one axis: where the bins of a roi lie, and the weight of every place of the axis in each of them."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from simam_jax.ops.boxes import exact_product, exact_quotient

# A sample has weight in a pixel if it is at most one place away. With more than four samples in a bin they are over 4/5
# of a place apart, so at most three are that near; a fourth is room for rounding. Up to four samples are all taken.
_NEAR = 4


class Bins(NamedTuple):
    """The bins of rois along one axis, in places of the map; arrays of one shape (...)."""

    start: jax.Array  # float32, where the first bin begins
    size: jax.Array  # float32, of one bin
    samples: jax.Array  # int32 in each bin, at most 0 for an empty roi


def bins(low: jax.Array, high: jax.Array, count: int, scale: jax.Array | float) -> Bins:
    """`count` bins from `low` to `high`, in pixels, on a map of `scale` places per pixel; pixel centres at 1/2."""
    start, end = low * scale - 0.5, high * scale - 0.5
    size = exact_quotient(end - start, count)
    return Bins(start, size, jnp.ceil(size).astype(jnp.int32))


def weights(of: Bins, count: int, pixels: jax.Array, size: jax.Array | int) -> jax.Array:
    """(..., count, P) float32: the weight of each of `pixels` (P,) int32, places of an axis of `size`, in each bin.

    A sample beyond -1 or `size` counts as zero; one between there and the border counts as the border.
    """
    start, bin_size, samples = (array[..., None, None] for array in of)
    places = jnp.maximum(samples, 1)
    first = start + exact_product(jnp.arange(count, dtype=jnp.float32)[:, None], bin_size)
    step = jnp.maximum(bin_size / places, 1e-6)
    nearest = jnp.floor((pixels - 1 - first) / step - 0.501)
    nearest = jnp.where(samples <= _NEAR, 0, jnp.clip(nearest, 0, places.astype(jnp.float32))).astype(jnp.int32)
    sample = nearest + jnp.arange(_NEAR, dtype=jnp.int32).reshape(-1, *[1] * nearest.ndim)
    at = first + exact_quotient(exact_product(sample + jnp.float32(0.5), bin_size), places)
    inside = (at >= -1) & (at <= size) & (sample < samples)
    distance = jnp.abs(jnp.clip(at, 0, size - 1) - pixels)
    return jnp.where(inside, jnp.maximum(1 - distance, 0), 0).sum(0) / places


class Tiles:
    """The tiles of an axis that the bins of one roi, or of several that share the only tile, have weights in."""

    def __init__(
        self,
        of: Bins,
        bins: int,
        extent: jax.Array,
        length: jax.Array | int,
        tile: int | None,
        multiple: int = 1,
    ) -> None:
        """
        Args:
            of: (K,) each.
            bins: in each roi.
            extent, length: places of the axis that count, and all.
            tile: places in a tile, at most `length`; None for one tile of the whole axis, whose `length` is an int.
            multiple: tiles begin at multiples of this, which divides `tile` and `length`.
        """
        self.of, self.bins, self.extent, self.length = of, bins, extent, length
        self.tile = length if tile is None else tile
        some = (of.samples > 0).any()
        if tile is None:
            self.first, self.count = jnp.int32(0), some.astype(jnp.int32)
            return

        def place(x: jax.Array) -> jax.Array:
            return jnp.clip(jnp.floor(x), 0, extent - 1).astype(jnp.int32)

        self.first = lax.div(place(of.start)[0], jnp.int32(multiple)) * multiple
        last = place(of.start + of.size * bins + 1)[0]
        self.count = jnp.where(some, lax.div(last - self.first, jnp.int32(tile)) + 1, 0)

    def at(self, i: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Where tile i begins, moved into the axis, and its weights (K, bins, tile)."""
        begins = self.first + i * self.tile
        corner = jnp.minimum(begins, self.length - self.tile)
        pixels = corner + jnp.arange(self.tile)
        own = weights(self.of, self.bins, pixels, self.extent)
        return corner, jnp.where(pixels >= begins, own, 0)
