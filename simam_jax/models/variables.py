"""The variables of a network: their shapes, and freshly drawn ones."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

IMAGE = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)  # no variable depends on the images' number or size


def variable_shapes(model: nn.Module) -> dict[str, Any]:
    """The shapes and dtypes of what `init_variables` draws, without drawing it."""
    return jax.eval_shape(model.init, jax.random.key(0), IMAGE)


def init_variables(model: nn.Module, key: jax.Array) -> dict[str, Any]:
    """Freshly drawn variables of `model`."""
    # On CPUs the optimiser of XLA's compiler spends seconds on every single draw; nothing is gained by it here.
    options = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None
    return jax.jit(model.init, compiler_options=options)(key, jnp.zeros(IMAGE.shape, IMAGE.dtype))
