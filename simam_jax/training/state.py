"""Everything that an update changes, in one tree: what a checkpoint holds."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

from simam_jax.models.network import IMAGE

Tree = Any


@flax.struct.dataclass
class TrainState:
    """The state of a run after `step` updates.

    Attributes:
        step: updates done, int32 scalar. The position in the data is a function of it.
        variables: `{"params": ..., "batch_stats": ...}` of the model.
        opt_state: the optimizer's.
        ema: exponential moving average of `variables`, or None.
        key: raw key data (uint32) of the run; each update folds its step in.
    """

    step: jax.Array
    variables: Tree
    opt_state: Tree
    ema: Tree | None
    key: jax.Array


def init_variables(model: nn.Module, key: jax.Array) -> Tree:
    """Freshly drawn variables of `model`."""
    # On CPUs the optimiser of XLA's compiler spends seconds on every single draw; nothing is gained by it here.
    options = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None
    return jax.jit(model.init, compiler_options=options)(key, jnp.zeros(IMAGE.shape, IMAGE.dtype))


def create_state(variables: Tree, optimizer: optax.GradientTransformation, *, seed: int, ema: bool) -> TrainState:
    """The state before the first update; `ema` starts the average at the initial variables."""
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        variables=variables,
        opt_state=optimizer.init(variables["params"]),
        ema=jax.tree.map(jnp.copy, variables) if ema else None,  # a copy: the step donates both
        key=jax.random.key_data(jax.random.key(seed)),
    )
