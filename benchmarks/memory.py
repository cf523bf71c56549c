"""The memory of a training step: of a classifier with and without SimAM, of a detector beside torchvision's.

python -m benchmarks.memory [--model resnet50]
python -m benchmarks.memory --model faster_rcnn_resnet50_fpn

Of a classifier, what the compiled step needs beside its state. Of a detector, the most that a process holds while it makes its
third update of one image of 800 x 1344 pixels: code, parameters, optimizer, maps. Linux only.
"""

import argparse
import multiprocessing
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax

from benchmarks import detectors, measure, networks
from simam_jax.errors import run_cli
from simam_jax.models import list_models
from simam_jax.training.program import release_freed

PEERS = dict(detectors.NAMES.values())  # torchvision's names by ours


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet50", choices=[*list_models("classification"), *PEERS])
    parser.add_argument("--batch-size", type=int, default=16, help="of a classifier")
    parser.add_argument("--image-size", type=int, default=224, help="of a classifier")
    args = parser.parse_args()
    if args.model in PEERS:
        _detector(args.model)
    else:
        _classifier(args)


def _classifier(args: argparse.Namespace) -> None:
    rows = []
    for attention in ("none", "simam", "se"):
        step, _, _ = networks.compiled_train_step(args.model, attention, args.batch_size, args.image_size)
        megabytes = step.memory_analysis().temp_size_in_bytes / 1e6
        rows.append(
            {"attention": attention, "MB": megabytes, "over none": megabytes / (rows[0]["MB"] if rows else megabytes)}
        )
    measure.write("memory", rows, model=args.model, batch_size=args.batch_size, image_size=args.image_size)


def _detector(name: str) -> None:
    version = measure.torchvision().__version__
    contestants = {
        "ours": partial(detectors.our_training, name, 1),
        "torchvision": partial(detectors.theirs, PEERS[name], "training", 1),
    }
    peaks = {}
    for contestant, make in contestants.items():
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            peaks[contestant] = pool.apply(_peak, (make,))
    row = {
        "detector": name,
        "ours, MB": peaks["ours"],
        "torchvision, MB": peaks["torchvision"],
        "ours / torchvision": peaks["ours"] / peaks["torchvision"],
    }
    measure.write("memory_detector", [row], images=1, torchvision=version)


def _peak(make: Callable[[], Callable[[], Any]]) -> float:
    """The megabytes that this process holds at most while it runs what `make` gives for the third time."""
    run = make()
    release_freed()  # as the trainer does
    for _ in range(2):
        jax.block_until_ready(run())
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
    jax.block_until_ready(run())
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024 / 1e6


if __name__ == "__main__":
    run_cli(main)
