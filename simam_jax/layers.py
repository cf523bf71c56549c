"""The layers that attention and networks are made of, with PyTorch's arithmetic, padding and initial values.

Every layer computes in the dtype of its input; parameters and statistics are float32 (float64 for a float64 input).
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax

from simam_jax.errors import UserError
from simam_jax.ops.convolution import convolve
from simam_jax.ops.moments import Moments, at_least_float32, moments

Initializer = Callable[..., jax.Array]

he_normal = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
torch_uniform = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")  # within +-1/sqrt(fan_in)


class Conv(nn.Module):
    """Convolution without bias, (N, H, W, C) -> (N, ceil(H / stride), ceil(W / stride), features).

    The padding is kernel_size // 2 on every side (the kernel is odd), as in PyTorch; XLA's "SAME" differs at stride 2.
    """

    features: int
    kernel_size: int = 1
    stride: int = 1
    groups: int = 1
    kernel_init: Initializer = he_normal

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shape = (self.kernel_size, self.kernel_size, x.shape[-1] // self.groups, self.features)
        kernel = self.param("kernel", self.kernel_init, shape, at_least_float32(x.dtype))
        return convolve(
            x, kernel.astype(x.dtype), stride=self.stride, padding=self.kernel_size // 2, groups=self.groups
        )


class Linear(nn.Module):
    """x @ kernel + bias, (..., C) -> (..., features). `bias_init` None: PyTorch's, uniform within +-1/sqrt(C)."""

    features: int
    use_bias: bool = True
    kernel_init: Initializer = torch_uniform
    bias_init: Initializer | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        fan_in, dtype = x.shape[-1], at_least_float32(x.dtype)
        kernel = self.param("kernel", self.kernel_init, (fan_in, self.features), dtype)
        y = x @ kernel.astype(x.dtype)
        if not self.use_bias:
            return y

        def uniform(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
            bound = fan_in**-0.5
            return jax.random.uniform(key, shape, dtype, -bound, bound)

        bias = self.param("bias", self.bias_init or uniform, (self.features,), dtype)
        return y + bias.astype(x.dtype)


@jax.custom_jvp
def relu(x: jax.Array) -> jax.Array:
    """max(x, 0), with a gradient that needs its value, which the next layer keeps anyway; it is 0 at 0, as PyTorch's.

    Written as a choice, which XLA computes once. A maximum is cheap enough for it to compute anew in everything that reads
    it: at the end of a residual block that was the sum of this and of all blocks before, in the gradient from what went in.
    """
    return jnp.where(x < 0, 0, x)


@relu.defjvp
def _(primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> tuple[jax.Array, jax.Array]:
    y = relu(*primals)
    return y, jnp.where(y > 0, tangents[0], 0)


# From x's moments, scale and bias: the factor and the offset (G, C) that normalise x, and the moments of the whole group.
Affine = Callable[[jax.Array, jax.Array, jax.Array, jax.Array], tuple[tuple[jax.Array, jax.Array], Moments]]
Normalise = Callable[[jax.Array, jax.Array, jax.Array, jax.Array, Affine], tuple[jax.Array, Moments]]


def normalise(
    x: jax.Array, shift: jax.Array, scale: jax.Array, bias: jax.Array, affine: Affine
) -> tuple[jax.Array, Moments]:
    """x, groups (G, n, HW, C), normalised by what `affine` makes of the moments of x - shift.

    Returns:
        The same in x's dtype, and the moments of x - shift, (G, C). shift, scale and bias are (C,).
    """
    mean, var = (each[:, 0, 0] for each in moments(x, shift, (1, 2)))
    # One factor and one offset per group and channel: the gradient then needs two reductions over the map only.
    (factor, offset), of_group = affine(mean, var, scale, bias)
    y = _affine(x.astype(factor.dtype), shift, factor[:, None, None], offset[:, None, None])
    return y.astype(x.dtype), of_group


@jax.custom_jvp
def _affine(x: jax.Array, shift: jax.Array, factor: jax.Array, offset: jax.Array) -> jax.Array:
    return (x - shift) * factor + offset


@_affine.defjvp
def _(primals: tuple[jax.Array, ...], tangents: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
    (x, shift, factor, _), (dx, dshift, dfactor, doffset) = primals, tangents
    # Not (x - shift) * dfactor, of which the transpose would need x - shift in memory for a sum.
    return _affine(*primals), dx * factor + x * dfactor + (doffset - shift * dfactor - dshift * factor)


class BatchNorm(nn.Module):
    """Batch normalization over all but the last axis, with statistics over groups of a chosen number of images.

    With N images on this device, `group_size` g means: 0, one group of the N images; g <= N, N / g groups of
    neighbouring images; g > N, the images of g / N neighbouring devices together (of all: synchronised batch norm).
    Each group is normalised by its own statistics. The running statistics are those of this device's groups,
    averaged; averaging over devices is left to the training step. The running variance is the unbiased one, and
    `momentum` is what is kept of the old value (1 - PyTorch's momentum).
    """

    momentum: float = 0.9
    epsilon: float = 1e-5
    group_size: int = 0
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False, normalise: Normalise = normalise) -> jax.Array:
        """Normalises x (N, ..., C); with `train` by the batch's statistics, updating the collection "batch_stats".

        `normalise` may be another function of that kind, which does more to x than normalise it; of use with `train`.

        Raises:
            UserError: the images cannot be grouped as asked for, or a group holds one value per channel only.
        """
        shape, dtype = x.shape[-1:], at_least_float32(x.dtype)
        scale = self.param("scale", nn.initializers.ones, shape, dtype)
        bias = self.param("bias", nn.initializers.zeros, shape, dtype)
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, shape, dtype)
        running_var = self.variable("batch_stats", "var", jnp.ones, shape, dtype)

        if not train:
            factor = lax.rsqrt(running_var.value + self.epsilon) * scale
            return ((x.astype(dtype) - running_mean.value) * factor + bias).astype(x.dtype)

        groups, devices = self._groups(x.shape[0])
        grouped = x.reshape(groups, x.shape[0] // groups, -1, shape[0])
        count = grouped.shape[1] * grouped.shape[2] * devices
        if count == 1:
            raise UserError(
                "Batch norm cannot take statistics over one value per channel: train on more images or larger ones."
            )

        def affine(mean: jax.Array, var: jax.Array, scale: jax.Array, bias: jax.Array):
            mean, var = _over_neighbours((mean, var), devices, self.axis_name)
            factor = lax.rsqrt(var + self.epsilon) * scale
            return (factor, bias - mean * factor), (mean, var)

        # The running mean as a shift keeps the one-pass variance from cancelling when the mean is large.
        y, (shifted_mean, var) = normalise(grouped, running_mean.value, scale, bias, affine)
        if not self.is_initializing():
            keep, unbiased = self.momentum, count / (count - 1)
            running_mean.value = running_mean.value + (1 - keep) * shifted_mean.mean(0)
            running_var.value = keep * running_var.value + (1 - keep) * unbiased * var.mean(0)
        return y.reshape(x.shape)

    def _groups(self, images: int) -> tuple[int, int]:
        """(groups on this device, devices that share one group)."""
        size = self.group_size or images
        if images % size == 0:
            return images // size, 1
        axis_size = lax.axis_size(self.axis_name) if self.axis_name else 1
        if size % images == 0 and axis_size % (size // images) == 0:
            return 1, size // images
        raise UserError(
            f"Batch norm over {size} images cannot be made of {images} images on each of {axis_size} devices: "
            f"take 0, a divisor of {images}, or {images} times a divisor of {axis_size}."
        )


def _over_neighbours(moments: Moments, devices: int, axis_name: str | None) -> Moments:
    """The moments of what groups of `devices` neighbours on the mesh axis have together."""
    if devices == 1 or axis_name is None:
        return moments
    mean, var = moments
    mean, square = _mean_over_neighbours((mean, var + jnp.square(mean)), devices, axis_name)
    return mean, jnp.maximum(square - jnp.square(mean), 0)


def _mean_over_neighbours(pair: Moments, devices: int, axis_name: str) -> Moments:
    if devices == lax.axis_size(axis_name):
        return lax.pmean(pair, axis_name)
    # shard_map's check_vma knows no axis_index_groups; these are a few kilobytes.
    everywhere = lax.all_gather(jnp.stack(pair), axis_name)
    first = lax.axis_index(axis_name) // devices * devices
    mean, square = lax.dynamic_slice_in_dim(everywhere, first, devices).mean(0)
    return mean, square


class Dropout(nn.Module):
    """Zeroes each value with probability `rate` in training and scales the others by 1 / (1 - rate).

    Each image of x (N, ...) draws from a key of its own, folded with its index in the batch over all devices of
    `axis_name`: the masks do not depend on the number of devices.
    """

    rate: float
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        if not train or self.rate == 0:
            return x
        first = lax.axis_index(self.axis_name) * x.shape[0] if self.axis_name else 0
        key = self.make_rng("dropout")
        keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(first + jnp.arange(x.shape[0]))
        keep = jax.vmap(lambda k: jax.random.bernoulli(k, 1 - self.rate, x.shape[1:]))(keys)
        return jnp.where(keep, x / (1 - self.rate), 0).astype(x.dtype)
