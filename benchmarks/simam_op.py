"""SimAM alone at ResNet-50's four shapes, forward and with its gradient, beside PyTorch and beside copying memory.

python -m benchmarks.simam_op
"""

import argparse
import statistics
from functools import partial

import jax
import numpy as np

from benchmarks import measure
from simam_jax import simam
from simam_jax.errors import run_cli

SHAPES = ((56, 64), (28, 128), (14, 256), (7, 512))  # height = width, channels


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()

    rows = []
    for side, channels in SHAPES:
        shape = args.batch_size, side, side, channels
        contestants = {"copy": partial(_copy, shape)}
        for what, gradient in (("", False), (" both", True)):
            contestants[f"ours{what}"] = partial(_ours, shape, gradient)
            contestants[f"eager{what}"] = partial(_torch, shape, gradient, compiled=False)
            contestants[f"compiled{what}"] = partial(_torch, shape, gradient, compiled=True)
        with measure.in_processes(contestants) as timers:
            times = measure.in_turns(timers, args.rounds, settle=True)
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


def _map(shape: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape, np.float32)


def _copy(shape: tuple[int, ...]) -> measure.Run:
    source = _map(shape)
    target = np.empty_like(source)
    return lambda: np.copyto(target, source)


def _ours(shape: tuple[int, ...], gradient: bool) -> measure.Run:
    def forward(x: jax.Array) -> jax.Array:
        return simam(x, 0.1)

    f = jax.jit((lambda x: jax.vjp(forward, x)[1](x)) if gradient else forward)
    x = jax.device_put(_map(shape))
    return lambda: jax.block_until_ready(f(x))


def _torch(shape: tuple[int, ...], gradient: bool, *, compiled: bool) -> measure.Run:
    import torch

    from benchmarks import torch_networks

    module = torch_networks.SimAM()
    f = torch.compile(module) if compiled else module
    x = torch.from_numpy(_map(shape)).permute(0, 3, 1, 2)  # its memory is channels last
    leaf = x.detach().requires_grad_()

    def forward() -> None:
        with torch.no_grad():
            f(x)

    return (lambda: torch.autograd.grad(f(leaf), leaf, x)) if gradient else forward


if __name__ == "__main__":
    run_cli(main)
