"""What every backbone is: images to feature maps, without a head. `models.registry` names them."""

import jax
import jax.numpy as jnp
from flax import linen as nn

from simam_jax.errors import UserError
from simam_jax.layers import LayerFactory

Features = tuple[jax.Array, dict[str, jax.Array]]


class Backbone(nn.Module, kw_only=True):
    """The convolutional part of a network: `features, stages = backbone(x, train=False)`.

    x is (N, H, W, 3), floating and normalised, in `dtype`. `features` (N, h, w, C) is what a head looks at; `stages` are
    {"layer1": (N, H1, W1, C1), ...}, the output of each stage. With `train`, batch norm uses the batch's statistics and
    "batch_stats" must be mutable. Without, it uses the running ones, and scale and bias have gradients all the same: a
    detector trains so.

    What `variables["perturbations"]` holds under a stage's name is added to the stage's output, so that gradients with
    respect to it can be taken (as by `flax.linen.Module.perturb`, which would also make `init` store zeros).
    """

    attention: str = "none"  # none, simam, se, cbam
    attention_param: float = 0.0  # simam: lambda; se, cbam: reduction
    dtype: jnp.dtype = jnp.dtype("float32")  # of the computation; parameters are float32 (float64 if dtype is)
    bn_group_size: int = 0  # images per batch-norm statistic; see layers.BatchNorm
    axis_name: str | None = None  # the mesh axis that the batch is sharded over, where there is one
    trace_blocks_once: bool = False  # equal blocks are traced once; see blocks.traced_once

    def __call__(self, x: jax.Array, train: bool = False) -> Features:
        raise NotImplementedError

    @nn.nowrap
    def factory(self, **changes) -> LayerFactory:
        """What makes the layers."""
        return LayerFactory(self.attention, self.attention_param, self.bn_group_size, self.axis_name, **changes)

    @nn.nowrap
    def perturbed(self, stage: str, x: jax.Array) -> jax.Array:
        """The output of a stage, plus the perturbation that the caller may have passed for it."""
        return x + self.get_variable("perturbations", stage) if self.has_variable("perturbations", stage) else x


def as_images(x: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """x in `dtype`. Raises UserError where it is no batch of normalised images."""
    if x.ndim != 4 or x.shape[-1] != 3:
        raise UserError(f"A network takes images (N, H, W, 3), got the shape {x.shape}.")
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise UserError(f"A network takes normalised floating-point images, got {x.dtype}.")
    return x.astype(dtype)
