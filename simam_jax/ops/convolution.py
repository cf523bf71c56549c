"""One convolution, lowered as each platform computes it fastest; values, gradients and their types are the same everywhere.

XLA's convolutions for GPUs and TPUs are left alone. Those for CPUs compute 1x1 kernels and the gradients of kernels several
times slower than the same work written as matrix products, depthwise and grouped ones by orders of magnitude: here they
are written so, 3x3 ones as Winograd did, inside `jax.lax.platform_dependent`. Small dense ones, and the values of small
grouped ones, stay as they are: they would only take longer to compile.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.export import is_symbolic_dim

from simam_jax.ops.once import once
from simam_jax.ops.parts import in_parts, part_size
from simam_jax.ops.winograd import convolve_3x3

Bilinear = Callable[[jax.Array, jax.Array], jax.Array]  # of x and the kernel

_PATCHES = 2**23  # bytes: patches gathered at a time on a CPU should stay in its caches
_SMALL = 2**21  # bytes of patches in all, up to which a convolution is small
_FEW = 8  # channels, as of an image: patches of fewer are gathered a few numbers at a time
_BLOCK = 32  # channels that a matrix product on a CPU should at least have


def convolve(x: jax.Array, kernel: jax.Array, *, stride: int = 1, padding: int = 0, groups: int = 1) -> jax.Array:
    """Convolution of x (N, H, W, C) with kernel (K, K, C / groups, O), `padding` zeros on every side.

    Returns:
        (N, (H + 2 * padding - K) // stride + 1, the same of W, O), in x's dtype, which is the kernel's too.
    """
    geometry = {"stride": stride, "padding": padding}
    xla = partial(_xla, **geometry, groups=groups)

    def lowered(on_cpu: Bilinear) -> Bilinear:
        return lambda x, kernel: lax.platform_dependent(x, kernel, cpu=on_cpu, default=xla)

    if any(map(is_symbolic_dim, x.shape)):  # how large a size of jax.export is cannot be asked
        return xla(x, kernel)
    if kernel.shape[0] == 1 and groups == 1 and padding == 0:
        return lowered(partial(_product, stride=stride))(x, kernel)
    if groups == x.shape[3] == kernel.shape[3]:
        forms = (partial(form, **geometry) for form in (_sum_of_taps, _tap_by_tap, _spread_taps))
        return _with_gradient(*map(lowered, forms))(x, kernel)
    small = x.shape[0] * _patch_bytes(x, kernel, **geometry) <= _SMALL
    if small and groups == 1:
        return xla(x, kernel)
    precise = jnp.finfo(x.dtype).bits >= 32  # narrower types have too few digits for Winograd's sums
    winograd = precise and kernel.shape[:2] == (3, 3) and stride == padding == 1
    on_cpu = _by_tiles if winograd else partial(_by_patches, **geometry)
    if groups > 1:
        blocks = lowered(partial(_in_blocks, groups=groups, dense=on_cpu))
        return (_with_gradient(xla, blocks, blocks) if small else blocks)(x, kernel)
    if x.shape[3] >= _FEW:
        return lowered(on_cpu)(x, kernel)
    sums, columns, patches = (lowered(partial(form, **geometry)) for form in (_sum_of_taps, _by_columns, _by_patches))
    # Of a large kernel the sum has so many terms that XLA's value is faster.
    return _with_gradient(sums if kernel.shape[0] <= 3 else xla, columns, patches)(x, kernel)


def _with_gradient(value: Bilinear, in_kernel: Bilinear, in_x: Bilinear | None = None) -> Bilinear:
    """`value`, with gradients by the transposes of other forms of the same function: in the kernel, and in x."""

    @jax.custom_jvp
    def f(x, kernel):
        return value(x, kernel)

    @partial(f.defjvp, symbolic_zeros=True)
    def _(primals, tangents):
        (x, kernel), (dx, dkernel) = primals, tangents
        terms = []
        if not isinstance(dx, jax.custom_derivatives.SymbolicZero):
            terms.append((in_x or value)(dx, kernel))
        if not isinstance(dkernel, jax.custom_derivatives.SymbolicZero):
            terms.append(in_kernel(x, dkernel))
        return f(x, kernel), sum(terms[1:], start=terms[0])

    return f


def _xla(x: jax.Array, kernel: jax.Array, *, stride: int, padding: int, groups: int = 1) -> jax.Array:
    return lax.conv_general_dilated(
        x,
        kernel,
        window_strides=(stride, stride),
        padding=((padding, padding), (padding, padding)),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )


def _product(x: jax.Array, kernel: jax.Array, *, stride: int) -> jax.Array:
    """A 1x1 convolution as a matrix product of two dimensions: of more, XLA would transpose y's gradient element by element."""
    x = x[:, ::stride, ::stride]
    return _times(x.reshape(-1, x.shape[3]), kernel[0, 0]).reshape(*x.shape[:3], -1)


def _times(rows: jax.Array, kernel: jax.Array) -> jax.Array:
    """rows (M, C) @ kernel (C, O), with the kernel's gradient as the product whose left factor is the narrower one.

    Over many rows XLA for CPUs sums such products up to twice as fast; the barrier keeps it from choosing the other.
    """

    def transposed(rows: jax.Array, kernel: jax.Array) -> jax.Array:
        return lax.dot_general(rows, lax.optimization_barrier(kernel.T), (((1,), (1,)), ((), ())))

    inputs, outputs = kernel.shape
    return (_with_gradient(jnp.matmul, transposed) if inputs > outputs else jnp.matmul)(rows, kernel)


def _places(x: jax.Array, kernel: jax.Array, stride: int, padding: int) -> tuple[int, int]:
    """Height and width of the result."""
    height, width = ((n + 2 * padding - kernel.shape[0]) // stride + 1 for n in x.shape[1:3])
    return height, width


def _patch_bytes(x: jax.Array, kernel: jax.Array, stride: int, padding: int) -> int:
    """Bytes of what the kernel sees of one image, over all its places."""
    height, width = _places(x, kernel, stride, padding)
    return height * width * kernel.shape[0] ** 2 * x.shape[3] * x.dtype.itemsize


def _pad(x: jax.Array, padding: int) -> jax.Array:
    return jnp.pad(x, ((0, 0), (padding, padding), (padding, padding), (0, 0)))


def _tap(padded: jax.Array, place: tuple[int, int], result: tuple[int, int], stride: int) -> jax.Array:
    """What the place (i, j) of a kernel sees of x, (N, H', W', C), or of planes (C, H', W')."""
    (i, j), (height, width) = place, result
    return padded[:, i : i + (height - 1) * stride + 1 : stride, j : j + (width - 1) * stride + 1 : stride]


def _by_patches(x: jax.Array, kernel: jax.Array, *, stride: int, padding: int) -> jax.Array:
    """A convolution as matrix products of the kernel with gathered patches."""
    size, _, inputs, outputs = kernel.shape
    result = _places(x, kernel, stride, padding)

    def some(images: jax.Array) -> jax.Array:
        images = _pad(images, padding)
        patches = [_tap(images, place, result, stride) for place in np.ndindex(size, size)]
        rows = jnp.concatenate(patches, -1).reshape(-1, size * size * inputs)
        return (rows @ kernel.reshape(-1, outputs)).reshape(-1, *result, outputs)

    return _cached(some, x, _patch_bytes(x, kernel, stride, padding))


def _by_columns(x: jax.Array, kernel: jax.Array, *, stride: int, padding: int) -> jax.Array:
    """The same, image by image, with a patch a column: each of its numbers is gathered over a whole row of places.

    For the kernel's gradient, which takes such columns as they are; the value would transpose them.
    """
    result = _places(x, kernel, stride, padding)
    matrix = kernel.reshape(-1, kernel.shape[3])

    def one(image: jax.Array) -> jax.Array:
        planes = jnp.pad(jnp.moveaxis(image, 2, 0), ((0, 0), (padding, padding), (padding, padding)))
        taps = [_tap(planes, place, result, stride) for place in np.ndindex(kernel.shape[:2])]
        columns = jnp.concatenate(taps).reshape(len(matrix), -1)
        return (columns.T @ matrix).reshape(*result, -1)

    return lax.map(jax.checkpoint(one, prevent_cse=False), x)


def _by_tiles(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """A 3x3 convolution by Winograd's tiles."""
    tile_bytes = 4 * x[0].size * x.dtype.itemsize  # 4x4 numbers for every 2x2
    return _cached(lambda images: convolve_3x3(images, kernel), x, tile_bytes)


def _cached(f: Callable[[jax.Array], jax.Array], x: jax.Array, bytes_each: int) -> jax.Array:
    """f, so many images at a time that what it gathers stays in a CPU's caches; for the gradient only x is kept."""
    return in_parts(jax.checkpoint(f, prevent_cse=False), x, part_size(x.shape[0], _PATCHES // bytes_each))


def _sum_of_taps(x: jax.Array, kernel: jax.Array, *, stride: int, padding: int) -> jax.Array:
    """A depthwise convolution, or one of few channels, as a sum of shifted products: XLA fuses it into one loop over the result."""
    size, _, inputs, _ = kernel.shape
    result = _places(x, kernel, stride, padding)

    def taps(padded: jax.Array, kernel: jax.Array) -> jax.Array:
        # A depthwise kernel has one input, and tap[..., 0::1] is the whole tap; of others each channel meets all outputs.
        first, *others = (
            _tap(padded, (i, j), result, stride)[..., c::inputs] * kernel[i, j, c]
            for i, j, c in np.ndindex(size, size, inputs)
        )
        return sum(others, start=first)

    return once(taps, _pad(x, padding), kernel, after=kernel)


def _tap_by_tap(x: jax.Array, kernel: jax.Array, *, stride: int, padding: int) -> jax.Array:
    """The same as a loop over the places of the kernel: its transpose in the kernel is one reduction, compiled once."""
    padded, (height, width) = _pad(x, padding), _places(x, kernel, stride, padding)
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


def _spread_taps(x: jax.Array, kernel: jax.Array, *, stride: int, padding: int) -> jax.Array:
    """The same, each tap put where it counts: its transpose in x is a sum of taps of y's gradient, fused like the value."""
    size, result = kernel.shape[0], _places(x, kernel, stride, padding)

    def taps(x: jax.Array, kernel: jax.Array) -> jax.Array:
        spread = [
            jnp.pad(x * kernel[i, j], ((0, 0), (size - 1 - i, i), (size - 1 - j, j), (0, 0)))
            for i, j in np.ndindex(kernel.shape[:2])
        ]
        return _tap(sum(spread[1:], start=spread[0]), (size - 1 - padding, size - 1 - padding), result, stride)

    return once(taps, x, kernel, after=kernel)


def _in_blocks(x: jax.Array, kernel: jax.Array, *, groups: int, dense: Bilinear) -> jax.Array:
    """A grouped convolution as dense ones of some groups each: with the few channels of one, products are slow."""
    size, _, inputs, outputs = kernel.shape
    blocks = max(n for n in range(1, groups + 1) if groups % n == 0 and (n == 1 or x.shape[3] // n >= _BLOCK))
    split_kernel = jnp.moveaxis(kernel.reshape(size * size, inputs, blocks, -1), 2, 0)
    kernels = jax.vmap(partial(_block_diagonal, groups=groups // blocks))(split_kernel)
    kernels = kernels.reshape(blocks, size, size, -1, outputs // blocks)
    split_x = jnp.moveaxis(x.reshape(*x.shape[:3], blocks, -1), 3, 0)
    y = jnp.moveaxis(lax.map(lambda block: dense(*block), (split_x, kernels)), 0, 3)
    return y.reshape(*y.shape[:3], outputs)


def _block_diagonal(kernel: jax.Array, groups: int) -> jax.Array:
    """The kernel (K * K, C, O) of the dense convolution that a grouped one is: zero between the groups."""
    _, inputs, outputs = kernel.shape
    inside = np.kron(np.eye(groups), np.ones((inputs, outputs // groups)))
    return jnp.tile(kernel, (1, groups, 1)) * inside.astype(kernel.dtype)
