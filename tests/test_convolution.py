"""Every lowering of the convolution is the convolution: values, gradients, under jvp, vmap and shard_map."""

from functools import partial

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P

from simam_jax.ops import convolution
from simam_jax.ops.convolution import convolve


def taps(x, size, stride, padding, result):
    """For each place of the kernel: its indices and what it sees of x, as a view."""
    padded = np.pad(x, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    for i, j in np.ndindex(size, size):
        rows, columns = (
            slice(i, i + (result[0] - 1) * stride + 1, stride),
            slice(j, j + (result[1] - 1) * stride + 1, stride),
        )
        yield i, j, padded, (slice(None), rows, columns)


def reference(x, kernel, *, stride, padding, groups=1):
    """The convolution by its definition, in NumPy."""
    size, _, inputs, outputs = kernel.shape
    result = [(n + 2 * padding - size) // stride + 1 for n in x.shape[1:3]]
    y = np.zeros((len(x), *result, groups, outputs // groups))
    for i, j, padded, seen in taps(x, size, stride, padding, result):
        grouped = padded[seen].reshape(len(x), *result, groups, inputs)
        y += np.einsum("nhwgc,cgo->nhwgo", grouped, kernel[i, j].reshape(inputs, groups, -1))
    return y.reshape(len(x), *result, outputs)


def reference_gradients(x, kernel, dy, *, stride, padding, groups=1):
    """The transposes of `reference` in x and in the kernel, applied to dy."""
    size, _, inputs, _ = kernel.shape
    dy = dy.reshape(*dy.shape[:3], groups, -1)
    dx, dkernel = None, np.zeros_like(kernel)
    for i, j, padded, seen in taps(x, size, stride, padding, dy.shape[1:3]):
        dx = np.zeros_like(padded) if dx is None else dx
        weights = kernel[i, j].reshape(inputs, groups, -1)
        dx[seen] += np.einsum("nhwgo,cgo->nhwgc", dy, weights).reshape(*dy.shape[:3], -1)
        grouped = padded[seen].reshape(*dy.shape[:3], groups, inputs)
        dkernel[i, j] = np.einsum("nhwgc,nhwgo->cgo", grouped, dy).reshape(inputs, -1)
    return dx[:, padding : padding + x.shape[1], padding : padding + x.shape[2]], dkernel


# kind in CPU_FORMS (for float64), kernel size, stride, channels in, out, groups: those of the networks, with fewer channels
GEOMETRIES = [
    ("pointwise", 1, 1, 4, 6, 1),
    ("pointwise", 1, 1, 6, 4, 1),
    ("pointwise", 1, 2, 4, 6, 1),
    ("3x3", 3, 1, 4, 6, 1),
    ("strided", 3, 2, 4, 6, 1),
    ("dense", 3, 1, 4, 6, 1),
    ("image 3x3", 3, 2, 3, 4, 1),
    ("image 3x3", 3, 1, 3, 4, 1),
    ("image", 7, 2, 3, 4, 1),
    ("image", 7, 1, 2, 1, 1),
    ("depthwise", 3, 1, 6, 6, 6),
    ("depthwise", 3, 2, 6, 6, 6),
    ("grouped", 3, 1, 64, 32, 16),  # in two blocks
    ("grouped", 3, 2, 8, 12, 4),
    ("small grouped", 3, 2, 8, 12, 4),
]


def draw(size, channels, outputs, groups, height=9, width=10):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((6, height, width, channels))
    return x, rng.standard_normal((size, size, channels // groups, outputs))


@pytest.fixture
def in_parts(monkeypatch):
    """Patches of two images at a time, as of large ones."""
    monkeypatch.setattr(convolution, "CACHE", 2**15)


@pytest.fixture(params=["small images", "large images"])
def large(monkeypatch, in_parts, request):  # noqa: ARG001
    """Every convolution takes the form that large ones take on CPUs."""
    if request.param == "large images":
        monkeypatch.setattr(convolution, "BAND", 2**12)
    monkeypatch.setattr(convolution, "SMALL", 0)
    monkeypatch.setattr(convolution, "FEW", 4)


@pytest.mark.usefixtures("x64", "in_parts")
@pytest.mark.parametrize(("kind", "size", "stride", "channels", "outputs", "groups"), GEOMETRIES)
def test_every_form_is_the_convolution(kind, size, stride, channels, outputs, groups):
    geometry = convolution.Geometry(stride, size // 2, groups)
    f = convolution.cpu_form(kind, geometry)
    assert_like_the_reference(f, size, stride, channels, outputs, groups)


def test_every_form_is_tested():
    assert {kind for kind, *_ in GEOMETRIES} == set(convolution.CPU_FORMS)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(("kind", "size", "stride", "channels", "outputs", "groups"), GEOMETRIES[::4])
def test_convolve_is_the_convolution(kind, size, stride, channels, outputs, groups):  # noqa: ARG001
    f = partial(convolve, stride=stride, padding=size // 2, groups=groups)
    assert_like_the_reference(f, size, stride, channels, outputs, groups)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(("band", "height"), [(2**14, 9), (2**13, 10), (1, 9)])  # two bands, three, one for each tile
def test_a_large_image_in_bands_is_the_convolution(monkeypatch, band, height):
    monkeypatch.setattr(convolution, "BAND", band)
    f = convolution.cpu_form("3x3", convolution.Geometry(1, 1, 1))
    assert_like_the_reference(f, 3, 1, 6, 5, 1, height=height)


def assert_like_the_reference(f, size, stride, channels, outputs, groups, height=9):
    x, kernel = draw(size, channels, outputs, groups, height)
    geometry = {"stride": stride, "padding": size // 2, "groups": groups}

    @jax.jit
    def everything(x, kernel):
        y, tangent = jax.jvp(f, (x, kernel), (jnp.cos(x), jnp.cos(kernel)))
        return y, tangent, *jax.vjp(f, x, kernel)[1](jnp.sin(y))

    y = reference(x, kernel, **geometry)
    tangent = reference(np.cos(x), kernel, **geometry) + reference(x, np.cos(kernel), **geometry)
    expected = y, tangent, *reference_gradients(x, kernel, np.sin(y), **geometry)
    for ours, theirs in zip(everything(x, kernel), expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-11, atol=1e-11)


@pytest.mark.usefixtures("in_parts")
def test_tiles_round_about_as_the_definition_does():
    x, kernel = (array.astype(np.float32) for array in draw(3, 64, 8, 1))
    geometry = {"stride": 1, "padding": 1}

    def xla(x, kernel, **_):
        return lax.conv_general_dilated(x, kernel, (1, 1), ((1, 1), (1, 1)), dimension_numbers=("NHWC", "HWIO", "NHWC"))

    exact = reference(x.astype(np.float64), kernel.astype(np.float64), **geometry)
    tiles, xla = (
        np.abs(f(x, kernel, **geometry) - exact).max() for f in (jax.jit(convolve, static_argnames=geometry), xla)
    )
    assert tiles < 3 * xla < 1e-5 * np.abs(exact).max()


@pytest.mark.usefixtures("x64", "large")
@pytest.mark.parametrize(("stride", "groups"), [(1, 1), (2, 1), (1, 3)])
def test_the_gradient_keeps_the_input_and_not_its_patches(stride, groups):
    x, kernel = draw(3, 6, 6, groups)
    _, pullback = jax.vjp(lambda k: convolve(x, k, stride=stride, padding=1, groups=groups), kernel)
    assert sum(leaf.size for leaf in jax.tree.leaves(pullback)) <= x.size + kernel.size + 100


@pytest.mark.usefixtures("x64", "large")
def test_second_derivatives_forward_over_reverse_and_reverse_over_forward():
    x, kernel = draw(3, 4, 6, 1)
    f = partial(convolve, jnp.asarray(x), stride=1, padding=1)

    @jax.jit
    def curvatures(k):
        def loss(k):
            return jnp.sum(f(k) ** 3)

        direction = (jnp.cos(k),)
        slope = jax.grad(lambda k: jax.jvp(loss, (k,), direction)[1])
        return jax.jvp(jax.grad(loss), (k,), direction)[1], slope(k)

    y, dy = (reference(x, k, stride=1, padding=1) for k in (kernel, np.cos(kernel)))
    _, expected = reference_gradients(x, kernel, 6 * y * dy, stride=1, padding=1)
    for ours in curvatures(kernel):
        np.testing.assert_allclose(ours, expected, rtol=1e-11, atol=1e-9)


@pytest.mark.usefixtures("x64", "large")
@pytest.mark.parametrize(("size", "groups"), [(1, 1), (3, 1), (3, 6), (3, 3)])
def test_under_vmap_and_shard_map(size, groups, mesh_of):
    x, kernel = draw(size, 6, 6, groups)
    geometry = {"stride": 1, "padding": size // 2, "groups": groups}

    def gradient(x, k):
        return jax.grad(lambda k: jnp.sum(convolve(x, k, **geometry) ** 2))(k)

    _, expected = reference_gradients(x, kernel, 2 * reference(x, kernel, **geometry), **geometry)
    halves = jax.jit(jax.vmap(gradient, (0, None)))(x.reshape(2, 3, *x.shape[1:]), kernel)
    np.testing.assert_allclose(halves.sum(0), expected, rtol=1e-11, atol=1e-10)

    def local(x, k):
        return lax.psum(gradient(x, lax.pcast(k, "data", to="varying")), "data")

    sharded = jax.jit(jax.shard_map(local, mesh=mesh_of(2), in_specs=(P("data"), P()), out_specs=P()))
    np.testing.assert_allclose(sharded(x, kernel), expected, rtol=1e-11, atol=1e-10)


@pytest.mark.usefixtures("large")
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_narrow_types_stay(dtype):
    for size, groups in [(1, 1), (3, 1), (3, 6), (3, 3)]:
        x, kernel = (array.astype(dtype) for array in draw(size, 6, 6, groups, height=30))
        y, pullback = jax.eval_shape(
            partial(jax.vjp, partial(convolve, stride=1, padding=size // 2, groups=groups)), x, kernel
        )
        assert {leaf.dtype for leaf in (y, *jax.eval_shape(pullback, y))} == {jnp.dtype(dtype)}


@pytest.mark.parametrize(("size", "groups"), [(1, 1), (3, 1), (3, 6)])
def test_a_symbolic_batch_size(size, groups):
    x, kernel = (array.astype(np.float32) for array in draw(size, 6, 6, groups))
    geometry = {"stride": 2, "padding": size // 2, "groups": groups}
    images = jax.ShapeDtypeStruct(jax.export.symbolic_shape("n, 9, 10, 6"), np.float32)
    exported = jax.export.export(jax.jit(partial(convolve, **geometry)))(images, kernel)
    np.testing.assert_allclose(exported.call(x, kernel), reference(x, kernel, **geometry), atol=1e-5)
