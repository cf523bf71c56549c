"""Where a network looks: SimAM's weights and Grad-CAM, as arrays. `figures` draws them."""

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.traverse_util import flatten_dict
from jax.typing import ArrayLike

from simam_jax import errors
from simam_jax.ops.moments import at_least_float32


def attention_weights(
    model: nn.Module, variables: Any, images: jax.Array, *more: Any, method: str | None = None
) -> dict[str, jax.Array]:
    """The weights of every SimAM in a network, from the first layer to the last; empty for a network without SimAM.

    Args:
        model, variables: any network with `SimAM` in it.
        images: (N, H, W, 3), normalised.
        more: what the network takes beside them.
        method: of the network, that is called; None: the network itself.

    Returns:
        By the layer's name, such as "layer3_1", the weights (N, H, W, C), in (0.62, 1] (Eq. 5).
    """
    return dict(sorted(_attention_weights(model, method, variables, images, *more).items(), key=_natural))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _attention_weights(model: nn.Module, method: str | None, variables: Any, *inputs: Any) -> dict[str, jax.Array]:
    outputs: Any = model.apply(variables, *inputs, method=method, mutable=["intermediates"])
    sown: Any = flatten_dict(outputs[1].get("intermediates", {}))
    return {
        "/".join(path[:-1]).removesuffix("/attention"): calls[-1]
        for path, calls in sown.items()
        if path[-1] == "weights"
    }


def _natural(item: tuple[str, Any]) -> list[tuple[str, int]]:
    """A key that sorts layer10 behind layer9: JAX returns dictionaries in the order of their letters."""
    return [(word, int(number or 0)) for word, number in re.findall(r"(\D*)(\d*)", item[0])]


def grad_cam(
    model: nn.Module, variables: Any, images: jax.Array, class_index: ArrayLike, layer: str | None = None
) -> jax.Array:
    """Grad-CAM: the evidence for a class at every position of a stage's output.

    Selvaraju et al.: "Grad-CAM: Visual Explanations from Deep Networks via Gradient-Based Localization", ICCV 2017,
    Eq. 1 and 2: the sum of the channels, each weighted by the mean gradient of the class's logit, cut off at 0.

    Args:
        model, variables: one of `create_model`.
        images: (N, H, W, 3), normalised.
        class_index: one for all images, or (N,).
        layer: the stage, "layer1", "layer2", ...; None: the last.

    Returns:
        (N, H', W') in 0..1, each map divided by its maximum. All 0 where no position has positive evidence.

    Raises:
        UserError: the network has no such class or no such stage.
    """
    num_classes: int = model.num_classes  # pyright: ignore[reportAttributeAccessIssue]
    index = np.broadcast_to(class_index, len(images))
    if not np.isin(index, range(num_classes)).all():
        raise errors.UserError(f"class_index must be in 0..{num_classes - 1}, got {class_index}.")
    stages = _stages.eval_shape(model, variables, images)
    if layer is None:
        layer = max(stages.items(), key=_natural)[0]
    if layer not in stages:
        raise errors.unknown("layer", layer, stages)
    return _grad_cam(model, layer, variables, images, index, jnp.zeros_like(stages[layer]))


@functools.partial(jax.jit, static_argnums=0)
def _stages(model: nn.Module, variables: Any, images: jax.Array) -> dict[str, jax.Array]:
    outputs: Any = model.apply(variables, images, features=True)
    return outputs[1]


@functools.partial(jax.jit, static_argnums=(0, 1))
def _grad_cam(
    model: nn.Module, layer: str, variables: Any, images: jax.Array, index: jax.Array, zeros: jax.Array
) -> jax.Array:
    def score(shift: jax.Array) -> tuple[jax.Array, jax.Array]:
        outputs: Any = model.apply({**variables, "perturbations": {layer: shift}}, images, features=True)
        logits, stages = outputs
        return jnp.take_along_axis(logits, index[:, None], axis=1).sum(), stages[layer]

    gradient, maps = jax.grad(score, has_aux=True)(zeros)
    wide = at_least_float32(maps.dtype)
    importance = gradient.astype(wide).mean((1, 2), keepdims=True)
    heat = nn.relu((importance * maps.astype(wide)).sum(-1))
    highest = heat.max((1, 2), keepdims=True)
    return heat / jnp.where(highest > 0, highest, 1)
