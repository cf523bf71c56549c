"""The second stage's heads: what the features of a roi say of its class, its box and its mask."""

import jax
import jax.numpy as jnp
from flax import linen as nn

from simam_jax.initializers import Initializer, he_normal, xavier_uniform, zeros
from simam_jax.layers import Conv, Linear
from simam_jax.ops.moments import at_least_float32


class BoxHead(nn.Module):
    """Features (R, 7, 7, C) to class logits (R, num_classes + 1), the last for background, and deltas (R, 4 * num_classes)."""

    num_classes: int
    hidden: int = 1024

    @nn.compact
    def __call__(self, features: jax.Array) -> tuple[jax.Array, jax.Array]:
        x = features.reshape(features.shape[0], -1)
        for i in range(2):
            x = nn.relu(Linear(self.hidden, kernel_init=xavier_uniform, bias_init=zeros, name=f"shared_fcs_{i}")(x))
        logits = Linear(self.num_classes + 1, kernel_init=Initializer("normal", 0.01), bias_init=zeros, name="fc_cls")
        deltas = Linear(4 * self.num_classes, kernel_init=Initializer("normal", 0.001), bias_init=zeros, name="fc_reg")
        return logits(x), deltas(x)


class MaskHead(nn.Module):
    """Features (R, 14, 14, C) and a class (R,) for each to the logits (R, 28, 28) of that class's mask, float32."""

    num_classes: int
    width: int = 256

    @nn.compact
    def __call__(self, features: jax.Array, labels: jax.Array) -> jax.Array:
        x = features
        for i in range(4):
            x = nn.relu(Conv(self.width, 3, bias_init=zeros, name=f"convs_{i}")(x))
        x = nn.relu(Upsample(self.width, name="upsample")(x))
        return OwnClass(self.num_classes, name="conv_logits")(x, labels)


class Upsample(nn.Module):
    """The transposed 2x2 convolution at stride 2, (R, H, W, C) -> (R, 2 H, 2 W, features): every place becomes 2x2.

    `kernel` is (2, 2, C, features): row, column, inputs, outputs.
    """

    features: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        dtype = at_least_float32(x.dtype)
        kernel = self.param("kernel", he_normal, (2, 2, x.shape[-1], self.features), dtype).astype(x.dtype)
        bias = self.param("bias", zeros, (self.features,), dtype).astype(x.dtype)
        num, height, width, _ = x.shape
        y = jnp.einsum("nhwc,ijco->nhiwjo", x, kernel) + bias
        return y.reshape(num, 2 * height, 2 * width, self.features)


class OwnClass(nn.Module):
    """A 1x1 convolution to one map for each class, of which only a roi's own class is computed, in float32.

    `kernel` is (1, 1, C, num_classes), as that of the whole convolution.
    """

    num_classes: int

    @nn.compact
    def __call__(self, x: jax.Array, labels: jax.Array) -> jax.Array:
        """(R, H, W) from x (R, H, W, C) and labels (R,) in 0..num_classes - 1."""
        dtype = at_least_float32(x.dtype)
        kernel = self.param("kernel", he_normal, (1, 1, x.shape[-1], self.num_classes), dtype)
        bias = self.param("bias", zeros, (self.num_classes,), dtype)
        own = jnp.take(kernel[0, 0], labels, axis=1).T.astype(x.dtype)
        y = jnp.einsum("rhwc,rc->rhw", x, own, preferred_element_type=dtype)
        return y + jnp.take(bias, labels)[:, None, None]
