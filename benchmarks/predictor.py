"""`Predictor` from files, reading and preparing included, beside the bare jitted network on arrays that are ready.

python -m benchmarks.predictor [--model resnet50]
python -m benchmarks.predictor --model mask_rcnn_resnet50_fpn --count 64

Of a detector: all masks of every photograph are pasted into it, which the bare program leaves undone.
"""

import argparse
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from PIL import Image

import simam_jax
from benchmarks import measure
from simam_jax.detection.apply import padded
from simam_jax.errors import run_cli
from simam_jax.inference import ClassifierPredictor, DetectorPredictor
from simam_jax.models import MODELS, init_variables
from simam_jax.preprocessing import DetectionPreprocessing

# The bare program, its arguments batch by batch, and the same by `Predictor`.
Prepared = tuple[Callable[..., Any], list[tuple[Any, ...]], Callable[[], Any]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet50")
    parser.add_argument("--count", type=int, default=256, help="images (default 256)")
    parser.add_argument("--batch-size", type=int, help="default 32, and 2 of a detector")
    parser.add_argument("--size", type=int, default=800, help="of a detector: pixels of the shorter side (default 800)")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    detects = MODELS[args.model].task == "detection"
    size = max(args.batch_size or (2 if detects else 32), 1)
    prepare = _prepare_detector if detects else _prepare_classifier
    with tempfile.TemporaryDirectory() as folder:
        files = _photographs(Path(folder), args.count)
        bare, batches, predict = prepare(args, size, files)

        def run_bare() -> None:
            jax.block_until_ready([bare(*batch) for batch in batches])

        contestants = {"bare": measure.here(run_bare), "predictor": measure.here(predict)}
        times = measure.in_turns(contestants, args.rounds)
    row = {
        "model": args.model,
        "bare, images/s": args.count / statistics.median(times["bare"]),
        "Predictor, images/s": args.count / statistics.median(times["predictor"]),
        "Predictor over bare": measure.ratio(times["bare"], times["predictor"]),
    }
    # The results in the README are the classifier's.
    name = "predictor_detector" if detects else "predictor"
    pixels = {"size": args.size} if detects else {}
    measure.write(name, [row], count=args.count, batch_size=size, rounds=args.rounds, **pixels)


def _prepare_classifier(args: argparse.Namespace, size: int, files: list[Path]) -> Prepared:
    model = simam_jax.create_model(args.model, num_classes=1000)
    variables = init_variables(model, jax.random.key(0))
    predictor = ClassifierPredictor(model, variables, MODELS[args.model].preprocessing, batch_size=size)
    ready = np.stack([predictor.preprocessing(file) for file in files])
    batches = [(variables, ready[i : i + size]) for i in range(0, len(files), size)]
    return jax.jit(predictor.logits), batches, lambda: predictor(files)


def _prepare_detector(args: argparse.Namespace, size: int, files: list[Path]) -> Prepared:
    model = simam_jax.create_model(args.model, num_classes=3)  # so few that even drawn weights find 100 objects
    variables = init_variables(model, jax.random.key(0))
    preprocessing = DetectionPreprocessing(args.size, args.size * 5 // 3)
    predictor = DetectorPredictor(model, variables, preprocessing, batch_size=size)
    ready = [preprocessing(file) for file in files]
    shape = preprocessing.bucket(*ready[0].pixels.shape[:2])
    batches = [(variables, *padded(ready[i : i + size], shape, size)) for i in range(0, len(files), size)]
    return jax.jit(predictor.detections), batches, lambda: [found.masks is None for _, found in predictor.stream(files)]


def _photographs(folder: Path, count: int) -> list[Path]:
    """JPEGs of 500 x 375 pixels, as ImageNet has them."""
    from sklearn.datasets import load_sample_images

    photographs = [Image.fromarray(image).resize((500, 375)) for image in load_sample_images().images]
    files = [folder / f"{i:04d}.jpg" for i in range(count)]
    for i, file in enumerate(files):
        photographs[i % len(photographs)].save(file, quality=92)
    return files


if __name__ == "__main__":
    run_cli(main)
