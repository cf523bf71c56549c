"""Evaluation: the scores of a task over its whole evaluation set, within a run or of a checkpoint."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from simam_jax import checkpoints
from simam_jax.progress import Progress
from simam_jax.task import Scores, Task, Tree
from simam_jax.training import prefetch
from simam_jax.training.run import Run, build
from simam_jax.training.step import replicated

ITEMS = {"eval": "variables", "eval_ema": "ema"}  # what is scored, and the item of a checkpoint that holds it


RESULTS = "results"  # the folder in a workdir for what the last evaluation gave


def evaluate(run: Run, eval_step: Callable[..., Tree], variables: Tree, progress: Progress, results: Path) -> Scores:
    """The task's scores over the evaluation set; what others can score again is written into the folder `results`."""
    evaluator, done = run.task.evaluator(), 0
    pending: list[tuple[Tree, jax.Array]] = []

    def collect() -> None:
        nonlocal done
        outputs, real = _on_host(pending.pop(0))
        rows = np.flatnonzero(real)
        evaluator.add(jax.tree.map(lambda x: x[rows], outputs))
        done += len(rows)
        progress.show(f"evaluating {done}/{run.task.num_eval}")

    for batch in prefetch.to_devices(run.task.eval_batches(), run.mesh, run.config.data.prefetch):
        pending.append((eval_step(variables, batch), batch["mask"]))
        if len(pending) > 1:  # the devices compute one batch while the host looks at the one before
            collect()
    while pending:
        collect()
    scores = evaluator.scores()
    if jax.process_index() == 0:
        evaluator.write(results)
    return scores


def _on_host(tree: Tree) -> Tree:
    """NumPy arrays of all hosts' rows."""
    if jax.process_count() > 1:
        return multihost_utils.process_allgather(tree, tiled=True)
    return jax.device_get(tree)


def prefixed(scores: Scores, prefix: str) -> Scores:
    """The scores by their names in metrics: `eval/loss` for `loss`."""
    return {f"{prefix}/{name}": value for name, value in scores.items()}


def describe(task: Task, scores: Scores) -> str:
    """Prefixed scores as a reader wants them."""
    parts = []
    for prefix in dict.fromkeys(name.rpartition("/")[0] for name in scores):
        own = {
            name.removeprefix(f"{prefix}/"): value for name, value in scores.items() if name.startswith(f"{prefix}/")
        }
        parts.append(f"{prefix} {task.describe(own)}")
    return "  ".join(parts)


def evaluate_checkpoint(config: ConfigDict, workdir: str, make_task: Callable[[ConfigDict], Task]) -> None:
    """Prints the scores of a checkpoint on the evaluation set of `config`.

    Args:
        config: says the data; its model must be the checkpoint's.
        workdir: a run's folder (its newest checkpoint), or a checkpoint in it.
        make_task: from the config to what was learned.

    Raises:
        UserError: there is no readable checkpoint, or it is of another model.
    """
    run = build(config, make_task, training=False)
    path, items = checkpoints.first_readable(workdir, partial(_scored, run))
    progress = Progress(None)
    progress.say(f"{path} on the {run.task.num_eval} images of {config.data.eval_split!r}")
    eval_step = run.eval_step()
    scores: Scores = {}
    for prefix, item in ITEMS.items():
        if item in items:
            variables = jax.device_put(items[item], replicated(run.mesh))
            results = path.parent.parent / RESULTS / prefix
            scores |= prefixed(evaluate(run, eval_step, variables, progress, results), prefix)
    progress.say(describe(run.task, scores))


def _scored(run: Run, path: Path) -> tuple[Path, dict[str, Tree]]:
    """The items of the checkpoint at `path` that are scored."""
    like, held = run.task.shapes(), checkpoints.read_meta(path)["layouts"]
    items, meta = checkpoints.read(path, {item: like for item in ITEMS.values() if item in held}, run.task.spec)
    run.task.check_meta(meta)
    return path, items
