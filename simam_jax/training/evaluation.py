"""The whole evaluation set, every example once."""

from collections.abc import Callable
from typing import Any

import jax
from ml_collections import ConfigDict

from simam_jax import checkpoints, data
from simam_jax.progress import Progress
from simam_jax.training import metrics, prefetch, setup
from simam_jax.training.state import Tree
from simam_jax.training.step import make_eval_step, whole_on


def evaluate(
    run: setup.Run, eval_step: Callable[..., Any], variables: Tree, prefix: str, progress: Progress
) -> metrics.Scalars:
    """`loss`, `top1` and `top5` (0..1) over the evaluation set, under `prefix/`."""
    wanted = run.config.eval_batch_size or run.config.batch_size
    size = -(-wanted // run.mesh.size) * run.mesh.size  # divides over the devices; what fills up is masked
    batches = data.eval_batches(run.config.data, global_batch_size=size)
    sums = []
    for batch in prefetch.to_devices(batches, run.mesh, run.config.data.prefetch):
        sums.append(eval_step(variables, batch))
        progress.show(f"evaluating {min(len(sums) * size, run.data.num_eval)}/{run.data.num_eval}")
    return metrics.means(jax.device_get(sums), prefix)


def describe(scores: metrics.Scalars) -> str:
    """The scores as a reader wants them."""
    return "  ".join(
        f"{name} top-1 {100 * scores[f'{name}/top1']:.2f} %, top-5 {100 * scores[f'{name}/top5']:.2f} %, "
        f"loss {scores[f'{name}/loss']:.4f}"
        for name in dict.fromkeys(key.partition("/")[0] for key in scores)
    )


def evaluate_checkpoint(config: ConfigDict, workdir: str) -> None:
    """Prints the scores of a checkpoint on the evaluation set of `config`.

    Args:
        config: says the data; its model must be the checkpoint's.
        workdir: a run's folder (its newest checkpoint), or a checkpoint in it.

    Raises:
        UserError: there is no readable checkpoint, or it is of another model.
    """
    run = setup.build(config)
    path = checkpoints.newest(workdir)
    progress = Progress(None)
    progress.say(f"{path} on the {run.data.num_eval} images of {config.data.eval_split!r}")
    items = {"eval": "variables", "eval_ema": "ema"}
    held = checkpoints.read_meta(path)["layouts"]
    eval_step = make_eval_step(run.model, config, run.mesh)
    scores: metrics.Scalars = {}
    for prefix, item in items.items():
        if item in held:
            _, variables = checkpoints.load(path, ema=item == "ema", model_spec=run.model_spec())
            scores |= evaluate(run, eval_step, jax.device_put(variables, whole_on(run.mesh)), prefix, progress)
    progress.say(describe(scores))
