"""What a network costs, stage by stage: parameters, multiply-accumulates, FLOPs."""

import math
import re
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import linen as nn

from simam_jax.layers import BatchNorm, Conv, Linear
from simam_jax.models.roi_heads import OwnClass, Upsample


@dataclass(frozen=True)
class Stage:
    """A row: the layers of one stage, for one image.

    Attributes:
        name: stem, layer1, layer2, ..., head.
        output: (H, W, C) or (C,) after its last layer with parameters.
        params: number of parameters.
        macs: multiply-accumulates of its convolutions and linear layers.
        bn_elements: values that go through its batch norms.
    """

    name: str
    output: tuple[int, ...]
    params: int = 0
    macs: int = 0
    bn_elements: int = 0


@dataclass(frozen=True)
class Summary:
    """The stages in order; the totals are their sums."""

    stages: tuple[Stage, ...]

    @property
    def params(self) -> int:
        return sum(stage.params for stage in self.stages)

    @property
    def macs(self) -> int:
        return sum(stage.macs for stage in self.stages)

    @property
    def bn_elements(self) -> int:
        return sum(stage.bn_elements for stage in self.stages)

    @property
    def flops(self) -> int:
        """As the table in the reference implementation's README counts: one per multiply-accumulate, two per value in a batch norm."""
        return self.macs + 2 * self.bn_elements

    def __str__(self) -> str:
        lines = [f"{'stage':<10}{'output':>16}{'parameters':>14}{'multiply-accumulates':>24}"]
        for stage in self.stages:
            output = " x ".join(map(str, stage.output))
            lines.append(f"{stage.name:<10}{output:>16}{stage.params:>14,}{stage.macs:>24,}")
        lines.append(f"{'total':<10}{'':>16}{self.params:>14,}{self.macs:>24,}")
        return "\n".join(lines) + (
            f"\n\n{self.params / 1e6:.2f} M parameters, {self.flops / 1e9:.2f} G FLOPs"
            "\n(one per multiply-accumulate and two per value in a batch norm, as the reference implementation counts)"
        )


def summarize(model: nn.Module, height: int = 224, width: int | None = None) -> Summary:
    """Traces `model` on one (height, width, 3) image, computing nothing. None: as wide as high."""
    stages: dict[str, Stage] = {}

    def count(call, args, kwargs, context):
        output, module = call(*args, **kwargs), context.module
        if context.method_name != "__call__" or not isinstance(module, COUNTED):
            return output
        name = _stage(module.path[0])
        if name == "stem" and any(other != "stem" for other in stages):
            name = "head"
        old = stages.get(name, Stage(name, ()))
        kernel = module.variables["params"].get("kernel")
        stages[name] = Stage(
            name,
            output.shape[1:] if module.path[1:2] != ("attention",) else old.output,
            # a shared layer is called more than once: its parameters count at its first call only
            old.params
            + (0 if module.path in seen else sum(x.size for x in jax.tree.leaves(module.variables["params"]))),
            old.macs + (0 if kernel is None else _macs(module, kernel, output)),
            old.bn_elements + (output.size if isinstance(module, BatchNorm) else 0),
        )
        seen.add(module.path)
        return output

    seen: set[tuple[str, ...]] = set()
    image = jax.ShapeDtypeStruct((1, height, width or height, 3), jnp.float32)
    with nn.intercept_methods(count):
        jax.eval_shape(model.init, jax.random.key(0), image)
    return Summary(tuple(stages.values()))


COUNTED = (Conv, Linear, BatchNorm, Upsample, OwnClass)
PARTS = ("backbone", "neck", "rpn_head", "bbox_head", "mask_head")  # of a detector


def _macs(module: nn.Module, kernel: jax.Array, output: jax.Array) -> int:
    """Multiply-accumulates: how often each weight is used times how many there are."""
    if isinstance(module, Upsample):  # four weights at each place of what goes in
        return kernel.size * math.prod(output.shape[:-1]) // 4
    if isinstance(module, OwnClass):  # one of the classes at each place
        return kernel.shape[-2] * math.prod(output.shape)
    return kernel.size * math.prod(output.shape[:-1])


def _stage(module: str) -> str:
    """The row of a top-level module: all blocks of layer1_0, layer1_1, ... share one, and so does a part of a detector."""
    if module == "fc":
        return "head"
    if module in PARTS:
        return module
    return re.sub(r"^(layer\d)_\d+$", r"\1", module) if module.startswith("layer") else "stem"
