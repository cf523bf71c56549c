"""Mixup and CutMix inside the jitted update."""

import jax
import jax.numpy as jnp


def mix(
    key: jax.Array,
    index: jax.Array,
    images: jax.Array,
    targets: jax.Array,
    *,
    mixup_alpha: float,
    cutmix_alpha: float,
) -> tuple[jax.Array, jax.Array]:
    """Mixup (Zhang et al. 2018) and CutMix (Yun et al. 2019) between the neighbours 2j and 2j + 1.

    Each pair draws one weight, and, with both alphas on, one of the two methods with equal chance.

    Args:
        key: of this step, the same on all devices.
        index: int (N,), the rows' positions in the global batch; a pair's draws depend on `key` and its position alone.
        images: floating (N, H, W, C), N even.
        targets: floating (N, classes), probabilities.
        mixup_alpha: the weight is drawn from Beta(alpha, alpha); 0 turns mixup off.
        cutmix_alpha: the same for the area that stays in CutMix.
    """
    if not mixup_alpha and not cutmix_alpha:
        return images, targets
    if len(images) % 2:
        raise ValueError(f"Mixing pairs of images needs an even number of them on each device, not {len(images)}.")
    height, width = images.shape[1:3]

    def draw(pair: jax.Array) -> tuple[jax.Array, jax.Array]:
        """How much of its own image each pixel keeps, (H, W), and the mean of that over the image."""
        method_key, weight_key, y_key, x_key = jax.random.split(jax.random.fold_in(key, pair), 4)
        chance = 1.0 if not mixup_alpha else 0.0 if not cutmix_alpha else 0.5
        cut = jax.random.uniform(method_key) < chance
        alpha = jnp.where(cut, cutmix_alpha, mixup_alpha)
        weight = jax.random.beta(weight_key, alpha, alpha)

        inside = jnp.ones((), bool)
        for size, axis, centre_key in ((height, 0, y_key), (width, 1, x_key)):
            half = jnp.floor(size * jnp.sqrt(1 - weight)) // 2
            offset = jnp.arange(size) - jax.random.randint(centre_key, (), 0, size)
            inside = inside & jnp.expand_dims((offset >= -half) & (offset < half), 1 - axis)
        keep = jnp.where(cut, 1 - inside.astype(jnp.float32), weight)
        return keep, jnp.mean(keep)

    keep, share = (jnp.repeat(x, 2, axis=0) for x in jax.vmap(draw)(index[::2] // 2))
    keep, share = keep[..., None].astype(images.dtype), share[:, None].astype(targets.dtype)
    return (
        keep * images + (1 - keep) * _partners(images),
        share * targets + (1 - share) * _partners(targets),
    )


def _partners(x: jax.Array) -> jax.Array:
    return x.reshape(-1, 2, *x.shape[1:])[:, ::-1].reshape(x.shape)
