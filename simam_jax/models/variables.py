"""The variables of a network: their shapes, and freshly drawn ones."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from simam_jax import initializers

IMAGE = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)  # no variable depends on the images' number or size


def variable_shapes(model: nn.Module) -> dict[str, Any]:
    """The shapes and dtypes of what `init_variables` draws, without drawing it."""
    return jax.eval_shape(model.init, jax.random.key(0), IMAGE)


def init_variables(model: nn.Module, key: jax.Array) -> dict[str, Any]:
    """Freshly drawn variables of `model`, NumPy's: see `initializers.draw`."""
    return initializers.draw(model, key, IMAGE)
