"""A state_dict of PyTorch's as the variables of a network."""

import logging
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.typing import DTypeLike

from simam_jax.errors import UserError
from simam_jax.models import Network, create_model, init_variables, variable_shapes
from simam_jax.torch_weights.names import State, VariablePath, from_torch_layout, torch_names, torch_shape

Tree = Any
logger = logging.getLogger(__name__)
PLAIN = ("none", "simam")  # kinds of attention without parameters: their weights are each other's


def from_torch(
    state: State,
    name: str,
    *,
    num_classes: int | None = None,
    attention: str = "simam",
    attention_param: float | None = None,
    dtype: DTypeLike = jnp.float32,
    min_bbox_size: float | None = None,
    skip_head: bool = False,
    source: str = "The state_dict",
) -> tuple[Network, Tree]:
    """A network with the weights of a state_dict.

    Args:
        state: arrays by the reference implementation's names; `num_batches_tracked` counts for nothing.
        name, attention, attention_param, dtype, min_bbox_size: as for `create_model`.
        num_classes: None: as many as the state_dict has.
        skip_head: leave the layers for classes as freshly drawn, for another number of classes.
        source: what an error calls the state_dict.

    Returns:
        The linen module and `{"params": ..., "batch_stats": ...}`.

    Raises:
        UserError: entries are missing, unexpected or of the wrong shape: all of them are listed. Or one is not finite.
    """
    if skip_head and num_classes is None:
        raise UserError("skip_head draws a new head: say for how many classes, with num_classes.")
    state = {key: value for key, value in state.items() if not key.endswith("num_batches_tracked")}
    one_class = create_model(name, num_classes=1, attention=attention, attention_param=attention_param)
    written_with = _attention_of(state, name, attention)
    if written_with != attention:
        logger.warning(
            "%s: trained with attention=%s, loaded with attention=%s. All weights fit, because SimAM has none; "
            "accuracy falls until the network is fine-tuned.",
            source,
            written_with,
            attention,
        )
    if num_classes is None:
        bias = ("params", *one_class.class_layers[0], "bias")
        (key,) = torch_names([bias], name, written_with).values()
        background = one_class.num_scores - 1
        num_classes = max(state[key].size - background, 1) if key in state else 1
    settings = {"attention": attention, "attention_param": attention_param, "min_bbox_size": min_bbox_size}
    model = create_model(name, num_classes=num_classes, dtype=dtype, **settings)
    expected: dict[VariablePath, Any] = flatten_dict(variable_shapes(model))
    keys = torch_names(expected, name, written_with)
    head = {path: key for path, key in keys.items() if path[1:-1] in model.class_layers}
    if skip_head:
        state = {key: value for key, value in state.items() if not _is_below(key, head.values())}
        keys = {path: key for path, key in keys.items() if path not in head}

    _check_fit(state, {key: torch_shape(path, expected[path].shape) for path, key in keys.items()}, source, model, head)
    arrays = {path: from_torch_layout(path, state[key]).astype(expected[path].dtype) for path, key in keys.items()}
    variables: dict[VariablePath, Any] = jax.tree.map(jnp.asarray, arrays)
    check_finite(variables, source)
    if skip_head:
        drawn: dict[VariablePath, Any] = flatten_dict(init_variables(model, jax.random.key(0)))
        variables |= {path: drawn[path] for path in head}
    return model, unflatten_dict(variables)


def _attention_of(state: State, name: str, attention: str) -> str:
    """The attention that the names of a state_dict are those of: the one asked for, or the other one without parameters."""
    if attention not in PLAIN:
        return attention
    counts = {}
    for kind in PLAIN:
        paths: dict[VariablePath, Any] = flatten_dict(variable_shapes(create_model(name, attention=kind)))
        counts[kind] = len(set(state) & set(torch_names(paths, name, kind).values()))
    return max(PLAIN, key=lambda kind: (counts[kind], kind == attention))


def _is_below(key: str, names: Iterable[str]) -> bool:
    """Whether a key belongs to the module of one of the names: `fc.total_ops` to that of `fc.weight`."""
    return any(key.startswith(name.rpartition(".")[0] + ".") for name in names)


def _check_fit(
    state: State,
    shapes: Mapping[str, tuple[int, ...]],
    source: str,
    model: Network,
    head: Mapping[VariablePath, str],
) -> None:
    problems = [f"  missing: {key} {shapes[key]}" for key in shapes if key not in state]
    problems += [f"  unexpected: {key} {state[key].shape}" for key in state if key not in shapes]
    problems += [
        f"  wrong shape: {key} is {state[key].shape}, must be {shape}"
        for key, shape in shapes.items()
        if key in state and state[key].shape != shape
    ]
    if not problems:
        return
    hint = "Check the model, the attention and its parameter"
    if any(key in line for line in problems for key in head.values()):
        hint += "; for another number of classes, skip the head"
    what = f"{model.architecture} with attention {model.attention}"
    raise UserError("\n".join([f"{source} does not fit {what}:", *problems, f"{hint}."]))


def check_finite(variables: Tree, source: str) -> None:
    """Raises `UserError` if a weight is infinite or no number."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(variables):
        if not np.isfinite(np.asarray(leaf, np.float32 if leaf.dtype == jnp.bfloat16 else None)).all():
            raise UserError(
                f"{source} holds weights that are not finite ({jax.tree_util.keystr(path, simple=True, separator='/')}): its training has failed. "
                f"Take an earlier checkpoint."
            )
