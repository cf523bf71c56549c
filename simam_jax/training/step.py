"""One update and one evaluation batch, as jitted `shard_map` programs over a 1-D mesh of devices.

Every device holds the whole state and its share of the batch; gradients, statistics and metrics meet in one all-reduce.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from simam_jax import errors
from simam_jax.classification import mixing
from simam_jax.ops.images import normalize
from simam_jax.training.optimizer import Schedule
from simam_jax.training.state import TrainState, Tree

AXIS = "data"
Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]


def make_mesh() -> Mesh:
    """All devices of all hosts in one row, a host's own ones side by side."""
    return Mesh(np.array(jax.devices()), (AXIS,))


def split_over(mesh: Mesh) -> NamedSharding:
    """How batches lie: the first dimension is cut over the devices."""
    return NamedSharding(mesh, P(AXIS))


def whole_on(mesh: Mesh) -> NamedSharding:
    """How the state lies: whole, on every device."""
    return NamedSharding(mesh, P())


def check_divisible(config: ConfigDict, num_devices: int) -> None:
    """Raises `UserError` unless the batch divides over devices, micro-batches, BN groups and, for mixing, pairs."""
    accum, group = config.optimizer.grad_accum_steps, config.model.bn_group_size
    pairs = 2 if config.mixup_alpha or config.cutmix_alpha else 1
    unit = num_devices * accum * pairs
    if config.batch_size < 1 or config.batch_size % unit:
        below = config.batch_size // unit * unit
        raise errors.UserError(
            f"config.batch_size={config.batch_size} does not divide over {num_devices} devices x {accum} micro-batches"
            f"{' x pairs for mixup and cutmix' if pairs == 2 else ''}: take a multiple of {unit}, "
            f"such as {f'{below} or ' if below > 0 else ''}{max(below, 0) + unit}."
        )
    local = config.batch_size // (num_devices * accum)
    possible = [g for g in range(1, local + 1) if local % g == 0]
    possible += [local * m for m in range(2, num_devices + 1) if num_devices % m == 0]
    if group and group not in possible:
        raise errors.UserError(
            f"config.model.bn_group_size={group} cannot be made of {local} images on each of {num_devices} devices"
            f"{f' (in each of {accum} micro-batches)' if accum > 1 else ''}. "
            f"Possible: 0 (all of one device), {', '.join(map(str, possible))}."
        )


