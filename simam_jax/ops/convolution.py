"""Convolution, with forms for XLA:CPU, which computes some kinds of kernels and gradients many times slower than others.

XLA's convolutions for GPUs and TPUs are left alone. On CPUs a convolution is of one of the kinds of `CPU_FORMS`, which has for each
three functions of the same value: one computes the value, the transposes of the others the two gradients.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from simam_jax.ops.dispatch import choose, compute_once
from simam_jax.ops.parts import in_parts, part_size
from simam_jax.ops.winograd import convolve_3x3

CACHE = 2**23  # bytes: patches gathered at a time should stay in a CPU's caches
SMALL = 2**21  # bytes of patches in all, up to which convolutions are left to XLA: other forms only compile longer
BAND = 2**24  # bytes of Winograd's tiles at a time, where one image has more
FEW = 8  # channels, as of an image: patches of fewer are gathered a few numbers at a time
BLOCK = 32  # channels that a matrix product on a CPU should at least have


class Geometry(NamedTuple):
    """How a kernel is moved over a map."""

    stride: int
    padding: int
    groups: int


Bilinear = Callable[[jax.Array, jax.Array], jax.Array]  # x, kernel -> y
Form = Callable[[jax.Array, jax.Array, Geometry], jax.Array]


class Forms(NamedTuple):
    """How a kind of convolution is computed: `value`, and what the gradients are the transposes of (None: of `value`)."""

    value: Form
    kernel_gradient: Form | None = None
    input_gradient: Form | None = None


def convolve(x: jax.Array, kernel: jax.Array, *, stride: int = 1, padding: int = 0, groups: int = 1) -> jax.Array:
    """Convolution of x (N, H, W, C) with kernel (K, K, C / groups, O), `padding` zeros on every side.

    Returns:
        (N, (H + 2 * padding - K) // stride + 1, the same of W, O), in x's dtype, which is the kernel's too.
    """
    return choose(x, xla, cpu=_on_cpu)(x, kernel, Geometry(stride, padding, groups))


def _on_cpu(x: jax.Array, kernel: jax.Array, geometry: Geometry) -> jax.Array:
    return cpu_form(_kind(x, kernel, geometry), geometry)(x, kernel)


def cpu_form(kind: str, geometry: Geometry) -> Bilinear:
    """The convolution as a CPU computes one of that kind, a key of `CPU_FORMS`."""

    def bound(form: Form) -> Bilinear:
        return lambda x, kernel: form(x, kernel, geometry)

    value, *gradients = CPU_FORMS[kind]
    if not any(gradients):  # the two gradients share what both compute from the cotangent
        return bound(value)
    return _with_gradients(bound(value), *(bound(form or value) for form in gradients))


def _kind(x: jax.Array, kernel: jax.Array, geometry: Geometry) -> str:
    """A key of `CPU_FORMS`."""
    size, channels = kernel.shape[0], x.shape[3]
    small = x.shape[0] * _patch_bytes(x, kernel, geometry) <= SMALL
    if geometry.groups == channels == kernel.shape[3]:
        return "depthwise"
    if geometry.groups > 1:
        return "small grouped" if small else "grouped"
    if size == 1 and geometry.padding == 0:
        return "pointwise"
    if small:
        return "dense"
    if channels < FEW:
        return "image" if size > 3 else "image 3x3"
    # Narrower types have too few digits for Winograd's sums.
    precise = jnp.finfo(x.dtype).bits >= 32
    if size == 3 and geometry.stride == geometry.padding == 1 and precise:
        return "3x3"
    return "strided" if geometry.stride > 1 else "dense"


def _with_gradients(value: Bilinear, kernel_gradient: Bilinear, input_gradient: Bilinear) -> Bilinear:
    """`value`, with gradients by the transposes of other forms of the same function."""

    @jax.custom_jvp
    def f(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return value(x, kernel)

    @partial(f.defjvp, symbolic_zeros=True)
    def _(primals, tangents):
        (x, kernel), (dx, dkernel) = primals, tangents
        terms = []
        if not isinstance(dx, jax.custom_derivatives.SymbolicZero):
            terms.append(input_gradient(dx, kernel))
        if not isinstance(dkernel, jax.custom_derivatives.SymbolicZero):
            terms.append(kernel_gradient(x, dkernel))
        return f(x, kernel), sum(terms[1:], start=terms[0])

    return f


def _unless_differentiated(value: Bilinear, otherwise: Bilinear) -> Bilinear:
    """`value`, and where it is differentiated `otherwise`, another form of the same function."""

    @jax.custom_jvp
    def f(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return value(x, kernel)

    @partial(f.defjvp, symbolic_zeros=True)
    def _(primals, tangents):
        varying = [i for i, dx in enumerate(tangents) if not isinstance(dx, jax.custom_derivatives.SymbolicZero)]

        def of_varying(*inputs: jax.Array) -> jax.Array:
            return otherwise(*(inputs[varying.index(i)] if i in varying else x for i, x in enumerate(primals)))

        return jax.jvp(of_varying, [primals[i] for i in varying], [tangents[i] for i in varying])

    return f


def xla(x: jax.Array, kernel: jax.Array, geometry: Geometry) -> jax.Array:
    """XLA's own convolution."""
    stride, padding, groups = geometry
    return lax.conv_general_dilated(
        x,
        kernel,
        window_strides=(stride, stride),
        padding=((padding, padding), (padding, padding)),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )


def _pointwise(x: jax.Array, kernel: jax.Array, geometry: Geometry) -> jax.Array:
    """A 1x1 convolution as a 2-D matrix product: with a 4-D dot_general XLA:CPU transposes the cotangent elementwise."""
    x = x[:, :: geometry.stride, :: geometry.stride]
    return (x.reshape(-1, x.shape[3]) @ kernel[0, 0]).reshape(*x.shape[:3], -1)


def _pointwise_transposed(x: jax.Array, kernel: jax.Array, geometry: Geometry) -> jax.Array:
    """The same from the transposed kernel where that is the narrower one.

    Its gradient in the kernel is then the product with the narrower factor on the left, which XLA:CPU sums over many rows up
    to twice as fast; the barrier keeps XLA from choosing the other.
    """
    inputs, outputs = kernel.shape[2:]
    if inputs <= outputs:
        return _pointwise(x, kernel, geometry)
    x = x[:, :: geometry.stride, :: geometry.stride]
    transposed = lax.optimization_barrier(kernel[0, 0].T)
    y = lax.dot_general(x.reshape(-1, inputs), transposed, (((1,), (1,)), ((), ())))
    return y.reshape(*x.shape[:3], outputs)


def output_size(x: jax.Array, kernel: jax.Array, geometry: Geometry) -> tuple[int, int]:
    """Height and width of the result."""
    height, width = ((n + 2 * geometry.padding - kernel.shape[0]) // geometry.stride + 1 for n in x.shape[1:3])
    return height, width


def _patch_bytes(x: jax.Array, kernel: jax.Array, geometry: Geometry) -> int:
    """Bytes of all patches of one image that the kernel is multiplied with."""
    height, width = output_size(x, kernel, geometry)
    return height * width * kernel.shape[0] ** 2 * x.shape[3] * x.dtype.itemsize


def _pad(x: jax.Array, padding: int) -> jax.Array:
    return jnp.pad(x, ((0, 0), (padding, padding), (padding, padding), (0, 0)))


def _tap(padded: jax.Array, place: tuple[int, int], result: tuple[int, int], stride: int) -> jax.Array:
    """What the place (i, j) of a kernel is multiplied with, (N, H', W', C)."""
    (i, j), (height, width) = place, result
    return padded[:, i : i + (height - 1) * stride + 1 : stride, j : j + (width - 1) * stride + 1 : stride]


def _im2col(x: jax.Array, kernel: jax.Array, geometry: Geometry) -> jax.Array:
    """Matrix products of the kernel with gathered patches, a patch a row."""
    size, _, inputs, outputs = kernel.shape
    result = output_size(x, kernel, geometry)

    def some(images: jax.Array) -> jax.Array:
        images = _pad(images, geometry.padding)
        patches = [_tap(images, place, result, geometry.stride) for place in np.ndindex(size, size)]
        rows = jnp.concatenate(patches, -1).reshape(-1, size * size * inputs)
        return (rows @ kernel.reshape(-1, outputs)).reshape(-1, *result, outputs)

    return _in_cache(some, x, _patch_bytes(x, kernel, geometry))


def _im2col_columns(x: jax.Array, kernel: jax.Array, geometry: Geometry) -> jax.Array:
    """The same image by image with a patch a column: each of its numbers is gathered over a whole row of places."""
    result = output_size(x, kernel, geometry)
    matrix, padding = kernel.reshape(-1, kernel.shape[3]), geometry.padding

    def one(image: jax.Array) -> jax.Array:
        planes = jnp.pad(jnp.moveaxis(image, 2, 0), ((0, 0), (padding, padding), (padding, padding)))
        taps = [_tap(planes, place, result, geometry.stride) for place in np.ndindex(kernel.shape[:2])]
        columns = jnp.concatenate(taps).reshape(len(matrix), -1)
        return (columns.T @ matrix).reshape(*result, -1)

    return lax.map(jax.checkpoint(one, prevent_cse=False), x)


def _winograd(x: jax.Array, kernel: jax.Array, geometry: Geometry) -> jax.Array:  # noqa: ARG001 (3x3, stride 1)
    """A 3x3 convolution by Winograd's tiles; with gradients, of a large image some rows at a time."""
    tile_bytes = 4 * x[0].size * x.dtype.itemsize  # 4x4 numbers for every 2x2

    def by_images(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return _in_cache(lambda images: convolve_3x3(images, kernel), x, tile_bytes)

    if tile_bytes <= BAND:
        return by_images(x, kernel)

    # Bands need a third of the memory and are faster to differentiate. The value alone is faster of whole images.
    by_bands = jax.checkpoint(partial(convolve_3x3, bands=-(-tile_bytes // BAND)))
    return _unless_differentiated(by_images, by_bands)(x, kernel)


def _in_cache(f: Callable[[jax.Array], jax.Array], x: jax.Array, bytes_each: int) -> jax.Array:
    """f, so many images at a time that what it gathers fits a CPU's caches; for the gradient only x is kept."""
    return in_parts(jax.checkpoint(f, prevent_cse=False), x, part_size(x.shape[0], CACHE // bytes_each))


def _sum_of_taps(x: jax.Array, kernel: jax.Array, geometry: Geometry) -> jax.Array:
    """A convolution, depthwise or of few channels, as a sum of shifted products, fused into one loop over the result."""
    result, inputs = output_size(x, kernel, geometry), kernel.shape[2]

    def taps(padded: jax.Array, kernel: jax.Array) -> jax.Array:
        # A depthwise kernel has one input, and all channels are its; of others each channel meets all outputs.
        first, *others = (
            _tap(padded, (i, j), result, geometry.stride)[..., c::inputs] * kernel[i, j, c]
            for i, j, c in np.ndindex(*kernel.shape[:2], inputs)
        )
        return sum(others, start=first)

    return compute_once(taps, _pad(x, geometry.padding), kernel, after=kernel)


def _depthwise_kernel_gradient(x: jax.Array, kernel: jax.Array, geometry: Geometry) -> jax.Array:
    """The same as a loop over the places of the kernel: its transpose in the kernel is one reduction, compiled once."""
    stride, padded, (height, width) = geometry.stride, _pad(x, geometry.padding), output_size(x, kernel, geometry)
    window = (x.shape[0], (height - 1) * stride + 1, (width - 1) * stride + 1, x.shape[3])

    @partial(jax.checkpoint, prevent_cse=False)
    def add(y: jax.Array, tap: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        (i, j), weights = tap
        seen = lax.dynamic_slice(padded, (0, i, j, 0), window)[:, ::stride, ::stride]
        return y + seen * weights, None

    places = jnp.array(list(np.ndindex(kernel.shape[:2])))
    # Made from both inputs: under shard_map a sum varies over the devices as its terms do.
    nothing = jnp.zeros_like(x[:, :1, :1] * kernel[0, 0], shape=(x.shape[0], height, width, x.shape[3]))
    return lax.scan(add, nothing, (places, kernel.reshape(-1, x.shape[3])))[0]


def _depthwise_input_gradient(x: jax.Array, kernel: jax.Array, geometry: Geometry) -> jax.Array:
    """The same in scatter form: its transpose in x is a fused sum of shifted products."""
    size, result = kernel.shape[0], output_size(x, kernel, geometry)

    def taps(x: jax.Array, kernel: jax.Array) -> jax.Array:
        spread = [
            jnp.pad(x * kernel[i, j], ((0, 0), (size - 1 - i, i), (size - 1 - j, j), (0, 0)))
            for i, j in np.ndindex(kernel.shape[:2])
        ]
        first = size - 1 - geometry.padding
        return _tap(sum(spread[1:], start=spread[0]), (first, first), result, geometry.stride)

    return compute_once(taps, x, kernel, after=kernel)


def _grouped(x: jax.Array, kernel: jax.Array, geometry: Geometry) -> jax.Array:
    """A grouped convolution as dense ones of some groups each: with the few channels of one, products are slow."""
    groups, (size, _, inputs, outputs) = geometry.groups, kernel.shape
    blocks = max(n for n in range(1, groups + 1) if groups % n == 0 and (n == 1 or x.shape[3] // n >= BLOCK))
    split_kernel = jnp.moveaxis(kernel.reshape(size * size, inputs, blocks, -1), 2, 0)
    kernels = jax.vmap(partial(_block_diagonal, groups=groups // blocks))(split_kernel)
    kernels = kernels.reshape(blocks, size, size, -1, outputs // blocks)
    split_x = jnp.moveaxis(x.reshape(*x.shape[:3], blocks, -1), 3, 0)
    precise_3x3 = size == 3 and geometry.stride == geometry.padding == 1 and jnp.finfo(x.dtype).bits >= 32
    dense = partial(_winograd if precise_3x3 else _im2col, geometry=geometry._replace(groups=1))
    y = jnp.moveaxis(lax.map(lambda block: dense(*block), (split_x, kernels)), 0, 3)
    return y.reshape(*y.shape[:3], outputs)


def _block_diagonal(kernel: jax.Array, groups: int) -> jax.Array:
    """The kernel (K * K, C, O) of the dense convolution that a grouped one is: zero between the groups."""
    _, inputs, outputs = kernel.shape
    inside = np.kron(np.eye(groups), np.ones((inputs, outputs // groups)))
    return jnp.tile(kernel, (1, groups, 1)) * inside.astype(kernel.dtype)


CPU_FORMS = {
    "pointwise": Forms(_pointwise, _pointwise_transposed),
    "depthwise": Forms(_sum_of_taps, _depthwise_kernel_gradient, _depthwise_input_gradient),
    "3x3": Forms(_winograd),
    "strided": Forms(_im2col),  # XLA computes the gradient in the kernel at a third of the speed
    "dense": Forms(xla),
    # Of a large kernel the sum has so many terms that XLA's value is faster, of a small one XLA's gradients are.
    "image 3x3": Forms(_sum_of_taps, xla, xla),
    "image": Forms(xla, _im2col_columns, _im2col),
    "grouped": Forms(_grouped),
    "small grouped": Forms(xla, _grouped, _grouped),
}
