"""What each form of an operation wins over XLA's own, alone and in a network's training step.

python -m benchmarks.lowerings operations [--only NAME ...]
python -m benchmarks.lowerings networks [--models resnet50 mobilenet_v2]
python -m benchmarks.lowerings detectors [--models faster_rcnn_resnet50_fpn]

`operations` times value and gradients of one operation at one shape, our form and XLA's in turns; `networks` compiles a whole
training step with one kind of form replaced by XLA's, and `detectors` that of one image of 800 x 1344. A form stays where it is worth 1.1 times of the operation and 2 % of some
network's step, or 3 % of its memory.
"""

import argparse
import contextlib
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import detectors, measure, networks
from simam_jax.errors import run_cli, unknown
from simam_jax.models import init_variables
from simam_jax.ops import convolution, dispatch, moments, pooling, simam, simam_batch_norm
from simam_jax.training import step as steps

PLATFORM = "other"  # for which every operation has its default form

# The heaviest shapes of the README's networks: kind, (N, H, W, C), kernel size, channels out, stride, groups.
CONVOLUTIONS = [
    ("pointwise", (16, 56, 56, 256), 1, 64, 1, 1),
    ("pointwise", (16, 14, 14, 256), 1, 1024, 1, 1),
    ("3x3", (16, 56, 56, 64), 3, 64, 1, 1),
    ("3x3", (16, 14, 14, 256), 3, 256, 1, 1),
    ("strided", (16, 56, 56, 128), 3, 128, 2, 1),
    ("image", (16, 224, 224, 3), 7, 64, 2, 1),
    ("image 3x3", (16, 224, 224, 3), 3, 32, 2, 1),
    ("depthwise", (16, 112, 112, 96), 3, 96, 2, 96),
    ("depthwise", (16, 28, 28, 192), 3, 192, 1, 192),
    ("grouped", (16, 28, 28, 256), 3, 256, 1, 32),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("operations", "networks", "detectors"))
    parser.add_argument("--only", nargs="+", help="operations: those of these names")
    parser.add_argument("--models", nargs="+")
    parser.add_argument("--variants", nargs="+", choices=[*VARIANTS, *DETECTOR_VARIANTS])
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    if args.what == "operations":
        rows = [_operation(name, *forms, args.rounds) for name, forms in _operations(args.only or [])]
        measure.write("lowerings_operations", rows, batch_size=16, rounds=args.rounds)
    elif args.what == "networks":
        models, variants = args.models or ["resnet50", "mobilenet_v2"], args.variants or VARIANTS
        rows = [row for name in models for row in _network(name, _classifier, variants, args.rounds)]
        measure.write("lowerings_networks", rows, batch_size=16, image_size=224, rounds=args.rounds)
    else:
        models, variants = args.models or ["faster_rcnn_resnet50_fpn"], args.variants or DETECTOR_VARIANTS
        rows = [row for name in models for row in _network(name, _detector, variants, args.rounds)]
        measure.write("lowerings_detectors", rows, images=1, rounds=args.rounds)


# ---- one operation


