"""What one accelerator makes of it: SimAM beside copying memory, ResNet-50 and detectors beside PyTorch, on the same card.

python -m benchmarks.accelerator [--only simam resnet50 detectors]

Computation is in bfloat16 on both sides (PyTorch's by autocast, channels last; its networks compiled where torch.compile can).
Networks have a process each, SimAM's forms one for each library; they run in turns. A run is several calls and one wait for the card.
"""

import argparse
import contextlib
import functools
import multiprocessing
import os
import statistics
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from typing import Any

from benchmarks import detectors, measure
from benchmarks.simam_op import SHAPES
from simam_jax.errors import run_cli

OP_CALLS, STEP_CALLS = 50, 5  # in a run

Timers = dict[str, measure.Timer]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--small", action="store_true", help="sizes for trying this script")
    args = parser.parse_args()
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # contestants share the card
    for section in args.only:
        rows = []
        with contextlib.ExitStack() as stack:
            for name, calls, timers in SECTIONS[section](args.small, stack):
                rows.append(_row(name, calls, timers, args.rounds))
                print(measure.table(rows[-1:]), flush=True)
        measure.write(f"accelerator_{section}", rows, rounds=args.rounds)


def _row(name: str, calls: int, timers: Timers, rounds: int) -> dict[str, Any]:
    row: dict[str, Any] = {"contest": name}
    times: measure.Times = {}
    for who, timer in timers.items():  # one that fails costs its own column only
        try:
            timer(0)
            times[who] = []
        except Exception as error:
            print(f"{name}: {who}: {error}", flush=True)
    for _ in range(rounds):
        for who in times:
            times[who].append(timers[who](0.2) / calls)
    ours = times.get("ours")
    for who, seconds in times.items():
        row[f"{who}, ms"] = 1e3 * statistics.median(seconds)
        if ours and who != "ours":
            row[f"{who} / ours"] = measure.ratio(seconds, ours)
    return row


# ---- SimAM alone


def _simam(small: bool, stack: contextlib.ExitStack) -> Iterator[tuple[str, int, Timers]]:
    start = multiprocessing.get_context("spawn")
    jax, torch = (stack.enter_context(ProcessPoolExecutor(1, mp_context=start)) for _ in range(2))
    for side, channels in SHAPES:
        shape = (4 if small else 256), side, side, channels
        for gradient in (False, True):
            timers: Timers = {
                "ours": partial(_ask, jax, _our_simam, shape, gradient),
                "copy": partial(_ask, jax, _copy, shape),
                "PyTorch eager": partial(_ask, torch, _torch_simam, shape, gradient, "eager"),
                "PyTorch compiled": partial(_ask, torch, _torch_simam, shape, gradient, "compiled"),
            }
            what = "value and gradient" if gradient else "value"
            yield f"SimAM {'x'.join(map(str, shape))}, {what}", OP_CALLS, timers


def _ask(pool: ProcessPoolExecutor, make: Callable[..., measure.Run], *rest: Any) -> float:
    *args, at_least = rest
    return pool.submit(_timed, make, tuple(args), at_least).result()


def _timed(make: Callable[..., measure.Run], args: tuple[Any, ...], at_least: float) -> float:
    return measure.here(_made(make, args))(at_least)


@functools.cache
def _made(make: Callable[..., measure.Run], args: tuple[Any, ...]) -> measure.Run:
    return make(*args)


def _drawn(shape: tuple[int, ...]):
    import jax
    import jax.numpy as jnp

    return jax.random.normal(jax.random.key(0), shape, jnp.bfloat16)


def _our_simam(shape: tuple[int, ...], gradient: bool) -> measure.Run:
    import jax

    from simam_jax import simam

    def value(x: jax.Array) -> jax.Array:
        return simam(x, 0.1)

    f, x = jax.jit((lambda x: jax.vjp(value, x)[1](x)) if gradient else value), _drawn(shape)
    return measure.burst(lambda: f(x), OP_CALLS)


def _copy(shape: tuple[int, ...]) -> measure.Run:
    """Reads a map and writes one: the least that SimAM's value can move. Its gradient reads two and writes one."""
    import jax

    f, x = jax.jit(lambda x: x + 1), _drawn(shape)
    return measure.burst(lambda: f(x), OP_CALLS)


def _torch_burst(f: Callable[[], Any], calls: int) -> measure.Run:
    import torch

    def run() -> None:
        for _ in range(calls):
            f()
        torch.cuda.synchronize()

    return run


