"""What devices send one another in an update, counted in the compiled program, and what that costs many of them, on paper.

python -m benchmarks.scaling [--model resnet50] [--step-ms 40]

The update is compiled here for eight virtual devices: what each sends depends neither on their number nor on their kind. A ring
moves 2 (n - 1) / n times these bytes over each device's link, at the pace of the slowest. Latencies are left out, and nothing is
taken as hidden behind the gradients. `--step-ms` is the step on one device: 40 ms are 256 images on an H200, in bfloat16.
"""

import argparse
import os
import re

os.environ |= {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "8"}  # read when JAX is imported

from benchmarks import hlo, measure, networks
from simam_jax.errors import run_cli

COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast")
# How many devices are linked so at most, and the GB/s of each in one direction. H100: NVLink's 900 GB/s are both directions';
# between hosts each has an InfiniBand adapter of 400 Gb/s. TPU v5e: 400 GB/s in both directions.
LINKS = {"H100": ((8, 450.0), (64, 50.0)), "TPU v5e": ((64, 200.0),)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet50")
    parser.add_argument(
        "--step-ms", type=float, default=40.0, help="an update on one device, milliseconds (default 40)"
    )
    args = parser.parse_args()
    step, _, _ = networks.compiled_train_step(args.model, "simam", count=8, size=64)
    found = collectives(step.as_text())
    sent = [{"collective": name, "number": len(sizes), "MB": sum(sizes) / 1e6} for name, sizes in found.items()]
    measure.write("scaling_collectives", sent, model=args.model)
    megabytes = sum(row["MB"] for row in sent)
    rows = [row_of(device, count, megabytes, args.step_ms) for device in LINKS for count in (1, 2, 4, 8, 16, 32, 64)]
    measure.write("scaling", rows, model=args.model, step_ms=args.step_ms)


def collectives(program: str) -> dict[str, list[int]]:
    """The bytes of each collective's result, by its kind, in an optimised program's text."""
    found: dict[str, list[int]] = {}
    for kind, name in re.findall(rf" = (\(.*?\)|\S+) ({'|'.join(COLLECTIVES)})(?:-start)?\(", program):
        found.setdefault(name, []).append(hlo.bytes_of(kind))
    return found


def row_of(device: str, count: int, megabytes: float, step: float) -> dict[str, float | int | str]:
    rate = next(rate for most, rate in LINKS[device] if count <= most)
    reduced = 2 * (count - 1) / count * megabytes / rate  # MB / (GB/s) are ms
    return {
        "devices": f"{count} x {device}",
        "all-reduce, ms": reduced,
        "share of the update": reduced / (step + reduced),
        "speed over one device": count * step / (step + reduced),
    }


if __name__ == "__main__":
    run_cli(main)
