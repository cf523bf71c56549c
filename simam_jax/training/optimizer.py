"""SGD as PyTorch defines it, and the learning-rate schedules, from `config.optimizer` and `config.schedule`."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from simam_jax import errors

Schedule = Callable[[jax.typing.ArrayLike], jax.Array]


def steps_in(epochs: float, num_examples: int, batch_size: int) -> int:
    """Updates after which `epochs` passes over `num_examples` images are complete: every duration is resolved here."""
    # Rounded, because an error in the last bit must not add an update.
    return math.ceil(round(epochs * num_examples / batch_size, 6))


def warmup_steps(config: ConfigDict, num_examples: int, batch_size: int) -> int:
    """Updates of the warm-up; `config` is the `schedule` section."""
    return config.warmup_steps or steps_in(config.warmup_epochs, num_examples, batch_size)


def scaled(config: ConfigDict, batch_size: int) -> ConfigDict:
    """The `schedule` section with rates for a batch of this size, where it says which one they are for (Goyal et al., 2017)."""
    if not config.batch_size or config.batch_size == batch_size:
        return config
    config, factor = config.copy_and_resolve_references(), batch_size / config.batch_size
    for name in ("learning_rate", "final_learning_rate", "warmup_learning_rate"):
        config[name] *= factor
    return config


def learning_rate(config: ConfigDict, *, num_examples: int, batch_size: int, num_steps: int) -> Schedule:
    """The learning rate of each update.

    Args:
        config: the `schedule` section.
        num_examples: images in the training set.
        batch_size: images per update.
        num_steps: updates of the whole run; the cosine reaches `final_learning_rate` there.

    Returns:
        A function of the update's index (from 0).

    Raises:
        UserError: an unknown schedule name.
    """
    warmup = warmup_steps(config, num_examples, batch_size)
    drops = jnp.array([steps_in(e, num_examples, batch_size) for e in config.step_epochs], jnp.int32)

    def step_rate(step: jax.typing.ArrayLike) -> jax.Array:
        return config.learning_rate * config.step_factor ** jnp.sum(jnp.asarray(step) >= drops)

    def cosine_rate(step: jax.typing.ArrayLike) -> jax.Array:
        progress = jnp.clip((jnp.asarray(step) - warmup) / max(num_steps - warmup, 1), 0.0, 1.0)
        span = config.learning_rate - config.final_learning_rate
        return config.final_learning_rate + span * 0.5 * (1.0 + jnp.cos(jnp.pi * progress))

    rates = {"step": step_rate, "cosine": cosine_rate}
    if config.name not in rates:
        raise errors.unknown("config.schedule.name", config.name, rates)
    main = rates[config.name]

    def rate(step: jax.typing.ArrayLike) -> jax.Array:
        start = config.warmup_learning_rate
        ramp = (
            0.0 if config.warmup_constant else (config.learning_rate - start) * (jnp.asarray(step) + 1) / (warmup + 1)
        )
        return jnp.where(jnp.asarray(step) < warmup, start + ramp, main(step))

    return rate


def sgd(config: ConfigDict, rate: Schedule) -> optax.GradientTransformation:
    """SGD in PyTorch's form: `g += weight_decay * p; buf = momentum * buf + g; p -= rate * buf`.

    Args:
        config: the `optimizer` section; `decay_bn_and_bias=False` spares parameters with fewer than two dimensions.
        rate: the learning rate of each update.
    """

    def decayed(params: optax.Params) -> optax.Params:
        return jax.tree.map(lambda p: config.decay_bn_and_bias or p.ndim > 1, params)

    clip = [optax.clip_by_global_norm(config.clip_global_norm)] if config.clip_global_norm else []
    return optax.chain(
        *clip,
        optax.add_decayed_weights(config.weight_decay, mask=decayed),
        optax.sgd(rate, momentum=config.momentum or None, nesterov=config.nesterov),
    )
