"""The operations of detection beside torchvision's, on the sizes of a 800 x 1344 image with 256 channels.

python -m benchmarks.detection_ops [--only NAME ...]

Needs torch and the torchvision of its release. Both sides do the same work: RoIAlign is aligned and samples adaptively,
as the reference implementation does; suppression and assignment have the reference implementation's numbers.
"""

import argparse
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import measure
from simam_jax.errors import run_cli
from simam_jax.ops.nms import nms
from simam_jax.ops.roi_align import roi_align
from simam_jax.rcnn import anchors, masks
from simam_jax.rcnn.assign import assign
from simam_jax.rcnn.levels import level_of
from simam_jax.rcnn.proposals import detect, propose

HEIGHT, WIDTH, IMAGES, CHANNELS, CLASSES = 800, 1344, 2, 256, 80
SIZES = [(200, 336), (100, 168), (50, 84), (25, 42), (13, 21)]

Pair = tuple[measure.Run, measure.Run]  # ours, torchvision's


def _size() -> jax.Array:
    return jnp.array([HEIGHT, WIDTH])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(OPERATIONS), default=list(OPERATIONS))
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    version = measure.torchvision().__version__

    rows = []
    for name in args.only:
        ours, theirs = OPERATIONS[name]()
        times = measure.in_turns({"ours": measure.here(ours), "torchvision": measure.here(theirs)}, args.rounds)
        rows.append(
            {
                "operation": name,
                "ours, ms": 1e3 * statistics.median(times["ours"]),
                "torchvision, ms": 1e3 * statistics.median(times["torchvision"]),
                "torchvision / ours": measure.ratio(times["torchvision"], times["ours"]),
            }
        )
    if args.only == list(OPERATIONS):
        measure.write("detection_ops", rows, rounds=args.rounds, torchvision=version)
    else:
        print(measure.table(rows))


def _run(f: Callable[..., Any], *args: Any) -> measure.Run:
    compiled, args = jax.jit(f), jax.device_put(args)
    return lambda: jax.block_until_ready(compiled(*args))


def drawn_boxes(count: int, rng: np.random.Generator) -> np.ndarray:
    """Boxes of 16 to 600 pixels a side anywhere in the image."""
    side, ratio = np.exp(rng.uniform(np.log(16), np.log(600), count)), np.exp(rng.normal(0, 0.25, count))
    half = np.stack([side * ratio, side / ratio], axis=1) / 2
    centres = rng.uniform(0, 1, (count, 2)) * [WIDTH, HEIGHT]
    return np.concatenate([centres - half, centres + half], axis=1).clip(0, [WIDTH, HEIGHT] * 2).astype(np.float32)


