"""SimAM and batch norm as one function are SimAM and batch norm, for every grouping of images and devices."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax import lax
from jax.sharding import PartitionSpec as P

from simam_jax import create_model, simam, simam_norm
from simam_jax.layers import BatchNorm, normalise
from simam_jax.models.network import variable_shapes

E_LAMBDA = 0.1


def apart(x, shift, scale, bias, affine):
    z, moments = normalise(simam(x[..., None, :], E_LAMBDA)[..., 0, :], shift, scale, bias, affine)
    return nn.relu(z), moments


def on_gpus(x, shift, scale, bias, affine):
    z, moments = simam_norm._in_every_pass(affine, E_LAMBDA)(x, shift, scale, bias)
    return nn.relu(z), moments


on_cpus = simam_norm.simam_then_normalise(E_LAMBDA, nn.relu)
AS_ONE = pytest.mark.parametrize("as_one", [on_cpus, on_gpus])


def draw(height, width, offset=0.0):
    """x and the gradient of its normalised value (8, height, width, 4), and batch norm's variables."""
    rng = np.random.default_rng(0)
    x, dy = rng.standard_normal((2, 8, height, width, 4))
    scale, bias, mean = rng.standard_normal((3, 4))
    variables = {"params": {"scale": scale, "bias": bias}, "batch_stats": {"mean": mean + offset, "var": np.ones(4)}}
    return 2 * x + offset, dy, variables


def value_statistics_and_gradients(normalise, norm, x, dy, variables):
    """All that a training step takes from batch norm, summed over the devices where there are several."""

    def loss(x, params):
        y, updates = norm.apply(variables | {"params": params}, x, True, normalise, mutable=["batch_stats"])
        total = jnp.sum(y * dy)
        return lax.pmean(total, norm.axis_name) if norm.axis_name else total, (y, updates["batch_stats"])

    (_, (y, updates)), gradients = jax.value_and_grad(loss, (0, 1), has_aux=True)(x, variables["params"])
    return y, updates if norm.axis_name is None else lax.pmean(updates, norm.axis_name), *gradients


def assert_equal(as_one, f, *args):
    one, two = (jax.jit(partial(f, form))(*args) for form in (as_one, apart))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-11, atol=1e-11), one, two)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(("height", "width"), [(6, 6), (1, 7), (1, 1)])  # several places to a row, and one
@pytest.mark.parametrize("group_size", [0, 2])
@AS_ONE
def test_on_one_device(as_one, height, width, group_size, monkeypatch):
    monkeypatch.setattr(simam_norm, "_LANES", 16)
    x, dy, variables = draw(height, width)
    norm = BatchNorm(group_size=group_size)
    assert_equal(as_one, lambda form, *args: value_statistics_and_gradients(form, norm, *args), x, dy, variables)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("group_size", [1, 4, 8])  # two groups on a device, one of two devices, one of all four
@AS_ONE
def test_over_devices(as_one, group_size, mesh_of):
    norm = BatchNorm(group_size=group_size, axis_name="data")
    images, whole = P("data"), P()

    def sharded(form, x, dy, variables):
        f = partial(value_statistics_and_gradients, form, norm)
        out_specs = images, whole, images, whole
        return jax.shard_map(f, mesh=mesh_of(4), in_specs=(images, images, whole), out_specs=out_specs)(
            x, dy, variables
        )

    assert_equal(as_one, sharded, *draw(3, 4))


@pytest.mark.usefixtures("x64")
def test_a_mean_of_a_thousand_deviations():
    wide = draw(14, 14, offset=2000.0)
    narrow = jax.tree.map(np.float32, wide)
    wide = jax.tree.map(np.float64, narrow)
    exact = jax.jit(partial(value_statistics_and_gradients, apart, BatchNorm()))(*wide)
    for form in (on_cpus, on_gpus, apart):  # squares of 2,000 itself would leave no more than one digit of the variance
        result = jax.jit(partial(value_statistics_and_gradients, form, BatchNorm()))(*narrow)
        assert result[0].dtype == np.float32
        errors = jax.tree.map(lambda a, b: np.abs(a - b).max() / np.abs(b).max(), result, exact)
        assert max(jax.tree.leaves(errors)) < 1e-5


@pytest.mark.usefixtures("x64")
def test_on_cpus_the_gradient_keeps_x_alone():
    x, _, variables = draw(6, 6)

    def f(x):
        return BatchNorm().apply(variables, x, True, on_cpus, mutable=["batch_stats"])[0]

    kept = jax.tree.leaves(jax.vjp(f, x)[1])
    assert [leaf.shape for leaf in kept if leaf.size == x.size] == [(1, 8, 36, 4)]


@pytest.mark.parametrize(("platform", "barriers"), [("cuda", 4), ("cpu", 0), ("tpu", 3)])
def test_networks_train_with_each_platform_s_form(platform, barriers):
    model = create_model("resnet18", num_classes=10, attention="simam")
    x = jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32)

    def loss(variables, x):
        return model.apply(variables, x, train=True, mutable=["batch_stats"])[0].sum()

    text = jax.jit(jax.grad(loss)).trace(variable_shapes(model), x).lower(lowering_platforms=(platform,)).as_text()
    # SimAM alone holds back its output, its gradient and that one's second pass; with batch norm, four passes on GPUs.
    assert text.count("optimization_barrier") == 8 * barriers  # of 8 blocks
