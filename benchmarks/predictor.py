"""`Predictor` from files, reading and preparing included, beside the bare jitted network on arrays that are ready.

python -m benchmarks.predictor [--model resnet50]
"""

import argparse
import statistics
import tempfile
from pathlib import Path

import jax
import numpy as np
from PIL import Image

import simam_jax
from benchmarks import measure
from simam_jax.errors import run_cli
from simam_jax.inference import ClassifierPredictor
from simam_jax.models import MODELS, init_variables


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet50")
    parser.add_argument("--count", type=int, default=256, help="images (default 256)")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    model = simam_jax.create_model(args.model, num_classes=1000)
    variables = init_variables(model, jax.random.key(0))
    predictor = ClassifierPredictor(model, variables, MODELS[args.model].preprocessing, batch_size=args.batch_size)
    with tempfile.TemporaryDirectory() as folder:
        files = _photographs(Path(folder), args.count)
        ready = np.stack([predictor.preprocessing(file) for file in files])
        bare = jax.jit(predictor.logits)

        def run_bare() -> None:
            batches = (ready[i : i + args.batch_size] for i in range(0, args.count, args.batch_size))
            jax.block_until_ready([bare(variables, batch) for batch in batches])

        contestants = {"bare": measure.here(run_bare), "predictor": measure.here(lambda: predictor(files))}
        times = measure.in_turns(contestants, args.rounds)
    row = {
        "model": args.model,
        "bare, images/s": args.count / statistics.median(times["bare"]),
        "Predictor, images/s": args.count / statistics.median(times["predictor"]),
        "Predictor over bare": measure.ratio(times["bare"], times["predictor"]),
    }
    measure.write("predictor", [row], count=args.count, batch_size=args.batch_size, rounds=args.rounds)


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