def _torch_simam(shape: tuple[int, ...], gradient: bool, how: str) -> measure.Run:
    import torch

    from benchmarks import torch_networks

    f: Any = torch_networks.SimAM()
    f = torch.compile(f) if how == "compiled" else f
    x = torch.randn(shape, device="cuda", dtype=torch.bfloat16).permute(0, 3, 1, 2)
    leaf = x.detach().requires_grad_()

    def value() -> None:
        with torch.no_grad():
            f(x)

    return _torch_burst((lambda: torch.autograd.grad(f(leaf), leaf, x)) if gradient else value, OP_CALLS)


# ---- ResNet-50's training


def _resnet50(small: bool, stack: contextlib.ExitStack) -> Iterator[tuple[str, int, Timers]]:
    count, side = (8, 64) if small else (256, 224)
    who: dict[str, dict[str, Callable[[], measure.Run]]] = {}
    for attention in ("simam", "none"):
        who[attention] = {
            "ours": partial(_our_resnet50, attention, count, side),
            "PyTorch compiled": partial(_torch_resnet50, attention, count, side),
        }
    for attention, timers in _all_at_once(who, stack).items():
        yield f"ResNet-50 training, {count} images, {attention}", STEP_CALLS, timers


def _all_at_once(
    contests: dict[str, dict[str, Callable[[], measure.Run]]], stack: contextlib.ExitStack
) -> dict[str, Timers]:
    """The timers of several contests, whose processes start together: their compilers work side by side."""
    return {name: stack.enter_context(measure.in_processes(who)) for name, who in contests.items()}


def _our_resnet50(attention: str, count: int, side: int) -> measure.Run:
    import jax

    from benchmarks import networks

    step, state, batch = networks.compiled_train_step("resnet50", attention, count, side, dtype="bfloat16")
    plan = step.memory_analysis()
    print(f"ResNet-50 {attention}: temporaries {plan.temp_size_in_bytes / 1e6:.0f} MB", flush=True)
    held = [state]

    def update() -> Any:
        held[0], values = step(held[0], batch)
        return values

    run = measure.burst(update, STEP_CALLS)
    jax.block_until_ready(held[0])
    return run


def _torch_resnet50(attention: str, count: int, side: int) -> measure.Run:
    import torch

    from benchmarks import networks, torch_networks

    torch.backends.cudnn.benchmark = True
    torch.set_float32_matmul_precision("high")
    model = torch_networks.create("resnet50", attention).cuda()
    batch = networks.batch_of(count, side)
    images = torch.from_numpy(batch["image"]).permute(0, 3, 1, 2).cuda()
    labels = torch.from_numpy(batch["label"]).long().cuda()
    sgd = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=1e-4, fused=True)
    forward = torch.compile(model)

    def update() -> None:
        sgd.zero_grad()
        with torch.autocast("cuda", torch.bfloat16):
            loss = torch.nn.functional.cross_entropy(forward(images.float() / 255), labels)
        loss.backward()
        sgd.step()

    update()
    print(f"PyTorch {attention}: peak {torch.cuda.max_memory_allocated() / 1e6:.0f} MB", flush=True)
    return _torch_burst(update, STEP_CALLS)


# ---- detectors


def _detectors(small: bool, stack: contextlib.ExitStack) -> Iterator[tuple[str, int, Timers]]:
    who: dict[str, dict[str, Callable[[], measure.Run]]] = {}
    counts = {"inference": (1,), "training": (1,)} if small else {"inference": (1, 8), "training": (8, 16)}
    for what, sizes in counts.items():
        for name, (ours, theirs) in detectors.NAMES.items():
            for count in sizes:
                who[f"{name}, {what}, {count} images"] = {
                    "ours": partial(_our_detector, ours, what, count),
                    "torchvision": partial(_their_detector, theirs, what, count),
                }
    for name, timers in _all_at_once(who, stack).items():
        yield name, STEP_CALLS, timers


def _our_detector(name: str, what: str, count: int) -> measure.Run:
    return measure.burst(detectors.OURS[what](name, count, "bfloat16"), STEP_CALLS)


def _their_detector(name: str, what: str, count: int) -> measure.Run:
    import torch

    torch.backends.cudnn.benchmark = True
    run = detectors.theirs(name, what, count, device="cuda")

    def mixed() -> None:
        with torch.autocast("cuda", torch.bfloat16):
            run()

    return _torch_burst(mixed, STEP_CALLS)


SECTIONS: dict[str, Callable[[bool, contextlib.ExitStack], Iterator[tuple[str, int, Timers]]]] = {
    "simam": _simam,
    "resnet50": _resnet50,
    "detectors": _detectors,
}

if __name__ == "__main__":
    run_cli(main)
