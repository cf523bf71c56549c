"""One update and one evaluation batch of a `Task`, as jitted `shard_map` programs over a 1-D mesh of devices.

The state is replicated, the batch is sharded; gradients, statistics and sums meet in one all-reduce.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from simam_jax import errors
from simam_jax.task import AXIS, Path, Sums
from simam_jax.training.optimizer import Schedule
from simam_jax.training.state import TrainState, Tree, merge, partition

Batch = dict[str, jax.Array]
Loss = Callable[[Tree, Batch, jax.Array], tuple[jax.Array, tuple[Tree, Sums]]]  # see `simam_jax.task.Task`
Values = dict[str, Any]  # what an update reports: "sums" and "scalars" by name


def make_mesh() -> Mesh:
    """All devices of all hosts in one row, a host's own ones side by side."""
    return Mesh(np.array(jax.devices()), (AXIS,))


def batch_sharded(mesh: Mesh) -> NamedSharding:
    """The sharding of batches: the first axis is cut over the devices."""
    return NamedSharding(mesh, P(AXIS))


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of the state: every device holds all of it."""
    return NamedSharding(mesh, P())


def check_divisible(config: ConfigDict, num_devices: int) -> None:
    """Raises `UserError` unless the batch divides over devices and micro-batches."""
    accum = config.optimizer.grad_accum_steps
    unit = num_devices * accum
    if config.batch_size < 1 or config.batch_size % unit:
        below = config.batch_size // unit * unit
        raise errors.UserError(
            f"config.batch_size={config.batch_size} does not divide over {num_devices} devices x {accum} micro-batches: "
            f"take a multiple of {unit}, such as {f'{below} or ' if below > 0 else ''}{max(below, 0) + unit}."
        )


def make_train_step(
    loss: Loss,
    optimizer: optax.GradientTransformation,
    rate: Schedule,
    mesh: Mesh,
    *,
    trainable: Callable[[Path], bool] = lambda _path: True,
    micro_batches: int = 1,
    ema_decay: float = 0.0,
    compiler_options: dict[str, Any] | None = None,
) -> Callable[[TrainState, Batch], tuple[TrainState, Values]]:
    """The jitted update `step(state, batch) -> (state, values)`; `state` is donated.

    Args:
        loss, trainable, compiler_options: a task's.
        optimizer, rate: the learning rate is used by the optimizer and reported.
        mesh: of `make_mesh`.
        micro_batches: into how many parts, one after the other, each device's part of a batch is cut.
        ema_decay: per update, of the average of all variables, where the state holds one.

    Returns:
        A function. `batch` is sharded over the mesh. `values` holds `sums`, the task's (sum, count) by name over the whole
        batch, and `scalars`: `loss`, the mean over the batch, `learning_rate`, `grad_norm` and `param_norm`.
        With micro-batches, batch norm takes the statistics of each and the running ones move once for each.
    """

    def gradient(variables: Tree, batch: Batch, key: jax.Array):
        """This device's gradient in the trained parameters, and (batch_stats, loss, sums)."""
        trained, frozen = partition(variables["params"], trainable)

        def value_and_rest(trained: Tree):
            value, (batch_stats, sums) = loss(variables | {"params": merge(trained, frozen)}, batch, key)
            return value, (batch_stats, value, sums)

        return jax.grad(value_and_rest, has_aux=True)(trained)

    def accumulate(variables: Tree, batch: Batch, key: jax.Array):
        """The same over micro-batches, one after the other: mean gradient, last statistics, mean loss, added sums."""

        def micro_step(carry: tuple[Tree, Tree], inputs: tuple[jax.Array, Batch]):
            total, batch_stats = carry
            index, micro_batch = inputs
            seen = variables | ({"batch_stats": batch_stats} if batch_stats else {})
            grads, (updated, *reports) = gradient(seen, micro_batch, jax.random.fold_in(key, index))
            return (jax.tree.map(jnp.add, total, grads), updated or batch_stats), reports

        def dealt(x: jax.Array) -> jax.Array:
            """The rows dealt out like cards, so that the micro-batches are the same ones on any number of devices."""
            return x.reshape(-1, micro_batches, *x.shape[1:]).swapaxes(0, 1)

        trained, _ = partition(variables["params"], trainable)
        start = jax.tree.map(jnp.zeros_like, trained), variables.get("batch_stats", {})
        inputs = jnp.arange(micro_batches), jax.tree.map(dealt, batch)
        (total, batch_stats), (losses, sums) = jax.lax.scan(micro_step, start, inputs)
        grads = jax.tree.map(lambda g: g / micro_batches, total)
        return grads, (batch_stats, losses.mean(), jax.tree.map(lambda x: x.sum(0), sums))

    def device_step(state: TrainState, batch: Batch) -> tuple[TrainState, Values]:
        key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
        # Marked as differing between devices, so that gradients stay local until the one all-reduce below.
        local = jax.lax.pcast(state.variables, AXIS, to="varying")
        grads, (batch_stats, value, sums) = (gradient if micro_batches == 1 else accumulate)(local, batch, key)
        grads, batch_stats, value = jax.lax.pmean((grads, batch_stats, value), AXIS)
        sums = jax.lax.psum(sums, AXIS)

        trained, frozen = partition(state.variables["params"], trainable)
        updates, opt_state = optimizer.update(grads, state.opt_state, trained)
        variables = state.variables | {"params": merge(optax.apply_updates(trained, updates), frozen)}
        if batch_stats:
            variables["batch_stats"] = batch_stats
        ema = state.ema
        if ema is not None:
            average: Any = optax.incremental_update(variables, ema, 1.0 - ema_decay)
            moving, _ = partition(average["params"], trainable)
            ema = average | {"params": merge(moving, frozen)}  # the average of what never changes would be rounded
        scalars = {
            "loss": value,
            "learning_rate": rate(state.step),
            "grad_norm": optax.tree.norm(grads),
            "param_norm": optax.tree.norm(variables["params"]),
        }
        state = TrainState(state.step + 1, variables, opt_state, ema, state.key)
        return state, {"sums": sums, "scalars": scalars}

    mapped = jax.shard_map(device_step, mesh=mesh, in_specs=(P(), P(AXIS)), out_specs=(P(), P()))
    return jax.jit(mapped, donate_argnums=0, compiler_options=compiler_options)


def make_eval_step(
    measure: Callable[[Tree, Batch], Tree], mesh: Mesh, compiler_options: dict[str, Any] | None = None
) -> Callable[[Tree, Batch], Tree]:
    """The jitted `step(variables, batch) -> outputs`: what a task's `measure` gives for a sharded batch."""
    mapped = jax.shard_map(measure, mesh=mesh, in_specs=(P(), P(AXIS)), out_specs=P(AXIS))
    return jax.jit(mapped, compiler_options=compiler_options)
