"""Every lowering of the convolution equals XLA's own: values, gradients, under jvp, vmap and shard_map."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P

from simam_jax import convolution
from simam_jax.convolution import convolve


def reference(x, kernel, *, stride, padding, groups=1):
    return lax.conv_general_dilated(
        x,
        kernel,
        (stride, stride),
        [(padding, padding)] * 2,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )


# kernel size, stride, channels in, out, groups: those of the networks, with fewer channels
GEOMETRIES = [
    pytest.param(1, 1, 4, 6, 1, id="1x1"),
    pytest.param(1, 2, 4, 6, 1, id="1x1-strided"),
    pytest.param(3, 1, 4, 6, 1, id="3x3"),
    pytest.param(3, 2, 4, 6, 1, id="3x3-strided"),
    pytest.param(7, 2, 3, 4, 1, id="7x7-strided"),
    pytest.param(7, 1, 2, 1, 1, id="7x7"),
    pytest.param(3, 1, 6, 6, 6, id="depthwise"),
    pytest.param(3, 2, 6, 6, 6, id="depthwise-strided"),
    pytest.param(3, 1, 8, 12, 4, id="grouped"),
    pytest.param(3, 2, 8, 12, 4, id="grouped-strided"),
]


def draw(size, channels, outputs, groups, height=9, width=10):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((6, height, width, channels))
    return jnp.asarray(x), jnp.asarray(rng.standard_normal((size, size, channels // groups, outputs)))


def gradients(f, x, kernel):
    """The value, its tangent, and the gradients of a sum that weighs every output differently."""

    def loss(x, kernel):
        return jnp.sum(jnp.sin(f(x, kernel)))

    y, tangent = jax.jvp(f, (x, kernel), (jnp.cos(x), jnp.cos(kernel)))
    return y, tangent, *jax.grad(loss, (0, 1))(x, kernel)


@pytest.fixture(params=["large", "small"])
def lowered_as(request, monkeypatch):
    """As for large inputs (patches of two images at a time) and as for small ones."""
    monkeypatch.setattr(convolution, "_PATCHES", 2**15 if request.param == "large" else 2**30)


@pytest.mark.usefixtures("x64", "lowered_as")
@pytest.mark.parametrize(("size", "stride", "channels", "outputs", "groups"), GEOMETRIES)
def test_values_and_gradients_are_xla_s(size, stride, channels, outputs, groups):
    x, kernel = draw(size, channels, outputs, groups)
    geometry = {"stride": stride, "padding": size // 2, "groups": groups}
    ours = jax.jit(partial(gradients, partial(convolve, **geometry)))(x, kernel)
    theirs = jax.jit(partial(gradients, partial(reference, **geometry)))(x, kernel)
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12)


def test_large_ones_do_not_use_xla_s_gradient_on_a_cpu(monkeypatch):
    """Or the comparisons above would compare XLA with itself."""
    monkeypatch.setattr(convolution, "_PATCHES", 2**15)
    x, kernel = draw(3, 4, 6, 1)
    f = jax.grad(lambda k: jnp.sum(convolve(x, k, stride=1, padding=1) ** 2))
    text = jax.jit(f).lower(kernel).as_text()
    assert text.count("stablehlo.convolution") == 1  # forward
    assert "stablehlo.while" in text


@pytest.mark.usefixtures("x64")
def test_the_gradient_keeps_the_input_and_not_its_patches(monkeypatch):
    monkeypatch.setattr(convolution, "_PATCHES", 2**15)
    x, kernel = draw(3, 4, 6, 1)
    _, pullback = jax.vjp(lambda k: convolve(x, k, stride=1, padding=1), kernel)
    assert sum(leaf.size for leaf in jax.tree.leaves(pullback)) <= x.size + kernel.size + 100


@pytest.mark.usefixtures("x64")
def test_second_derivatives(monkeypatch):
    """Forward over reverse and reverse over forward, in one direction."""
    monkeypatch.setattr(convolution, "_PATCHES", 2**15)
    x, kernel = draw(3, 4, 6, 1)

    def curvatures(f):
        def loss(k):
            return jnp.sum(jnp.sin(f(x, k)))

        direction = (jnp.cos(kernel),)
        return jax.jvp(jax.grad(loss), (kernel,), direction)[1], jax.grad(lambda k: jax.jvp(loss, (k,), direction)[1])(
            kernel
        )

    ours = jax.jit(partial(curvatures, partial(convolve, stride=1, padding=1)))()
    theirs = jax.jit(partial(curvatures, partial(reference, stride=1, padding=1)))()
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-11)


@pytest.mark.usefixtures("x64", "lowered_as")
@pytest.mark.parametrize(("size", "groups"), [(1, 1), (3, 1), (3, 6), (3, 3)])
def test_under_vmap_and_shard_map(size, groups, mesh_of):
    x, kernel = draw(size, 6, 6, groups)
    geometry = {"stride": 1, "padding": size // 2, "groups": groups}

    def gradient(f, x, k):
        return jax.grad(lambda k: jnp.sum(jnp.sin(f(x, k))))(k)

    expected = jax.jit(partial(gradient, partial(reference, **geometry)))(x, kernel)
    ours = partial(gradient, partial(convolve, **geometry))
    halves = jax.jit(jax.vmap(ours, (0, None)))(x.reshape(2, 3, *x.shape[1:]), kernel)
    np.testing.assert_allclose(halves.sum(0), expected, rtol=1e-11, atol=1e-11)

    def local(x, k):
        return lax.psum(ours(x, lax.pcast(k, "data", to="varying")), "data")

    sharded = jax.jit(jax.shard_map(local, mesh=mesh_of(2), in_specs=(P("data"), P()), out_specs=P()))
    np.testing.assert_allclose(sharded(x, kernel), expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_narrow_types_stay(dtype, monkeypatch):
    monkeypatch.setattr(convolution, "_PATCHES", 2**10)
    for size, groups in [(1, 1), (3, 1), (3, 6), (3, 3)]:
        x, kernel = (a.astype(dtype) for a in draw(size, 6, 6, groups))
        f = partial(convolve, stride=1, padding=size // 2, groups=groups)
        outputs = jax.eval_shape(partial(gradients, f), x, kernel)
        assert {leaf.dtype for leaf in outputs} == {jnp.dtype(dtype)}
