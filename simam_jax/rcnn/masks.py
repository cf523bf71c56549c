"""Instance masks: targets for the mask head, and its outputs pasted into the image; bitmaps cross as packed bits.

Packed bits are uint8 (..., H, ceil(W / 8)), the leftmost pixel in the highest bit, as `numpy.packbits(axis=-1)` gives.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from simam_jax.ops.bins import Tiles, bins, weights
from simam_jax.ops.boxes import exact_product
from simam_jax.ops.dispatch import by_platform, varying_as

SIZE = 28  # of a mask as the head sees it
THRESHOLD = 0.5  # probability from which a pixel is the object's
_TILE = (64, 128)  # pixels of a bitmap that one step reads


def pack(bitmaps: jax.Array) -> jax.Array:
    """(..., H, ceil(W / 8)) uint8 from (..., H, W) bool."""
    height, width = bitmaps.shape[-2:]
    pixels = jnp.pad(bitmaps.astype(jnp.uint8), [(0, 0)] * (bitmaps.ndim - 1) + [(0, -width % 8)])
    pixels = pixels.reshape(*bitmaps.shape[:-2], height, -1, 8)
    return (pixels << jnp.arange(7, -1, -1, dtype=jnp.uint8)).sum(-1, dtype=jnp.uint8)


def unpack(packed: jax.Array, width: int) -> jax.Array:
    """(..., H, width) bool from packed bits."""
    bits = (packed[..., None] >> jnp.arange(7, -1, -1, dtype=jnp.uint8)) & 1
    return bits.reshape(*packed.shape[:-1], -1)[..., :width].astype(bool)


@partial(jax.jit, static_argnames="tiled")
def mask_targets(
    packed: jax.Array,
    extent: jax.Array,
    boxes: jax.Array,
    indices: jax.Array,
    count: jax.Array,
    *,
    tiled: bool | None = None,
) -> jax.Array:
    """(P, 28, 28) bool: each positive roi's part of its ground truth's bitmap, by RoIAlign, at least half covered.

    Args:
        packed: (G, H, ceil(W / 8)) uint8, bitmaps of the ground truth in pixels of the network's input.
        extent: (2,) int32, the image's height and width padded for itself alone: the bitmaps end there.
        boxes: (P, 4) positive rois, of which the first `count` are real; the others get False.
        indices: (P,) int32 into the bitmaps.
        count: () int32.
        tiled: read only what a roi covers, roi by roi, instead of whole bitmaps, 16 rois at a time; None for what is
            best on this platform.
    """
    if not packed.shape[0]:
        return jnp.zeros((boxes.shape[0], SIZE, SIZE), bool)
    inputs = packed, extent, boxes, indices.astype(jnp.int32), jnp.asarray(count, jnp.int32)
    if tiled is None:
        return by_platform(packed, cpu=_targets_by_tiles, accelerator=_targets_by_bitmaps)(*inputs)
    return (_targets_by_tiles if tiled else _targets_by_bitmaps)(*inputs)


def _targets_by_bitmaps(
    packed: jax.Array, extent: jax.Array, boxes: jax.Array, indices: jax.Array, count: jax.Array
) -> jax.Array:
    height, width = packed.shape[1], packed.shape[2] * 8

    def one_box(box_and_index: tuple[jax.Array, jax.Array]) -> jax.Array:
        (x1, y1, x2, y2), index = box_and_index
        rows = weights(bins(y1, y2, SIZE, 1.0), SIZE, jnp.arange(height), extent[0])
        columns = weights(bins(x1, x2, SIZE, 1.0), SIZE, jnp.arange(width), extent[1])
        pixels = unpack(packed[index], width).astype(jnp.float32)
        across = jnp.einsum("hw,qw->hq", pixels, columns, precision="highest")
        return jnp.einsum("ph,hq->pq", rows, across, precision="highest") >= 0.5

    targets = lax.map(one_box, (boxes, indices), batch_size=16)
    return targets & (jnp.arange(boxes.shape[0]) < count)[:, None, None]


def _targets_by_tiles(
    packed: jax.Array, extent: jax.Array, boxes: jax.Array, indices: jax.Array, count: jax.Array
) -> jax.Array:
    height, width = packed.shape[1], packed.shape[2] * 8
    inputs = packed, extent, boxes, indices, count
    targets = varying_as(jnp.zeros((boxes.shape[0], SIZE, SIZE), jnp.float32), inputs)
    tile = min(_TILE[0], height), min(_TILE[1], width)

    def one_box(i: jax.Array, targets: jax.Array) -> jax.Array:
        x1, y1, x2, y2 = boxes[i][:, None]
        rows = Tiles(bins(y1, y2, SIZE, 1.0), SIZE, extent[0], height, tile[0])
        columns = Tiles(bins(x1, x2, SIZE, 1.0), SIZE, extent[1], width, tile[1], multiple=8)

        def keep(j: jax.Array, state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            corner, own = rows.at(j)
            return state[0].at[j].set(corner), state[1].at[j].set(own[0])

        most = -(-height // tile[0])
        none = jnp.zeros(most, jnp.int32), jnp.zeros((most, SIZE, tile[0]), jnp.float32)
        corners, of_rows = lax.fori_loop(
            0, rows.count, keep, varying_as(none, inputs)
        )  # once, not for every tile of a row

        def one_column(k: jax.Array, covered: jax.Array) -> jax.Array:
            x, of_columns = columns.at(k)

            def one_tile(j: jax.Array, covered: jax.Array) -> jax.Array:
                at = (indices[i], corners[j], x // 8)
                bits = lax.dynamic_slice(packed, at, (1, tile[0], tile[1] // 8))[0]
                pixels = unpack(bits, tile[1]).astype(jnp.float32)
                across = jnp.einsum("hw,qw->hq", pixels, of_columns[0], precision="highest")
                return covered + jnp.einsum("ph,hq->pq", of_rows[j], across, precision="highest")

            return lax.fori_loop(0, rows.count, one_tile, covered)

        nothing = varying_as(jnp.zeros((SIZE, SIZE), jnp.float32), inputs)
        covered = lax.fori_loop(0, columns.count, one_column, nothing)
        return targets.at[i].set(covered)

    return lax.fori_loop(0, count, one_box, targets) >= 0.5


@partial(jax.jit, static_argnames=("size", "threshold"))
def paste(
    probabilities: jax.Array,
    boxes: jax.Array,
    corner: jax.Array | tuple[int, int] = (0, 0),
    *,
    size: tuple[int, int],
    threshold: float = THRESHOLD,
) -> jax.Array:
    """Packed bits (D, H, ceil(W / 8)): where a mask, stretched over its box, is at least `threshold`.

    Args:
        probabilities: (D, 28, 28) float32.
        boxes: (D, 4) in the image's pixels.
        corner: row and column of the image at which the canvas begins.
        size: height and width of the canvas.
    """

    top, left = corner

    def one_mask(mask: jax.Array, box: jax.Array) -> jax.Array:
        x1, y1, x2, y2 = box
        y, x = _stretch(y1, y2, top + jnp.arange(size[0])), _stretch(x1, x2, left + jnp.arange(size[1]))
        rows = jnp.einsum("hp,pq->hq", y, mask, precision="highest")
        return pack(jnp.einsum("hq,wq->hw", rows, x, precision="highest") >= jnp.float32(threshold))

    return lax.map(lambda row: one_mask(*row), (probabilities, boxes))


def _stretch(low: jax.Array, high: jax.Array, pixels: jax.Array) -> jax.Array:
    """(P, 28) bilinear weights of a mask's 28 places, stretched from `low` to `high`, in P pixels of an axis.

    Places beyond the mask are zero. Only pixels from one before the box to one after it are written, as in the reference
    implementation on CPUs. A box without width shows the mask's centre there.
    """
    pixels = pixels.astype(jnp.float32)
    width = high - low
    relative = jnp.where(width == 0, 0, (pixels + 0.5 - low) / jnp.where(width == 0, 1, width) * 2 - 1)
    at = (exact_product(relative + 1, jnp.float32(SIZE)) - 1) / 2
    bilinear = jnp.maximum(1 - jnp.abs(at[:, None] - jnp.arange(SIZE)), 0)
    written = (pixels >= jnp.floor(low) - 1) & (pixels < jnp.ceil(high) + 1)
    return jnp.where(written[:, None], bilinear, 0)