def around(objects: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """Boxes around objects, as a trained network gives them."""
    chosen = objects[rng.integers(0, len(objects), count)]
    sides = np.tile(chosen[:, 2:] - chosen[:, :2], 2)
    moved = chosen + rng.normal(0, 0.12, (count, 4)) * sides
    return moved.clip(0, [WIDTH, HEIGHT] * 2).astype(np.float32)


def _rpn_nms(trained: bool) -> Pair:
    import torch

    torchvision = measure.torchvision()

    rng = np.random.default_rng(0)
    level_sizes = [min(2000, 3 * h * w) for h, w in SIZES]
    count = sum(level_sizes)
    boxes = np.stack(
        [around(drawn_boxes(30, rng), count, rng) if trained else drawn_boxes(count, rng) for _ in range(IMAGES)]
    )
    scores = rng.random((IMAGES, count), np.float32)
    levels = np.broadcast_to(np.repeat(np.arange(5), level_sizes), scores.shape)
    valid = np.ones(scores.shape, bool)
    args = [[torch.from_numpy(x.copy()) for x in image] for image in zip(boxes, scores, levels, strict=True)]

    def theirs() -> None:
        for image in args:
            torchvision.ops.batched_nms(*image, 0.7)[:1000]

    return _run(jax.vmap(partial(nms, threshold=0.7, most=1000)), boxes, scores, levels, valid), theirs


def head_outputs(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rois around 20 objects, scores of which some classes of each exceed the threshold, and deltas."""
    rois = around(drawn_boxes(20, rng), 1000, rng)
    logits = rng.normal(0, 1, (1000, CLASSES + 1)).astype(np.float32)
    likely = rng.integers(0, CLASSES, (1000, 6))
    np.put_along_axis(logits, likely, rng.normal(4, 1, likely.shape).astype(np.float32), axis=1)
    logits[:, CLASSES] = 3
    return rois, logits, rng.normal(0, 0.5, (1000, 4 * CLASSES)).astype(np.float32)


def _final_nms() -> Pair:
    import torch

    RoIHeads = measure.torchvision(".models.detection.roi_heads").RoIHeads

    rois, logits, deltas = head_outputs(np.random.default_rng(1))
    scale = jnp.ones(4)
    heads: Any = RoIHeads(None, None, None, 0.5, 0.5, 512, 0.25, None, 0.05, 0.5, 100)
    background_first = torch.from_numpy(np.roll(logits, 1, axis=1))
    with_background = torch.from_numpy(np.concatenate([np.zeros((1000, 4), np.float32), deltas], axis=1))
    proposals = [torch.from_numpy(rois)]

    def theirs() -> None:
        heads.postprocess_detections(background_first, with_background, proposals, [(HEIGHT, WIDTH)])

    ours = _run(lambda *args: detect(*args, jnp.int32(1000), _size(), scale), logits, deltas, rois)
    return ours, theirs


def _proposals() -> Pair:
    import torch

    RegionProposalNetwork = measure.torchvision(".models.detection.rpn").RegionProposalNetwork

    rng = np.random.default_rng(2)
    counts = [3 * h * w for h, w in SIZES]
    logits = rng.normal(-3, 2, (IMAGES, sum(counts))).astype(np.float32)
    deltas = rng.normal(0, 0.3, (IMAGES, sum(counts), 4)).astype(np.float32)
    grid = anchors.all_anchors(SIZES)
    ends = np.cumsum(counts)[:-1]

    def ours(logits: jax.Array, deltas: jax.Array) -> Any:
        return propose(
            jnp.split(logits, ends), jnp.split(deltas, ends), anchors.all_anchors(SIZES),
            anchors.valid_anchors(SIZES, _size()), _size(), before_nms=2000,
        )  # fmt: skip

    many = {"training": 2000, "testing": 2000}
    rpn: Any = RegionProposalNetwork(None, None, 0.7, 0.3, 256, 0.5, many, {"training": 1000, "testing": 1000}, 0.7)
    all_anchors = torch.from_numpy(np.concatenate([np.asarray(x) for x in grid]))
    objectness, regression = torch.from_numpy(logits), torch.from_numpy(deltas)

    def theirs() -> None:
        boxes = rpn.box_coder.decode(regression.reshape(-1, 4), [all_anchors] * IMAGES)
        rpn.filter_proposals(boxes.view(IMAGES, -1, 4), objectness, [(HEIGHT, WIDTH)] * IMAGES, counts)

    return _run(jax.vmap(ours), logits, deltas), theirs


def _assignment(count: int) -> Pair:
    import torch

    torchvision = measure.torchvision()
    Matcher = measure.torchvision(".models.detection._utils").Matcher

    rng = np.random.default_rng(3)
    grid = jnp.concatenate(anchors.all_anchors(SIZES))
    targets = np.stack([drawn_boxes(count, rng) for _ in range(IMAGES)])
    valid = jnp.ones(grid.shape[0], bool)

    def ours(grid: jax.Array, valid: jax.Array, targets: jax.Array) -> Any:
        return assign(grid, valid, targets, jnp.int32(count), positive=0.7, negative=0.3, low_quality=0.3)

    matcher = Matcher(0.7, 0.3, allow_low_quality_matches=True)
    candidates, boxes = torch.from_numpy(np.array(grid)), torch.from_numpy(targets)

    def theirs() -> None:
        for image in boxes:
            matcher(torchvision.ops.box_iou(image, candidates))

    return _run(jax.vmap(ours, in_axes=(None, None, 0)), grid, valid, targets), theirs


def _roi_align(size: int, gradient: bool) -> Pair:
    import torch

    torchvision = measure.torchvision()

    rng = np.random.default_rng(4)
    maps = [rng.standard_normal((1, *shape, CHANNELS), np.float32) for shape in SIZES[:4]]
    rois = drawn_boxes(1024, rng)
    levels = np.asarray(level_of(jnp.asarray(rois)))
    dy = rng.standard_normal((1, len(rois), size, size, CHANNELS), np.float32)

    def value(maps: list[jax.Array], rois: jax.Array, levels: jax.Array) -> jax.Array:
        return roi_align(maps, _size()[None], rois, levels, jnp.ones(levels.shape, bool), size=size)

    def both(maps: list[jax.Array], rois: jax.Array, levels: jax.Array, dy: jax.Array) -> Any:
        y, vjp = jax.vjp(lambda maps: value(maps, rois, levels), maps)
        return y, vjp(dy)

    leaves = [torch.from_numpy(x).permute(0, 3, 1, 2).contiguous().requires_grad_(gradient) for x in maps]
    rows = [torch.from_numpy(np.flatnonzero(levels == level)) for level in range(4)]
    of_level = [torch.from_numpy(np.pad(rois[levels == level], [(0, 0), (1, 0)])) for level in range(4)]
    cotangent = torch.from_numpy(dy[0]).permute(0, 3, 1, 2).contiguous()

    def pooled() -> Any:
        out = torch.zeros(len(rois), CHANNELS, size, size)
        for level, x in enumerate(leaves):
            part = torchvision.ops.roi_align(x, of_level[level], size, 1 / (4 * 2**level), 0, aligned=True)
            out = out.index_put((rows[level],), part)
        return out

    if gradient:
        ours = _run(both, maps, rois[None], levels[None], dy)
        return ours, lambda: torch.autograd.grad(pooled(), leaves, cotangent)
    return _run(value, maps, rois[None], levels[None]), pooled


def _mask_targets(as_reference: bool) -> Pair:
    import torch

    torchvision = measure.torchvision()
    project_masks_on_boxes = measure.torchvision(".models.detection.roi_heads").project_masks_on_boxes

    rng = np.random.default_rng(5)
    objects = drawn_boxes(7, rng)
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    middle, half = (objects[:, :2] + objects[:, 2:]) / 2, (objects[:, 2:] - objects[:, :2]) / 2
    bitmaps = np.stack(
        [((x - c[0]) / h[0]) ** 2 + ((y - c[1]) / h[1]) ** 2 <= 1 for c, h in zip(middle, half, strict=True)]
    )
    indices = rng.integers(0, len(objects), 128)
    rois = np.concatenate([around(objects[[i]], 1, rng) for i in indices])
    ours = _run(masks.mask_targets, np.packbits(bitmaps, axis=-1), _size(), rois, indices, 128)
    bitmaps, of_rois, chosen = (torch.from_numpy(x) for x in (bitmaps.astype(np.uint8), rois, indices))
    numbered = torch.cat([torch.arange(128.0)[:, None], of_rois], dim=1)

    def copied() -> Any:
        own = bitmaps[chosen].float()[:, None]
        return torchvision.ops.roi_align(own, numbered, masks.SIZE, 1.0, 0, aligned=True) >= 0.5

    return ours, copied if as_reference else lambda: project_masks_on_boxes(bitmaps, of_rois, chosen, masks.SIZE) >= 0.5


def _paste() -> Pair:
    import torch

    paste_masks_in_image = measure.torchvision(".models.detection.roi_heads").paste_masks_in_image

    rng = np.random.default_rng(6)
    probabilities = rng.random((100, masks.SIZE, masks.SIZE), np.float32)
    height, width = 480, 640  # most images of COCO
    boxes = drawn_boxes(100, rng) * np.float32(min(height / HEIGHT, width / WIDTH))
    theirs = torch.from_numpy(probabilities)[:, None], torch.from_numpy(boxes)

    def pasted() -> Any:
        return paste_masks_in_image(*theirs, (height, width)) >= 0.5

    return _run(partial(masks.paste, size=(height, width)), probabilities, boxes), pasted


OPERATIONS: dict[str, Callable[[], Pair]] = {
    "RPN NMS, as trained": partial(_rpn_nms, True),
    "RPN NMS, random": partial(_rpn_nms, False),
    "final NMS": _final_nms,
    "proposals": _proposals,
    "assignment, 7 boxes": partial(_assignment, 7),
    "assignment, 100 boxes": partial(_assignment, 100),
    "RoIAlign 7x7": partial(_roi_align, 7, False),
    "RoIAlign 7x7, gradient": partial(_roi_align, 7, True),
    "RoIAlign 14x14": partial(_roi_align, 14, False),
    "RoIAlign 14x14, gradient": partial(_roi_align, 14, True),
    "mask targets": partial(_mask_targets, False),
    "mask targets, a bitmap copied for every roi": partial(_mask_targets, True),  # the reference implementation's form
    "paste": _paste,
}


if __name__ == "__main__":
    run_cli(main)
