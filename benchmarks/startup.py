"""From the command to the first update's line, with an empty and with a filled compilation cache.

python -m benchmarks.startup [--configs configs/resnet50_simam.py configs/resnet101_simam.py]
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks import measure
from simam_jax.errors import UserError, run_cli


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--configs", nargs="+", default=["configs/resnet50_simam.py", "configs/resnet101_simam.py"])
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    rows = [_row(config, args) for config in args.configs]
    measure.write("startup", rows, batch_size=args.batch_size, rounds=args.rounds)


def _row(config: str, args: argparse.Namespace) -> dict[str, Any]:
    times: measure.Times = {"cold": [], "warm": []}
    for _ in range(args.rounds):
        with tempfile.TemporaryDirectory() as folder:
            for kind in times:
                times[kind].append(_seconds_to_first_step(config, args.batch_size, Path(folder), kind))
    cold, warm = (statistics.median(times[kind]) for kind in ("cold", "warm"))
    return {
        "config": config,
        "cold, s": cold,
        "warm, s": warm,
        "cold over warm": measure.ratio(times["cold"], times["warm"]),
    }


def _seconds_to_first_step(config: str, batch_size: int, folder: Path, kind: str) -> float:
    settings = {
        "data.source": "synthetic",
        "batch_size": batch_size,
        "model.bn_group_size": 0,
        "num_steps": 2,
        "log_every_steps": 1,
        "eval_every_epochs": 0.0,
        "compilation_cache_dir": folder / "cache",
    }
    command = [sys.executable, "train.py", "--config", config, "--workdir", str(folder / kind)]
    command += [f"--config.{name}={value}" for name, value in settings.items()]
    start = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        output = []
        for line in process.stdout or ():
            output.append(line)
            if line.startswith("step 1/"):
                seconds = time.perf_counter() - start
                process.kill()
                return seconds
    raise UserError(f"The run made no update:\n{''.join(output)}")


if __name__ == "__main__":
    run_cli(main)
