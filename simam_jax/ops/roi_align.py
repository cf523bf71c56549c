"""RoIAlign (He et al., "Mask R-CNN", 2017, section 3) over a feature pyramid, as two small matrix products for each roi.

A bin's value is the mean over a grid of samples, as many in each direction as the bin is wide and high in places of the
map, rounded up. Bilinear interpolation and the mean both separate, so all bins of a roi are `Wy F Wx^T`, where a row of
Wy holds one bin's weights of the map's rows: exact for any number of samples, and with sizes that do not depend on it.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from simam_jax.ops.bins import Tiles, bins
from simam_jax.ops.dispatch import by_platform, varying_as


class Form(NamedTuple):
    """How the work is cut: `chunk` rois at a time read one window of at most `tile` rows and columns after the other."""

    chunk: int
    tile: int | None  # None: the whole map, which all rois of a chunk share


# CPUs read no more than a roi covers. Accelerators multiply by the whole map: no gather, no scatter, no small steps.
CPU = Form(chunk=1, tile=16)
ACCELERATOR = Form(chunk=64, tile=None)


@partial(jax.jit, static_argnames=("size", "stride", "form"))
def roi_align(
    maps: Sequence[jax.Array],
    extents: jax.Array,
    rois: jax.Array,
    levels: jax.Array,
    valid: jax.Array,
    *,
    size: int,
    stride: int = 4,
    form: Form | None = None,
) -> jax.Array:
    """The features of rois, each from one level of the pyramid; differentiable in the maps.

    Unlike the other operations it takes a batch of images, because under vmap the gradient's running sum over rois
    would be copied at every step.

    Args:
        maps: the levels, finest first, each (N, H, W, C) floating, with half the resolution of the one before.
        extents: (N, 2) int32, the height and width in pixels of what is no padding to a batch's size: the map ends there,
            and samples next to its end take the last place's value.
        rois: (N, R, 4) float32 x1, y1, x2, y2 in pixels of the network's input. Empty ones get zeros.
        levels: (N, R) int32, indices into `maps`.
        valid: (N, R) bool: False for padding, which gets zeros.
        size: bins in each direction: 7 for boxes, 14 for masks.
        stride: pixels per place of the finest map.
        form: how the work is cut; None for this platform's own.

    Returns:
        (N, R, size, size, C) of the maps' dtype; sums are float32.
    """
    boxes = jnp.asarray(rois, jnp.float32)
    fixed = _Rois(*(lax.stop_gradient(jnp.asarray(x)) for x in (extents, boxes, levels, valid)))
    return _roi_align(tuple(jnp.asarray(x) for x in maps), fixed, size, stride, form)


class _Rois(NamedTuple):
    extents: jax.Array
    boxes: jax.Array
    levels: jax.Array
    valid: jax.Array


@partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _roi_align(maps: tuple[jax.Array, ...], rois: _Rois, size: int, stride: int, form: Form | None) -> jax.Array:
    return _in_form(_value, form, size, stride, maps, rois)


def _roi_align_forward(
    maps: tuple[jax.Array, ...], rois: _Rois, size: int, stride: int, form: Form | None
) -> tuple[jax.Array, tuple[tuple[jax.Array, ...], _Rois]]:
    # Empty arrays carry the maps' shapes and dtype: the gradient does not depend on the maps.
    shapes = tuple(jnp.zeros((*x.shape[:-1], 0), x.dtype) for x in maps)
    return _roi_align(maps, rois, size, stride, form), (shapes, rois)


def _roi_align_backward(
    size: int, stride: int, form: Form | None, residuals: tuple[tuple[jax.Array, ...], _Rois], dy: jax.Array
) -> tuple[tuple[jax.Array, ...], None]:
    return _in_form(_gradient, form, size, stride, *residuals, dy), None


_roi_align.defvjp(_roi_align_forward, _roi_align_backward)


def _in_form(f: Callable[..., Any], form: Form | None, size: int, stride: int, *inputs: Any) -> Any:
    if form is not None:
        return f(form, size, stride, *inputs)
    return by_platform(
        inputs[0][0], cpu=partial(f, CPU, size, stride), accelerator=partial(f, ACCELERATOR, size, stride)
    )(*inputs)


def _value(form: Form, size: int, stride: int, maps: tuple[jax.Array, ...], rois: _Rois) -> jax.Array:
    groups = _Groups(form, rois, stride, [(x.shape[1], x.shape[2]) for x in maps])
    channels = maps[0].shape[-1]
    padded = groups.pad(maps)
    out = varying_as(jnp.zeros((groups.padded, size, size, channels), jnp.float32), maps, rois)
    for levels in groups.loops:

        def add(out: jax.Array, window: _Window, levels: range = levels) -> jax.Array:
            shape = (1, *window.shape, channels)
            cuts = [partial(lax.dynamic_slice, padded[level], window.corner, shape) for level in levels]
            features = lax.switch(window.level, cuts)[0].astype(jnp.float32)
            values = jnp.einsum("kph,khqc->kpqc", window.y, _bins_of_columns(window.x, features), precision="highest")
            before = lax.dynamic_slice_in_dim(out, window.start, form.chunk)
            return lax.dynamic_update_slice_in_dim(out, before + values, window.start, axis=0)

        out = groups.fold(levels, size, add, out)
    return groups.restore(out).astype(maps[0].dtype)


def _gradient(
    form: Form, size: int, stride: int, maps: tuple[jax.Array, ...], rois: _Rois, dy: jax.Array
) -> tuple[jax.Array, ...]:
    groups = _Groups(form, rois, stride, [(x.shape[1], x.shape[2]) for x in maps])
    channels = dy.shape[-1]
    dy = groups.sort(dy)

    def add(gradients: list[jax.Array], window: _Window) -> list[jax.Array]:
        own = lax.dynamic_slice_in_dim(dy, window.start, form.chunk).astype(jnp.float32)
        # For every row of bins a product without a transposition.
        transposed = jnp.broadcast_to(window.x.mT[:, None], (form.chunk, size, window.shape[1], size))
        rows = jnp.matmul(transposed, own, precision="highest")
        values = jnp.einsum("kph,kpwc->hwc", window.y, rows, precision="highest")

        def add_to(dx: jax.Array) -> jax.Array:
            before = lax.dynamic_slice(dx, window.corner, (1, *window.shape, channels))
            return lax.dynamic_update_slice(dx, before + values, window.corner)

        if len(gradients) == 1:
            return [add_to(gradients[0])]
        # Loops of one step or none: XLA:CPU would copy the maps that a conditional hands on.
        return [
            lax.fori_loop(0, (window.level == i).astype(jnp.int32), lambda _, dx: add_to(dx), dx)
            for i, dx in enumerate(gradients)
        ]

    results: list[jax.Array] = []
    for levels in groups.loops:
        shapes = [(groups.images, *groups.shapes[level], channels) for level in levels]
        nothing = varying_as([jnp.zeros(shape, jnp.float32) for shape in shapes], dy, rois)
        results += groups.fold(levels, size, add, nothing)
    return tuple(dx[:, : x.shape[1], : x.shape[2]].astype(x.dtype) for dx, x in zip(results, maps, strict=True))


def _bins_of_columns(x: jax.Array, features: jax.Array) -> jax.Array:
    """(chunk, H, bins, C) from weights (chunk, bins, W) and features (H, W, C)."""
    if x.shape[0] > 1:
        return jnp.einsum("kqw,hwc->khqc", x, features, precision="highest")
    # One product for every row: for a single one, XLA for CPUs would transpose the features.
    rows = jnp.broadcast_to(x, (features.shape[0], *x.shape[1:]))
    return jnp.matmul(rows, features, precision="highest")[None]


class _Window(NamedTuple):
    """A part of a map that a loop's step reads or writes, and the weights of its places in the bins of `chunk` rois."""

    level: jax.Array  # counted from the first of the loop
    start: jax.Array  # the first of the rois
    corner: tuple[jax.Array, ...]  # where it begins in the map (N, H, W, C)
    y: jax.Array  # (chunk, bins, rows)
    x: jax.Array  # (chunk, bins, columns)

    @property
    def shape(self) -> tuple[int, int]:
        return self.y.shape[-1], self.x.shape[-1]


