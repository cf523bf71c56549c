"""What all networks share: how they are called, what they are told, how they end."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax
from jax.export import is_symbolic_dim

from simam_jax.errors import UserError
from simam_jax.models.blocks import Layers
from simam_jax.ops.parts import in_parts, part_size
from simam_jax.ops.pooling import global_average

Outputs = jax.Array | tuple[jax.Array, dict[str, jax.Array]]

_PIXELS = 2**19  # of images whose maps stay in a CPU's caches: eight of 224 x 224
IMAGE = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)  # no variable depends on the images' number or size


def variable_shapes(model: nn.Module) -> dict[str, Any]:
    """The shapes and dtypes of what `model.init` draws, without drawing it."""
    return jax.eval_shape(model.init, jax.random.key(0), IMAGE)


def init_variables(model: nn.Module, key: jax.Array) -> dict[str, Any]:
    """Freshly drawn variables of `model`."""
    # On CPUs the optimiser of XLA's compiler spends seconds on every single draw; nothing is gained by it here.
    options = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None
    return jax.jit(model.init, compiler_options=options)(key, jnp.zeros(IMAGE.shape, IMAGE.dtype))


class Network(nn.Module, kw_only=True):
    """A classifier of images: `model.apply(variables, x, train=False, features=False)`.

    x is (N, H, W, 3), floating and normalised. The logits are (N, num_classes), float32 (float64 if `dtype` is).
    With `features` the result is (logits, {"layer1": (N, H1, W1, C1), ...}), the output of each stage in `dtype`.
    What `variables["perturbations"]` holds under a stage's name is added to its output, so that gradients with respect
    to that output can be taken (as by `flax.linen.Module.perturb`, which would also make `init` store zeros).
    With `train`, batch norm uses the batch's statistics and "batch_stats" must be mutable; networks with dropout
    also need `rngs={"dropout": key}`.
    """

    num_classes: int
    attention: str = "none"  # none, simam, se, cbam
    attention_param: float = 0.0  # simam: lambda; se, cbam: reduction
    dtype: jnp.dtype = jnp.dtype("float32")  # of the computation; parameters are float32 (float64 if dtype is)
    bn_group_size: int = 0  # images per batch-norm statistic; see layers.BatchNorm
    axis_name: str | None = None  # the mesh axis that the batch is cut over, where there is one

    def __call__(self, x: jax.Array, train: bool = False, features: bool = False) -> Outputs:
        x = self.cast(x)
        watched = self.is_mutable_collection("intermediates") or "perturbations" in self.variables
        if train or watched or self.is_initializing():
            return self.compute(x, train, features)
        compute = partial(self.clone(parent=None).apply, train=False, features=features, method="compute")
        return _cached(compute, self.variables, x)

    def compute(self, x: jax.Array, train: bool, features: bool) -> Outputs:
        """The same of all images at once, which are in `dtype`."""
        raise NotImplementedError

    @nn.nowrap
    def layers(self, **changes) -> Layers:
        return Layers(self.attention, self.attention_param, self.bn_group_size, self.axis_name, **changes)

    @nn.nowrap
    def cast(self, x: jax.Array) -> jax.Array:
        """The input in `dtype`. Raises UserError where it is no batch of images."""
        if x.ndim != 4 or x.shape[-1] != 3:
            raise UserError(f"A network takes images (N, H, W, 3), got the shape {x.shape}.")
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise UserError(f"A network takes normalised floating-point images, got {x.dtype}.")
        return x.astype(self.dtype)

    @nn.nowrap
    def perturbed(self, stage: str, x: jax.Array) -> jax.Array:
        """The output of a stage, plus the perturbation that the caller may have passed for it."""
        return x + self.get_variable("perturbations", stage) if self.has_variable("perturbations", stage) else x

    @nn.nowrap
    def classify(self, layers: Layers, x: jax.Array, **changes) -> jax.Array:
        """(N, H, W, C) -> logits (N, num_classes) from the means of the channels."""
        return layers.linear(self.num_classes, name="fc", **changes)(global_average(x))


def _cached(f: Callable[[Any, jax.Array], Any], variables: Any, x: jax.Array) -> Any:
    """f(variables, x); on CPUs so few images of a large batch at a time that their maps stay in the caches."""
    if any(map(is_symbolic_dim, x.shape)):  # how large a size of jax.export is cannot be asked
        return f(variables, x)
    count, height, width, _ = x.shape
    most = max(_PIXELS / (height * width), 1)
    size = part_size(count, most)
    if size == count or size <= most / 2:  # the parts of a batch that divides badly would be too small
        return f(variables, x)

    def on_cpu(variables: Any, x: jax.Array) -> Any:
        return in_parts(partial(f, variables), x, size)

    return lax.platform_dependent(variables, x, cpu=on_cpu, default=f)
