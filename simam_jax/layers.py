"""The layers that attention and networks are made of, with PyTorch's arithmetic, padding and initial values.

Every layer computes in the dtype of its input; parameters and statistics are float32 (float64 for a float64 input).
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax

from simam_jax.errors import UserError
from simam_jax.initializers import Initializer, he_normal, ones, torch_uniform, zeros
from simam_jax.ops.batch_norm import GroupMoments, batch_norm, over_neighbours
from simam_jax.ops.convolution import convolve
from simam_jax.ops.extent import zero_beyond
from simam_jax.ops.moments import Moments, at_least_float32
from simam_jax.ops.simam import simam
from simam_jax.ops.simam_batch_norm import Activation, simam_batch_norm


class Conv(nn.Module):
    """Convolution, (N, H, W, C) -> (N, ceil(H / stride), ceil(W / stride), features).

    The padding is kernel_size // 2 on every side (the kernel is odd), as in PyTorch; XLA's "SAME" differs at stride 2.
    `bias_init` None: there is no bias. With an extent (N, 2) the map ends there, as `ops.extent` says.
    """

    features: int
    kernel_size: int = 1
    stride: int = 1
    groups: int = 1
    kernel_init: Initializer = he_normal
    bias_init: Initializer | None = None

    @nn.compact
    def __call__(self, x: jax.Array, extent: jax.Array | None = None) -> jax.Array:
        dtype = at_least_float32(x.dtype)
        shape = (self.kernel_size, self.kernel_size, x.shape[-1] // self.groups, self.features)
        kernel = self.param("kernel", self.kernel_init, shape, dtype)
        if self.kernel_size > 1:
            x = zero_beyond(x, extent)
        y = convolve(x, kernel.astype(x.dtype), stride=self.stride, padding=self.kernel_size // 2, groups=self.groups)
        if self.bias_init is None:
            return y
        return y + self.param("bias", self.bias_init, (self.features,), dtype).astype(y.dtype)


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

        bias_init = self.bias_init or Initializer("uniform", fan_in**-0.5)
        bias = self.param("bias", bias_init, (self.features,), dtype)
        return y + bias.astype(x.dtype)


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
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Normalises x (N, ..., C): with `train` by the batch's statistics, which move the running ones; else by these.

        Scale and bias have gradients in both modes.

        Raises:
            UserError: the images cannot be grouped as asked for, or a group holds one value per channel only.
        """
        shape, dtype = x.shape[-1:], at_least_float32(x.dtype)
        scale = self.param("scale", ones, shape, dtype)
        bias = self.param("bias", zeros, shape, dtype)
        mean = self.variable("batch_stats", "mean", zeros, None, shape, dtype)
        var = self.variable("batch_stats", "var", ones, None, shape, dtype)
        if not train:
            return self.by_running_statistics(x, mean.value, var.value, scale, bias)

        groups, devices = self._groups(x.shape[0])
        grouped = x.reshape(groups, x.shape[0] // groups, -1, shape[0])
        count = grouped.shape[1] * grouped.shape[2] * devices
        if count == 1:
            raise UserError(
                "Batch norm cannot take statistics over one value per channel: train on more images or larger ones."
            )
        of_group = (lambda own: own) if devices == 1 else partial(self._of_group, devices)
        y, moments = self.by_batch_statistics(grouped, mean.value, scale, bias, of_group)
        if not self.is_initializing():
            keep, unbiased = self.momentum, count / (count - 1)
            mean.value = mean.value + (1 - keep) * moments.mean.mean(0)
            var.value = keep * var.value + (1 - keep) * unbiased * moments.var.mean(0)
        return y.reshape(x.shape)

    @nn.nowrap
    def by_running_statistics(
        self, x: jax.Array, mean: jax.Array, var: jax.Array, scale: jax.Array, bias: jax.Array
    ) -> jax.Array:
        """x (N, ..., C) normalised by given statistics (C,)."""
        factor = lax.rsqrt(var + self.epsilon) * scale
        return ((x.astype(factor.dtype) - mean) * factor + bias).astype(x.dtype)

    @nn.nowrap
    def by_batch_statistics(
        self, x: jax.Array, shift: jax.Array, scale: jax.Array, bias: jax.Array, group_moments: GroupMoments
    ) -> tuple[jax.Array, Moments]:
        """x (G, n, HW, C) normalised by the statistics of its groups, and the moments of what was normalised, less shift."""
        return batch_norm(x, shift, scale, bias, epsilon=self.epsilon, group_moments=group_moments)

    @nn.nowrap
    def _of_group(self, devices: int, own: Moments) -> Moments:
        return over_neighbours(own, devices, self.axis_name) if self.axis_name else own

    @nn.nowrap
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


class SimAMBatchNorm(BatchNorm):
    """SimAM, batch norm and an activation as one operation in training: see `ops.simam_batch_norm`.

    Its variables are those of `BatchNorm`.
    """

    e_lambda: float = 1e-4
    activation: Activation = lambda x: x

    @nn.nowrap
    def by_running_statistics(self, x: jax.Array, *statistics: jax.Array) -> jax.Array:
        return self.activation(super().by_running_statistics(simam(x, self.e_lambda), *statistics))

    @nn.nowrap
    def by_batch_statistics(
        self, x: jax.Array, shift: jax.Array, scale: jax.Array, bias: jax.Array, group_moments: GroupMoments
    ) -> tuple[jax.Array, Moments]:
        return simam_batch_norm(
            x,
            shift,
            scale,
            bias,
            e_lambda=self.e_lambda,
            epsilon=self.epsilon,
            group_moments=group_moments,
            activation=self.activation,
        )


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


@dataclass(frozen=True)
class LayerFactory:
    """Makes the layers of one network, with what they have in common."""

    attention: str  # none, or a key of `attention.KINDS`
    attention_param: float  # simam: lambda; se, cbam: reduction
    bn_group_size: int
    axis_name: str | None
    kernel_init: Initializer = he_normal
    linear: Callable[..., nn.Module] = Linear

    @property
    def conv(self) -> Callable[..., nn.Module]:
        return partial(Conv, kernel_init=self.kernel_init)

    @property
    def norm(self) -> Callable[..., nn.Module]:
        return partial(BatchNorm, group_size=self.bn_group_size, axis_name=self.axis_name)
