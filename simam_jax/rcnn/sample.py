"""Sampling: the few candidates of an image that a loss is taken over."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from simam_jax.rcnn.assign import IGNORED, NEGATIVE


class Sample(NamedTuple):
    """Chosen candidates: positives, then negatives, then padding."""

    indices: jax.Array  # (num,) int32
    num_positive: jax.Array  # () int32
    count: jax.Array  # () int32, positives and negatives

    @property
    def positive(self) -> jax.Array:
        """(num,) bool."""
        return jnp.arange(self.indices.shape[-1]) < self.num_positive[..., None]

    @property
    def valid(self) -> jax.Array:
        """(num,) bool."""
        return jnp.arange(self.indices.shape[-1]) < self.count[..., None]


@partial(jax.jit, static_argnames=("num", "max_positive"))
def sample(matches: jax.Array, key: jax.Array, *, num: int, max_positive: int) -> Sample:
    """At most `max_positive` random positives, filled up to `num` with random negatives.

    Args:
        matches: (A,) int32 of `assign`.
        key: a random key of this image's own.
    """
    # One draw does for both, since no candidate is both. Floats: top_k of integers is far slower on CPUs.
    priority = jax.random.uniform(key, matches.shape)

    def choose(which: jax.Array, most: int) -> tuple[jax.Array, jax.Array]:
        _, indices = lax.top_k(jnp.where(which, priority, -1), min(most, matches.shape[0]))
        return indices.astype(jnp.int32), jnp.minimum(which.sum(dtype=jnp.int32), most)

    positives, num_positive = choose(matches > NEGATIVE, max_positive)
    negatives, num_negative = choose(matches == NEGATIVE, num)
    place = jnp.arange(num)
    indices = jnp.where(
        place < num_positive,
        positives[jnp.minimum(place, positives.shape[0] - 1)],
        negatives[jnp.clip(place - num_positive, 0, negatives.shape[0] - 1)],
    )
    count = jnp.minimum(num_positive + num_negative, num)
    return Sample(jnp.where(place < count, indices, 0), num_positive, count)


def with_targets(
    targets: jax.Array, count: jax.Array, proposals: jax.Array, matches: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Candidates and matches with the ground truth in front, each matched to itself, as the second stage samples them.

    Args:
        targets: (G, 4) ground truth, of which `count` are real.
        proposals, matches: (R, 4), and (R,) of `assign`.

    Returns:
        (G + R, 4) and (G + R,); the padding among the ground truth is ignored.
    """
    own = jnp.arange(targets.shape[0], dtype=matches.dtype)
    own = jnp.where(own < count, own + 1, IGNORED)
    return jnp.concatenate([targets, proposals]), jnp.concatenate([own, matches])