def make_train_step(
    model: nn.Module, optimizer: optax.GradientTransformation, rate: Schedule, config: ConfigDict, mesh: Mesh
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """The jitted update `step(state, batch) -> (state, metrics)`; `state` is donated.

    Args:
        model: built with `axis_name=AXIS`.
        optimizer, rate: as `config.optimizer` and `config.schedule` say.
        config: the run's; `data.mean`, `data.std`, `label_smoothing`, `mixup_alpha`, `cutmix_alpha`, `ema_decay` and
            `optimizer.grad_accum_steps` are used.
        mesh: of `make_mesh`.

    Returns:
        A function. `batch` has `image` (N, H, W, C) uint8 and `label` (N,) int32, cut over the mesh. `metrics` has the
        sums `count`, `loss`, `top1`, `top5` over the N images, and `learning_rate`, `grad_norm`, `param_norm`.
        With micro-batches, batch norm takes the statistics of each and the running ones move once for each.
    """
    accum = config.optimizer.grad_accum_steps

    def loss_fn(params: Tree, batch_stats: Tree, images: jax.Array, targets: jax.Array, key: jax.Array):
        logits, updates = model.apply(
            {"params": params, "batch_stats": batch_stats},
            images,
            train=True,
            mutable=["batch_stats"],
            rngs={"dropout": key},
        )
        losses = optax.softmax_cross_entropy(logits, targets)
        return losses.mean(), (updates.get("batch_stats", {}), losses, logits)

    def accumulate(params: Tree, batch_stats: Tree, images: jax.Array, targets: jax.Array, key: jax.Array):
        """This device's mean gradient over its micro-batches, one after the other."""

        def micro_step(carry, inputs):
            grads, batch_stats = carry
            index, images, targets = inputs
            micro_key = jax.random.fold_in(key, index)
            micro_grads, aux = jax.grad(loss_fn, has_aux=True)(params, batch_stats, images, targets, micro_key)
            batch_stats, losses, logits = aux
            return (jax.tree.map(jnp.add, grads, micro_grads), batch_stats), (losses, logits)

        def cut(x: jax.Array) -> jax.Array:
            """Deals the rows out like cards, so that the micro-batches are the same ones on any number of devices."""
            return x.reshape(-1, accum, *x.shape[1:]).swapaxes(0, 1)

        def gather(x: jax.Array) -> jax.Array:
            return x.swapaxes(0, 1).reshape(-1, *x.shape[2:])

        start = (jax.tree.map(jnp.zeros_like, params), batch_stats)
        (grads, batch_stats), (losses, logits) = jax.lax.scan(
            micro_step, start, (jnp.arange(accum), cut(images), cut(targets))
        )
        grads = jax.tree.map(lambda g: g / accum, grads)
        return grads, (batch_stats, gather(losses), gather(logits))

    def device_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        labels = batch["label"]
        key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
        mix_key, dropout_key = jax.random.split(key)
        images = normalize(batch["image"], config.data.mean, config.data.std, model.dtype)
        targets = optax.smooth_labels(jax.nn.one_hot(labels, model.num_classes), config.label_smoothing)
        if config.mixup_alpha or config.cutmix_alpha:
            index = jax.lax.axis_index(AXIS) * labels.shape[0] + jnp.arange(labels.shape[0])
            images, targets = mixing.mix(
                mix_key, index, images, targets, mixup_alpha=config.mixup_alpha, cutmix_alpha=config.cutmix_alpha
            )

        # Marked as differing between devices, so that gradients stay local until the one all-reduce below.
        local = jax.lax.pcast(state.variables, AXIS, to="varying")
        params, batch_stats = local["params"], local.get("batch_stats", {})
        gradient = jax.grad(loss_fn, has_aux=True) if accum == 1 else accumulate
        grads, (batch_stats, losses, logits) = gradient(params, batch_stats, images, targets, dropout_key)
        sums = count_correct(logits, labels, losses, jnp.ones_like(losses, bool))
        (grads, batch_stats), sums = jax.lax.pmean((grads, batch_stats), AXIS), jax.lax.psum(sums, AXIS)

        params = state.variables["params"]
        updates, opt_state = optimizer.update(grads, state.opt_state, params)
        variables = state.variables | {"params": optax.apply_updates(params, updates)}
        if batch_stats:
            variables["batch_stats"] = batch_stats
        ema = state.ema
        if ema is not None:
            ema = optax.incremental_update(variables, ema, 1.0 - config.ema_decay)
        gauges = {
            "learning_rate": rate(state.step),
            "grad_norm": optax.tree.norm(grads),
            "param_norm": optax.tree.norm(variables["params"]),
        }
        return TrainState(state.step + 1, variables, opt_state, ema, state.key), sums | gauges

    mapped = jax.shard_map(device_step, mesh=mesh, in_specs=(P(), P(AXIS)), out_specs=(P(), P()))
    return jax.jit(mapped, donate_argnums=0)


def make_eval_step(model: nn.Module, config: ConfigDict, mesh: Mesh) -> Callable[[Tree, Batch], Metrics]:
    """The jitted `step(variables, batch) -> sums` of `count`, `loss`, `top1`, `top5` over the images with `mask` set."""

    def device_step(variables: Tree, batch: Batch) -> Metrics:
        images = normalize(batch["image"], config.data.mean, config.data.std, model.dtype)
        logits: Any = model.apply(variables, images, train=False)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
        return jax.lax.psum(count_correct(logits, batch["label"], losses, batch["mask"] > 0), AXIS)

    return jax.jit(jax.shard_map(device_step, mesh=mesh, in_specs=(P(), P(AXIS)), out_specs=P()))


def count_correct(logits: jax.Array, labels: jax.Array, losses: jax.Array, real: jax.Array) -> Metrics:
    """Sums over the `real` examples: `count`, `loss`, and labels that are the first (`top1`) or in the first five (`top5`).

    Equal logits rank by index, as argmax does; a NaN is never correct.

    Args:
        logits: (N, classes). labels: (N,) int. losses: (N,). real: (N,) bool.
    """
    own = jnp.take_along_axis(logits, labels[:, None], axis=1)
    earlier = jnp.arange(logits.shape[1]) < labels[:, None]
    rank = jnp.sum((logits > own) | ((logits == own) & earlier), axis=1)
    ranked = real & jnp.isfinite(own[:, 0])
    return {
        "count": jnp.sum(real, dtype=jnp.float32),
        "loss": jnp.sum(jnp.where(real, losses, 0.0)),
        "top1": jnp.sum(ranked & (rank < 1), dtype=jnp.float32),
        "top5": jnp.sum(ranked & (rank < 5), dtype=jnp.float32),
    }
