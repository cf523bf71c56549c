"""The memory that a ResNet-50 training step moves on an H100, counted in the program that is compiled for it: no GPU is needed.

    pip install "jax[cuda13]"  # in an environment of its own: it is large
    python -m benchmarks.traffic

A model, not a measurement: the bytes of all operands and results of every kernel, without caches. An operand of which a
kernel only takes a slice (SimAM's one value a channel) counts with the slice in "read", in full in "whole operands".
"Kept at once" is the memory beside parameters and batch that the compiler plans for.
"""

import argparse
import os
import re
from pathlib import Path
from typing import Any

# Read when JAX is imported and first used: there is no GPU to run on, or to try kernels on.
os.environ |= {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_gpu_autotune_level=0"}

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh

from benchmarks import hlo, measure, networks
from simam_jax.errors import UserError, run_cli
from simam_jax.models import variable_shapes
from simam_jax.ops.dispatch import lowering_for
from simam_jax.training import step as steps

TARGET = Path(__file__).parent / "h100.txtpb"
_KERNELS = {"fusion", "custom-call", "copy", "reduce", "transpose", "convert", "reduce-window", "select-and-scatter"}
_LINE = re.compile(
    r"\s*(?:ROOT )?%(?P<name>\S+) = (?P<type>\(.*?\)|\S+) (?P<op>[\w\-]+)\((?P<operands>[^)]*)\)(?P<rest>.*)"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet50")
    parser.add_argument("--batch-size", type=int, default=256)
    args = parser.parse_args()
    rows = []
    for attention in ("none", "simam"):
        program = _compiled(args.model, attention, args.batch_size)
        whole, read = traffic(program.as_text())
        temporary = program.memory_analysis().temp_size_in_bytes / 1e6
        counts = {"whole operands": whole, "read": read, "kept at once": temporary}
        row: dict[str, Any] = {"attention": attention}
        for name, count in counts.items():
            row[f"{name}, MB an image"] = count / args.batch_size
            row[f"{name} over none"] = row[f"{name}, MB an image"] / (rows or [row])[0][f"{name}, MB an image"]
        rows.append(row)
    measure.write("traffic", rows, model=args.model, batch_size=args.batch_size, target="H100", dtype="bfloat16")


def _compiled(name: str, attention: str, batch_size: int):
    """The bfloat16 update, compiled without a device."""
    try:
        devices = topologies.get_topology_desc(
            "one H100", platform="cuda", target_config=TARGET.read_text(), topology="1x1x1"
        ).devices
    except Exception as error:
        raise UserError(f'Compiling for an H100 needs the plugin: pip install "jax[cuda13]" ({error}).') from error
    mesh = Mesh(np.array(devices[:1]), (steps.AXIS,))
    step, model, make_state = networks.train_step_on(mesh, name, attention, batch_size, "bfloat16")
    train_state = jax.eval_shape(make_state, variable_shapes(model))
    batch = networks.batch_of(batch_size, 224)

    def placed(tree, sharding):
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree)

    arguments = placed(train_state, steps.replicated(mesh)), placed(batch, steps.batch_sharded(mesh))
    with lowering_for("gpu"):  # this process is on a CPU
        return step.lower(*arguments).compile()


def traffic(program: str) -> tuple[float, float]:
    """Megabytes moved by an optimised program: with whole operands, and with slices where only they are read."""
    functions = dict(re.findall(r"\n%(\S+) [^\n]*\{\n(.*?)\n\}", program, re.DOTALL))
    entry = program[program.index("\nENTRY") :].partition("\n}")[0]
    types, whole, saved = {}, 0, 0
    for line in entry.splitlines():
        match = _LINE.match(line)
        if not match:
            continue
        types[match["name"]] = match["type"]
        if match["op"] not in _KERNELS:
            continue
        operands = re.findall(r"%([\w.\-]+)", match["operands"])
        whole += hlo.bytes_of(match["type"]) + sum(hlo.bytes_of(types.get(name, "")) for name in operands)
        called = re.search(r"calls=%([\w.\-]+)", match["rest"])
        if match["op"] == "fusion" and called:
            saved += _unread(functions[called[1]])
    return whole / 1e6, (whole - saved) / 1e6


def _unread(function: str) -> int:
    """The bytes of a fusion's parameters that it does not read, as all it does with them is to take a slice."""
    lines = [match for match in map(_LINE.match, function.splitlines()) if match]
    unread = 0
    for parameter in (line for line in lines if line["op"] == "parameter"):
        users = [line for line in lines if f"%{parameter['name']}" in re.findall(r"%[\w.\-]+", line["operands"])]
        if users and all(user["op"] == "slice" for user in users):
            unread += hlo.bytes_of(parameter["type"]) - sum(hlo.bytes_of(user["type"]) for user in users)
    return unread


if __name__ == "__main__":
    run_cli(main)
