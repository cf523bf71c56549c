"""How good a run was over its epochs, read from its `metrics.jsonl`: a classifier's top-1 error, a detector's AP."""

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from simam_jax import errors
from simam_jax.paths import local

_KEPT = {"train": "train/top1", "eval": "eval/top1", "bbox_AP": "eval/bbox_AP", "segm_AP": "eval/segm_AP"}


def read_curves(workdir: str | Path) -> dict[str, np.ndarray]:
    """The top-1 error of a run over its epochs, or the AP of a detector's.

    Returns:
        "train" and "eval", or "bbox_AP" and, with masks, "segm_AP", each (K, 2) of epochs and percent. The training error is
        the mean over each epoch, measured while the network changes. An update that was repeated after an interruption
        counts once.

    Raises:
        UserError: the folder has no metrics, or they hold neither yet.
    """
    path = local(workdir) / "metrics.jsonl"
    try:
        lines = path.read_text().splitlines()
    except OSError as error:
        raise errors.UserError(f"{workdir} is no workdir with metrics: {error}.") from error
    last: dict[str, dict[int, tuple[float, float]]] = {name: {} for name in _KEPT}
    for line in lines:
        try:
            row = json.loads(line)
        except json.JSONDecodeError:  # the end of the process cut this line off
            continue
        for name, metric in _KEPT.items():
            if metric in row:
                share = row[metric] if name.endswith("AP") else 1 - row[metric]
                last[name][row["step"]] = row["epoch"], 100 * share
    if not any(last.values()):
        raise errors.UserError(f"{path} holds no top-1 accuracy and no AP yet: the run has not reported one.")
    in_order = {name: np.array([row for _, row in sorted(rows.items())]).reshape(-1, 2) for name, rows in last.items()}
    if len(in_order["bbox_AP"]):
        return {name: curve for name, curve in in_order.items() if name.endswith("AP") and len(curve)}
    return {"train": _by_epoch(last["train"]), "eval": in_order["eval"]}


def _by_epoch(reports: Mapping[int, tuple[float, float]]) -> np.ndarray:
    """(K, 2) from the reports (epoch, error) by step, each the mean of the updates since the one before."""
    steps = np.array(sorted(reports))
    epochs, percent = np.array([reports[step] for step in steps]).reshape(-1, 2).T
    updates = np.diff(steps, prepend=0)
    began = np.floor(epochs * (steps - 1) / steps)  # an update belongs to the epoch in which it began
    rows = [(epochs[began == k][-1], np.average(percent[began == k], weights=updates[began == k])) for k in set(began)]
    return np.array(sorted(rows)).reshape(-1, 2)
