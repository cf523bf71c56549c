"""SimAM and batch norm as one function are SimAM and batch norm, for every grouping of images and devices."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax import lax
from jax.sharding import PartitionSpec as P

from simam_jax import create_model, simam
from simam_jax.layers import BatchNorm, SimAMBatchNorm
from simam_jax.models import variable_shapes
from simam_jax.ops.batch_norm import batch_norm
from simam_jax.ops.dispatch import lowering_for

E_LAMBDA = 0.1


class Unfused(BatchNorm):
    """SimAM, batch norm and ReLU one after the other."""

    @nn.nowrap
    def by_batch_statistics(self, x, shift, scale, bias, group_moments):
        y = simam(x, E_LAMBDA, axes=(-2,))
        z, moments = batch_norm(y, shift, scale, bias, epsilon=self.epsilon, group_moments=group_moments)
        return nn.relu(z), moments


Fused = partial(SimAMBatchNorm, e_lambda=E_LAMBDA, activation=nn.relu)
PLATFORMS = pytest.mark.parametrize("platform", ["cpu", "gpu"])


def draw(height, width, offset=0.0):
    """x and the gradient of its normalised value (8, height, width, 4), and batch norm's variables."""
    rng = np.random.default_rng(0)
    x, dy = rng.standard_normal((2, 8, height, width, 4))
    scale, bias, mean = rng.standard_normal((3, 4))
    variables = {"params": {"scale": scale, "bias": bias}, "batch_stats": {"mean": mean + offset, "var": np.ones(4)}}
    return 2 * x + offset, dy, variables


def value_statistics_and_gradients(norm, x, dy, variables):
    """All that a training step takes from batch norm, summed over the devices where there are several."""

    def loss(x, params):
        y, updates = norm.apply(variables | {"params": params}, x, True, mutable=["batch_stats"])
        total = jnp.sum(y * dy)
        return lax.pmean(total, norm.axis_name) if norm.axis_name else total, (y, updates["batch_stats"])

    (_, (y, updates)), gradients = jax.value_and_grad(loss, (0, 1), has_aux=True)(x, variables["params"])
    return y, updates if norm.axis_name is None else lax.pmean(updates, norm.axis_name), *gradients


def assert_equal(platform, f, *args, **settings):
    with lowering_for(platform):
        fused = jax.jit(partial(f, Fused(**settings)))(*args)
    unfused = jax.jit(partial(f, Unfused(**settings)))(*args)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-11, atol=1e-11), fused, unfused)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(("height", "width"), [(6, 6), (1, 7), (1, 1)])
@pytest.mark.parametrize("group_size", [0, 2])
@PLATFORMS
def test_on_one_device(platform, height, width, group_size):
    assert_equal(platform, value_statistics_and_gradients, *draw(height, width), group_size=group_size)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("group_size", [1, 4, 8])  # two groups on a device, one of two devices, one of all four
@PLATFORMS
def test_over_devices(platform, group_size, mesh_of):
    images, whole = P("data"), P()

    def sharded(norm, x, dy, variables):
        f = partial(value_statistics_and_gradients, norm)
        out_specs = images, whole, images, whole
        return jax.shard_map(f, mesh=mesh_of(4), in_specs=(images, images, whole), out_specs=out_specs)(
            x, dy, variables
        )

    assert_equal(platform, sharded, *draw(3, 4), group_size=group_size, axis_name="data")


@pytest.mark.usefixtures("x64")
@PLATFORMS
def test_a_mean_of_a_thousand_deviations(platform):
    """Squares of 2,000 itself would leave no more than one digit of the variance."""
    wide = draw(14, 14, offset=2000.0)
    narrow = jax.tree.map(np.float32, wide)
    exact = jax.jit(partial(value_statistics_and_gradients, Unfused()))(*jax.tree.map(np.float64, narrow))
    with lowering_for(platform):
        result = jax.jit(partial(value_statistics_and_gradients, Fused()))(*narrow)
    assert result[0].dtype == np.float32
    errors = jax.tree.map(lambda a, b: np.abs(a - b).max() / np.abs(b).max(), result, exact)
    assert max(jax.tree.leaves(errors)) < 1e-5


@pytest.mark.usefixtures("x64")
def test_on_cpus_the_gradient_keeps_x_alone():
    x, _, variables = draw(6, 6)

    def f(x):
        return Fused().apply(variables, x, True, mutable=["batch_stats"])[0]

    kept = jax.tree.leaves(jax.vjp(f, x)[1])
    assert [leaf.shape for leaf in kept if leaf.size == x.size] == [(1, 8, 36, 4)]


@pytest.mark.parametrize("platform", ["cuda", "cpu", "tpu"])
def test_a_network_s_gradient_lowers_for_every_platform(platform):
    model = create_model("resnet18", num_classes=10, attention="simam")
    x = jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32)

    def loss(variables, x):
        return model.apply(variables, x, train=True, mutable=["batch_stats"])[0].sum()

    with lowering_for({"cuda": "gpu"}.get(platform, platform)):
        traced = jax.jit(jax.grad(loss)).trace(variable_shapes(model), x)
    assert "custom_call" not in traced.lower(lowering_platforms=(platform,)).as_text()
