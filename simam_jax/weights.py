"""Weights from a workdir, a checkpoint or a foreign file."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flax import linen as nn

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
    item = "ema" if ema else "variables"

    def read_one(checkpoint: Path) -> tuple[nn.Module, Tree]:
        model = models.create_model(**checkpoints.read_meta(checkpoint)["model"])
        items, _ = checkpoints.read(checkpoint, {item: variable_shapes(model)})
        return model, items[item]

    return checkpoints.first_readable(path, read_one)


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
    if wrong := checkpoints.differences(checkpoints.layout(found), checkpoints.layout(fresh)):
        raise errors.UserError(
            f"The weights of config.init_from={path} do not fit {spec['model']['name']} with "
            f"{spec['model']['num_classes']} classes: {wrong}. Another number of classes is no obstacle with "
            f"--config.init_skip_head=True."
        )
    return found
