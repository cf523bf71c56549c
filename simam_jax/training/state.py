"""Everything that an update changes, in one tree: what a checkpoint holds."""

from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from flax.traverse_util import flatten_dict, unflatten_dict

from simam_jax.task import Path

Tree = Any


@flax.struct.dataclass
class TrainState:
    """The state of a run after `step` updates.

    Attributes:
        step: updates done, int32 scalar. The position in the data is a function of it.
        variables: `{"params": ..., "batch_stats": ...}` of the network.
        opt_state: the optimizer's, for the parameters that are trained.
        ema: exponential moving average of `variables`, or None.
        key: raw key data (uint32) of the run; each update folds its step in.
    """

    step: jax.Array
    variables: Tree
    opt_state: Tree
    ema: Tree | None
    key: jax.Array


def create_state(
    variables: Tree,
    optimizer: optax.GradientTransformation,
    *,
    seed: int,
    ema: bool,
    trainable: Callable[[Path], bool] = lambda _path: True,
) -> TrainState:
    """The state before the first update; `ema` starts the average at the initial variables."""
    trained, _ = partition(variables["params"], trainable)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        variables=variables,
        opt_state=jax.jit(optimizer.init)(trained),
        ema=jax.tree.map(jnp.copy, variables) if ema else None,  # a copy, because the update donates both
        key=jax.random.key_data(jax.random.key(seed)),
    )


def partition(params: Tree, trainable: Callable[[Path], bool]) -> tuple[Tree, Tree]:
    """The parameters that are trained, and the frozen ones: two trees without each other's leaves."""
    flat = flatten_dict(params)
    trained = {path: leaf for path, leaf in flat.items() if trainable(path)}
    frozen = {path: leaf for path, leaf in flat.items() if path not in trained}
    return unflatten_dict(trained), unflatten_dict(frozen)


def merge(trained: Tree, frozen: Tree) -> Tree:
    """The inverse of `partition`."""
    return unflatten_dict(flatten_dict(trained) | flatten_dict(frozen))