def _operations(only: list[str]) -> Iterator[tuple[str, tuple[Callable, Callable, tuple]]]:
    rng = np.random.default_rng(0)

    def array(*shape: int) -> jax.Array:
        return jnp.asarray(rng.standard_normal(shape, np.float32))

    table: dict[str, Callable[[], tuple[Callable, Callable, tuple]]] = {}
    for kind, shape, size, outputs, stride, groups in CONVOLUTIONS:
        geometry = convolution.Geometry(stride, size // 2, groups)
        name = f"{kind} {'x'.join(map(str, shape))} to {outputs}"
        kernel = (size, size, shape[3] // groups, outputs)

        def convolutions(kind=kind, shape=shape, kernel=kernel, geometry=geometry):
            xla = partial(convolution.xla, geometry=geometry)
            return convolution.cpu_form(kind, geometry), xla, (array(*shape), array(*kernel))

        table[name] = convolutions
    map_ = (16, 56, 56, 64)
    table["max pooling 16x112x112x64"] = lambda: (pooling.max_pool, pooling.by_windows, (array(16, 112, 112, 64),))
    table["moments 16x56x56x64"] = lambda: (*_on_both(_moments), (array(*map_),))
    table["simam 16x56x56x64"] = lambda: (*_on_both(simam.simam), (array(*map_),))
    table["simam and batch norm 16x56x56x64"] = lambda: (
        *_on_both(_simam_batch_norm),
        (array(1, 16, 56 * 56, 64), array(64), array(64), array(64)),
    )
    for name in only:
        if not any(key.startswith(name) for key in table):
            raise unknown("operation", name, table)
    for name, make in table.items():
        if not only or any(name.startswith(start) for start in only):
            yield name, make()


def _on_both(f: Callable) -> tuple[Callable, Callable]:
    """f in the form of this platform, and in the default one."""

    def default(*inputs: jax.Array) -> Any:
        with dispatch.lowering_for(PLATFORM):
            return f(*inputs)

    return f, default


def _moments(x: jax.Array) -> jax.Array:
    mean, var = moments.moments(x, x[:1, :1, :1], (0, 1, 2))
    return mean + var


def _simam_batch_norm(x: jax.Array, shift: jax.Array, scale: jax.Array, bias: jax.Array) -> jax.Array:
    return simam_batch_norm.simam_batch_norm(x, shift, scale, bias, e_lambda=0.1, epsilon=1e-5, activation=jax.nn.relu)[
        0
    ]


def _operation(name: str, ours: Callable, xla: Callable, inputs: tuple, rounds: int) -> dict[str, Any]:
    """Value and all gradients of both, in turns."""

    def timed(f: Callable) -> measure.Timer:
        gradients = jax.jit(jax.grad(lambda *inputs: jnp.sum(jnp.square(f(*inputs))), tuple(range(len(inputs)))))
        return measure.here(lambda: jax.block_until_ready(gradients(*inputs)))

    times = measure.in_turns({"ours": timed(ours), "xla": timed(xla)}, rounds, settle=True)
    ratios = [x / o for o, x in zip(times["ours"], times["xla"], strict=True)]
    row = {
        "operation": name,
        "ours, ms": 1000 * statistics.median(times["ours"]),
        "XLA, ms": 1000 * statistics.median(times["xla"]),
        "XLA over ours": statistics.median(ratios),
        "lowest and highest": f"{min(ratios):.2f} to {max(ratios):.2f}",
    }
    print(measure.table([row]), flush=True)
    return row


# ---- a training step


@contextlib.contextmanager
def _replaced(table: Any, names: list[str], value: Any) -> Iterator[None]:
    """For the body, attributes or entries `names` of `table` are `value`."""
    get, put = (dict.__getitem__, dict.__setitem__) if isinstance(table, dict) else (getattr, setattr)
    kept = {name: get(table, name) for name in names}
    try:
        for name in names:
            put(table, name, value)
        yield
    finally:
        for name, old in kept.items():
            put(table, name, old)


def _as(kind: str, *forms: convolution.Form) -> Callable[[], Any]:
    """That kind of convolution by other forms: the value's, the kernel's gradient's and the input's."""
    return lambda: _replaced(convolution.CPU_FORMS, [kind], convolution.Forms(*forms))


VARIANTS: dict[str, Callable[[], Any]] = {
    "all our forms": contextlib.nullcontext,
    "no form of ours": lambda: dispatch.lowering_for(PLATFORM),
    "pointwise by XLA": _as("pointwise", convolution.xla),
    "pointwise: no transposed kernel": _as("pointwise", convolution._pointwise),
    "3x3 by XLA": _as("3x3", convolution.xla),
    "3x3: nothing shared by the gradients": _as("3x3", convolution._winograd, convolution._winograd),
    "strided 3x3 by XLA": _as("strided", convolution.xla),
    "strided 3x3: im2col for the kernel's gradient alone": _as(
        "strided", convolution.xla, convolution._im2col, convolution.xla
    ),
    "7x7 of images by XLA": _as("image", convolution.xla),
    "3x3 of images by XLA": _as("image 3x3", convolution.xla),
    "depthwise by XLA": _as("depthwise", convolution.xla),
    "moments in one form": lambda: _replaced(moments, ["_of_unshifted"], moments._of_shifted),
    "SimAM and batch norm apart": lambda: _replaced(simam_batch_norm, ["_recompute_once"], simam_batch_norm._unfused),
    "max pooling by XLA": lambda: _replaced(pooling, ["_by_axes", "_by_slices"], pooling.by_windows),
    "max pooling: the value by XLA": lambda: _replaced(pooling, ["_by_slices"], pooling.by_windows),
}


DETECTOR_VARIANTS: dict[str, Callable[[], Any]] = {
    "all our forms": contextlib.nullcontext,
    "3x3 by XLA": VARIANTS["3x3 by XLA"],
    "3x3: large images whole": lambda: _replaced(convolution, ["BAND"], 2**62),
    "strided 3x3 by XLA": VARIANTS["strided 3x3 by XLA"],
    "XLA's own order": lambda: _replaced(detectors, ["compiler_options"], dict),
}


def _classifier(name: str) -> tuple[Any, Any, Any]:
    """The jitted step of 16 images, its state and its batch."""
    mesh = steps.make_mesh()
    batch = jax.device_put(networks.batch_of(16, 224), steps.batch_sharded(mesh))
    step, model, make_state = networks.train_step_on(mesh, name, "simam", 16)
    return step, jax.device_put(make_state(init_variables(model, jax.random.key(0))), steps.replicated(mesh)), batch


def _detector(name: str) -> tuple[Any, Any, Any]:
    return detectors.training_step(name, 1)


def _network(name: str, make: Callable, variants: Iterable[str], rounds: int) -> list[dict[str, Any]]:
    """A row for each variant: all are compiled first, then they run in turns."""
    runs, rows = {}, []
    for variant in variants:
        jax.clear_caches()  # what was traced in another variant
        with (VARIANTS | DETECTOR_VARIANTS)[variant]():
            step, state, batch = make(name)
            start = time.perf_counter()
            lowered = step.lower(state, batch)
            traced = time.perf_counter()
            compiled = lowered.compile()
        seconds = {"trace, s": traced - start, "compile, s": time.perf_counter() - traced}
        megabytes = compiled.memory_analysis().temp_size_in_bytes / 1e6
        rows.append({"network": name, "variant": variant, **seconds, "memory, MB": megabytes})
        runs[variant] = measure.here(_stepping(compiled, state, batch))
        print(measure.table(rows[-1:]), flush=True)
    times = measure.in_turns(runs, rounds)
    for row in rows:
        own, base = times[row["variant"]], times["all our forms"]
        row["step, s"] = statistics.median(own)
        row["step over all our forms"] = measure.ratio(own, base)
    return rows


def _stepping(compiled: Any, state: Any, batch: Any) -> Callable[[], None]:
    held = [state]

    def run() -> None:
        held[0], values = compiled(held[0], batch)
        jax.block_until_ready(values)

    return run


if __name__ == "__main__":
    run_cli(main)