class _Groups:
    """All rois of a batch, sorted by level, then image, so that a loop runs over the rois of one map after the other."""

    def __init__(self, form: Form, rois: _Rois, stride: int, shapes: Sequence[tuple[int, int]]) -> None:
        self.form = form
        self.shapes = [(max(rows, form.tile or 0), max(columns, form.tile or 0)) for rows, columns in shapes]
        self.images, self.rois_per_image = rois.valid.shape
        places = stride * 2 ** np.arange(len(shapes), dtype=np.int32)
        self.scales = jnp.asarray(1 / places, jnp.float32)
        self.extents = -(-rois.extents.astype(jnp.int32) // places[:, None, None])  # (levels, N, 2)
        image = jnp.arange(self.images)[:, None]
        group = jnp.where(rois.valid, rois.levels * self.images + image, len(shapes) * self.images).reshape(-1)
        self.order = jnp.argsort(group, stable=True)
        # The first roi of each group, and the end of the last.
        self.starts = (group < jnp.arange(len(shapes) * self.images + 1)[:, None]).sum(1, dtype=jnp.int32)
        self.padded = group.shape[0] + form.chunk
        self.boxes = self.sort(rois.boxes)

    @property
    def loops(self) -> list[range]:
        """The levels of each loop: all in one, which is compiled once, if they are read in windows of one shape."""
        count = len(self.shapes)
        return [range(count)] if self.form.tile else [range(level, level + 1) for level in range(count)]

    def sort(self, x: jax.Array) -> jax.Array:
        """(N, R, ...) in the sorted order, (N * R + chunk, ...)."""
        x = x.reshape(-1, *x.shape[2:])[self.order]
        return jnp.pad(x, [(0, self.form.chunk)] + [(0, 0)] * (x.ndim - 1))

    def restore(self, x: jax.Array) -> jax.Array:
        """The inverse of `sort`."""
        return x[jnp.argsort(self.order)].reshape(self.images, self.rois_per_image, *x.shape[1:])

    def pad(self, maps: Sequence[jax.Array]) -> list[jax.Array]:
        """The maps (N, H, W, C), each with room for a window: of `shapes`."""
        missing = [
            (rows - x.shape[1], columns - x.shape[2]) for x, (rows, columns) in zip(maps, self.shapes, strict=True)
        ]
        return [
            jnp.pad(x, ((0, 0), (0, rows), (0, columns), (0, 0)))
            for x, (rows, columns) in zip(maps, missing, strict=True)
        ]

    def fold(self, levels: range, size: int, add: Callable[[Any, _Window], Any], state: Any) -> Any:
        """add(state, window) over all windows of all rois of these levels."""
        chunk, tile = self.form
        lengths = jnp.array(self.shapes, jnp.int32)

        def of_map(k: jax.Array, state: Any) -> Any:
            level, image = lax.div(k, jnp.int32(self.images)), lax.rem(k, jnp.int32(self.images))
            first, end = self.starts[k], self.starts[k + 1]

            def of_chunk(i: jax.Array, state: Any) -> Any:
                start = first + i * chunk
                x1, y1, x2, y2 = lax.dynamic_slice_in_dim(self.boxes, start, chunk).T
                real = start + jnp.arange(chunk) < end
                edges = (bins(low, high, size, self.scales[level]) for low, high in ((y1, y2), (x1, x2)))
                rows, columns = (
                    Tiles(
                        of._replace(samples=jnp.where(real, of.samples, 0)),
                        size,
                        self.extents[level, image, axis],
                        lengths[level, axis] if tile else self.shapes[levels.start][axis],
                        tile,
                    )
                    for axis, of in enumerate(edges)
                )

                def of_tile(j: jax.Array, state: Any) -> Any:
                    (y, wy), (x, wx) = rows.at(lax.div(j, columns.count)), columns.at(lax.rem(j, columns.count))
                    return add(state, _Window(level - levels.start, start, (image, y, x, jnp.int32(0)), wy, wx))

                return lax.fori_loop(0, rows.count * columns.count, of_tile, state)

            return lax.fori_loop(0, lax.div(end - first + (chunk - 1), jnp.int32(chunk)), of_chunk, state)

        ends = jnp.int32(levels.start * self.images), jnp.int32(levels.stop * self.images)
        return lax.fori_loop(*ends, of_map, state)
