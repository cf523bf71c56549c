"""The memory that a compiled training step needs beside its state, with and without SimAM.

python -m benchmarks.memory [--model resnet50]
"""

import argparse

from benchmarks import measure, networks
from simam_jax.errors import run_cli


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet50")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--image-size", type=int, default=224)
    args = parser.parse_args()
    rows = []
    for attention in ("none", "simam", "se"):
        step, _, _ = networks.compiled_train_step(args.model, attention, args.batch_size, args.image_size)
        megabytes = step.memory_analysis().temp_size_in_bytes / 1e6
        rows.append(
            {"attention": attention, "MB": megabytes, "over none": megabytes / (rows[0]["MB"] if rows else megabytes)}
        )
    measure.write("memory", rows, model=args.model, batch_size=args.batch_size, image_size=args.image_size)


if __name__ == "__main__":
    run_cli(main)
