"""Whether a label is the likeliest class, or among the likeliest five."""

import jax
import jax.numpy as jnp


def hits(logits: jax.Array, labels: jax.Array) -> dict[str, jax.Array]:
    """For each image, bool (N,): `top1`, its label has the highest logit; `top5`, one of the five highest.

    Equal logits rank by index, as argmax does; a NaN is never a hit.

    Args:
        logits: (N, classes).
        labels: (N,) int.
    """
    own = jnp.take_along_axis(logits, labels[:, None], axis=1)
    earlier = jnp.arange(logits.shape[1]) < labels[:, None]
    rank = jnp.sum((logits > own) | ((logits == own) & earlier), axis=1)
    finite = jnp.isfinite(own[:, 0])
    return {"top1": finite & (rank < 1), "top5": finite & (rank < 5)}
