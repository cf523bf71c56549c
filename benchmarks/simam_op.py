"""SimAM alone at ResNet-50's four shapes, forward and with its gradient, beside PyTorch and beside copying memory.

python -m benchmarks.simam_op
"""

import argparse
import statistics

import jax
import numpy as np

from benchmarks import measure
from simam_jax import huge_pages, simam
from simam_jax.errors import run_cli

SHAPES = ((56, 64), (28, 128), (14, 256), (7, 512))  # height = width, channels


def main() -> None:
    import torch

    from benchmarks import torch_networks

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()

    rows = []
    eager = torch_networks.SimAM()
    compiled = torch.compile(eager)
    forward = jax.jit(lambda x: simam(x, 0.1))
    both = jax.jit(lambda x, dy: jax.vjp(lambda x: simam(x, 0.1), x)[1](dy))
    for side, channels in SHAPES:
        array = np.random.default_rng(0).standard_normal((args.batch_size, side, side, channels), np.float32)
        x = jax.device_put(array)
        t = torch.from_numpy(array).permute(0, 3, 1, 2)
        leaf = t.detach().requires_grad_()
        target = np.empty_like(array)

        def torch_forward(module, t=t) -> None:
            with torch.no_grad():
                module(t)

        def torch_both(module, leaf=leaf, t=t) -> None:
            torch.autograd.grad(module(leaf), leaf, t)

        times = measure.in_turns(
            {
                "ours": lambda x=x: jax.block_until_ready(forward(x)),
                "eager": lambda: torch_forward(eager),
                "compiled": lambda: torch_forward(compiled),
                "ours both": lambda x=x: jax.block_until_ready(both(x, x)),
                "eager both": lambda: torch_both(eager),
                "compiled both": lambda: torch_both(compiled),
                "copy": lambda array=array, target=target: np.copyto(target, array),
            },
            args.rounds,
            settle=True,
        )
        rows.append(
            {
                "map": f"{args.batch_size} x {side} x {side} x {channels}",
                "forward, ms": 1e3 * statistics.median(times["ours"]),
                "over eager": measure.ratio(times["eager"], times["ours"]),
                "over compiled": measure.ratio(times["compiled"], times["ours"]),
                "in copies": measure.ratio(times["ours"], times["copy"]),
                "with gradient, ms": 1e3 * statistics.median(times["ours both"]),
                "both over eager": measure.ratio(times["eager both"], times["ours both"]),
                "both over compiled": measure.ratio(times["compiled both"], times["ours both"]),
                "both in copies": measure.ratio(times["ours both"], times["copy"]),
            }
        )
    measure.write("simam_op", rows, batch_size=args.batch_size, rounds=args.rounds)


if __name__ == "__main__":
    huge_pages.ask()  # as train.py does; PyTorch has them too
    run_cli(main)
