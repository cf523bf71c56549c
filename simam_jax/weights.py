"""Weights from a workdir, a checkpoint or a foreign file."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from flax import linen as nn
from flax.traverse_util import flatten_dict

from simam_jax import checkpoints, convert, errors, models
from simam_jax.models import variable_shapes

Tree = Any


def load(path: str | Path, *, ema: bool = False) -> tuple[nn.Module, Tree]:
    """A trained network: `model, variables = load(path)`, then `model.apply(variables, images)`.

    Args:
        path: a workdir of train.py (its newest checkpoint) or a checkpoint in it (`WORKDIR/checkpoints/STEP`), written on
            any number of devices. The optimizer's state is not read.
        ema: the exponential moving average of the variables, where the run kept one.

    Returns:
        The linen module, and `{"params": ..., "batch_stats": ...}` on the first device of this process.

    Raises:
        UserError: there is no checkpoint, it is damaged or of another model, or `ema` is asked of a run without one.
    """
    path = checkpoints.newest(path)
    model = models.create_model(**checkpoints.read_meta(path)["model"])
    like = variable_shapes(model)
    item = "ema" if ema else "variables"
    try:
        items, _ = checkpoints.read(path, {item: like})
    except checkpoints.DamagedError as error:
        raise errors.UserError(f"The checkpoint {path} is damaged: {error}") from error
    return model, items[item]


def start_from(path: str, model: nn.Module, spec: Mapping[str, Any], fresh: Tree, *, skip_head: bool) -> Tree:
    """`fresh` with the weights of `config.init_from`; with `init_skip_head` the classifier stays fresh."""
    if Path(path).is_dir():
        other, found = load(path)
        same = ("attention", "attention_param")  # what the parameters' names and shapes do not tell
        if any(getattr(other, name) != getattr(model, name) for name in same):
            had, has = ({name: getattr(m, name) for name in same} for m in (other, model))
            logging.warning("config.init_from=%s was trained with %s, this run has %s.", path, had, has)
    else:
        _, found = convert.load_torch(path, skip_head=skip_head, **spec["model"])
    if skip_head:
        found = found | {"params": found["params"] | {convert.HEAD: fresh["params"][convert.HEAD]}}
    if checkpoints.layout(found) != checkpoints.layout(fresh):
        raise errors.UserError(
            f"The weights of config.init_from={path} do not fit {spec['model']['name']} with "
            f"{spec['model']['num_classes']} classes: {_differences(found, fresh)}. Another number of classes is no obstacle with --config.init_skip_head=True."
        )
    return found


def _differences(found: Tree, wanted: Tree) -> str:
    shapes = (jax.tree.map(lambda leaf: leaf.shape, tree) for tree in (found, wanted))
    has, needs = (flatten_dict(tree, sep="/") for tree in shapes)
    lines = [f"missing {name}" for name in sorted(set(needs) - set(has))]
    lines += [f"unexpected {name}" for name in sorted(set(has) - set(needs))]
    lines += [
        f"{name} is {has[name]} and not {needs[name]}"
        for name in sorted(set(has) & set(needs))
        if has[name] != needs[name]
    ]
    return "; ".join(lines[:8]) + (f"; and {len(lines) - 8} more" if len(lines) > 8 else "")
