"""How long each stage of a detector takes here, and its forms of RoIAlign and suppression.

python -m benchmarks.detector_stages [--model mask_rcnn_resnet50_fpn] [--images 1 8] [--dtype bfloat16] [--size 800 1344]

The stages run one after the other, each compiled on its own; weights are drawn, rois and scores are made as a trained network
gives them. A run is several calls and one wait for the device.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import detection_ops, measure
from simam_jax.errors import run_cli
from simam_jax.models import create_model, init_variables
from simam_jax.models.detector import sizes_of
from simam_jax.ops import nms, roi_align
from simam_jax.rcnn.levels import level_of
from simam_jax.rcnn.proposals import detect

CALLS = 5  # in a run
ROI_FORMS = [(64, None), (256, None), (1000, None), (1, 16), (1, 64)]  # chunk, tile
NMS_FORMS = [(2048, 256), (2048, 1024), (4096, 2048), (8192, 4096)]  # segment, block


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="mask_rcnn_resnet50_fpn")
    parser.add_argument("--images", type=int, nargs="+", default=[1])
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--size", type=int, nargs=2, default=[800, 1344])
    parser.add_argument("--only", nargs="+", default=[""], help="the stages whose names begin so")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    rows = []
    for count in args.images:
        all_stages = _stages(args.model, count, args.dtype, *args.size)
        stages = {name: stage for name, stage in all_stages if name.startswith(tuple(args.only))}
        with ThreadPoolExecutor(8) as threads:
            compiled = dict(zip(stages, threads.map(_compiled, stages.values()), strict=True))
        times = measure.in_turns({name: measure.here(run) for name, (run, _) in compiled.items()}, args.rounds)
        for name, seconds in times.items():
            rows.append({"stage": name, "images": count, "ms": 1e3 * statistics.median(seconds) / CALLS})
            rows[-1]["compile, s"] = compiled[name][1]
            print(measure.table(rows[-1:]), flush=True)
    if args.only == [""]:
        measure.write("detector_stages", rows, model=args.model, dtype=args.dtype, rounds=args.rounds)


def _compiled(stage: tuple[Callable[..., Any], tuple[Any, ...]]) -> tuple[measure.Run, float]:
    f, args = stage
    start = time.perf_counter()
    compiled = jax.jit(f).lower(*args).compile()
    seconds = time.perf_counter() - start
    return measure.burst(lambda: compiled(*args), CALLS), seconds


def _stages(
    name: str, count: int, dtype: str, height: int, width: int
) -> Iterator[tuple[str, tuple[Callable[..., Any], tuple[Any, ...]]]]:
    model = create_model(name, dtype=dtype, trace_blocks_once=True)
    variables = jax.device_put(init_variables(model, jax.random.key(0)))
    rng = np.random.default_rng(0)
    images = jnp.asarray(rng.standard_normal((count, height, width, 3), np.float32))
    sizes = sizes_of(images, None, None)

    def of(method: Any, **options: Any) -> Callable[..., Any]:
        return lambda variables, *args: model.apply(variables, *args, method=method, **options)

    yield "everything", (model.apply, (variables, images))
    yield "backbone and pyramid", (of(model.pyramid), (variables, images))
    levels = jax.jit(of(model.pyramid))(variables, images)
    yield "RPN head", (of(model.rpn), (variables, levels))
    outputs = jax.jit(of(model.rpn))(variables, levels)
    yield "proposals", (of(model.proposals, before_nms=1000), (variables, levels, outputs, sizes))
    boxes = np.stack([detection_ops.around(detection_ops.drawn_boxes(30, rng), 1000, rng) for _ in range(count)])
    rois, valid = jnp.asarray(boxes), jnp.ones((count, 1000), bool)
    yield "RoIAlign and box head", (of(model.boxes), (variables, levels, sizes, rois, valid))
    for chunk, tile in ROI_FORMS:
        align = partial(roi_align.roi_align, size=7, form=roi_align.Form(chunk, tile))
        args = levels[:4], sizes.extent, rois, level_of(rois), valid
        yield f"RoIAlign, chunk {chunk}, tile {tile}", (align, args)
    head = [np.stack(x) for x in zip(*(detection_ops.head_outputs(rng) for _ in range(count)), strict=True)]
    rois, logits, deltas = map(jnp.asarray, head)
    rest = jnp.full(count, 1000), sizes.image, jnp.ones((count, 4))
    yield "detections", (jax.vmap(detect), (logits, deltas, rois, *rest))
    candidates = [detection_ops.around(detection_ops.drawn_boxes(30, rng), 4819, rng) for _ in range(count)]
    scores, groups = rng.random((count, 4819), np.float32), np.repeat(np.arange(5), [1000, 1000, 1000, 1000, 819])
    args = (
        jnp.asarray(np.stack(candidates)),
        jnp.asarray(scores),
        jnp.tile(groups, (count, 1)),
        jnp.ones((count, 4819), bool),
    )
    for segment, block in NMS_FORMS:
        suppress = partial(nms.nms, threshold=0.7, most=1000, form=nms.Form(segment, block))
        yield f"RPN NMS, segment {segment}, block {block}", (jax.vmap(suppress), args)
    if model.masks:
        few = rois[:, :100], jnp.ones((count, 100), bool), jnp.zeros((count, 100), jnp.int32)
        yield "masks", (of(model.mask_logits), (variables, levels, sizes, *few))


if __name__ == "__main__":
    run_cli(main)
