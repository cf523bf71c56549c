"""Whole detectors beside torchvision's on a ResNet-50, at 800 x 1344: ours with SimAM, theirs without.

python -m benchmarks.detectors [--only "Faster R-CNN, inference" ...]

Needs torch and the torchvision of its release. Weights are drawn, as torchvision draws them; batch norm is frozen on both sides, and
so are the stem and the first stage in training.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.traverse_util import flatten_dict, unflatten_dict

from benchmarks import measure
from simam_jax.detection.apply import compiler_options
from simam_jax.errors import run_cli
from simam_jax.models import create_model, init_variables
from simam_jax.models.detector import trainable
from simam_jax.models.detector_losses import Targets, losses, total

HEIGHT, WIDTH, BOXES, CLASSES = 800, 1344, 7, 80
NAMES = {
    "Faster R-CNN": ("faster_rcnn_resnet50_fpn", "fasterrcnn_resnet50_fpn"),
    "Mask R-CNN": ("mask_rcnn_resnet50_fpn", "maskrcnn_resnet50_fpn"),
}
IMAGES = {"inference": 1, "training": 2}
CONTESTS = [f"{name}, {what}" for what in IMAGES for name in NAMES]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=CONTESTS, default=CONTESTS)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    version, rows = measure.torchvision().__version__, []
    for contest in args.only:
        name, what = contest.split(", ")
        our_name, their_name = NAMES[name]
        contestants = {
            "ours": partial(_until_ready, our_name, what),
            "torchvision": partial(theirs, their_name, what, IMAGES[what]),
        }
        with measure.in_processes(contestants) as timers:
            times = measure.in_turns(timers, args.rounds)
        rows.append(
            {
                "detector": contest,
                "images": IMAGES[what],
                "ours, s": statistics.median(times["ours"]),
                "torchvision, s": statistics.median(times["torchvision"]),
                "torchvision / ours": measure.ratio(times["torchvision"], times["ours"]),
            }
        )
        print(measure.table(rows[-1:]), flush=True)
    if args.only == CONTESTS:
        measure.write("detectors", rows, rounds=args.rounds, torchvision=version)


def _batch(count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Images (N, H, W, 3), boxes (N, BOXES, 4), labels (N, BOXES), masks (N, BOXES, H, W)."""
    rng = np.random.default_rng(0)
    images = rng.standard_normal((count, HEIGHT, WIDTH, 3), np.float32)
    corner, size = rng.uniform(0, 500, (count, BOXES, 2)), rng.uniform(30, 300, (count, BOXES, 2))
    boxes = np.concatenate((corner, corner + size), -1).astype(np.float32)
    masks = np.zeros((count, BOXES, HEIGHT, WIDTH), bool)
    for index in np.ndindex(count, BOXES):
        x1, y1, x2, y2 = boxes[index].astype(int)
        masks[index][y1:y2, x1:x2] = True
    return images, boxes, rng.integers(0, CLASSES, (count, BOXES)).astype(np.int32), masks


def _compiled(f: Any, *args: Any) -> Any:
    """The jitted f, compiled for such arguments; says how long that took and what it plans."""
    start = time.perf_counter()
    compiled = f.lower(*args).compile()
    plan: Any = compiled.memory_analysis()
    print(f"compiled in {time.perf_counter() - start:.1f} s, {plan.temp_size_in_bytes / 1e6:.0f} MB", flush=True)
    return compiled


def our_inference(name: str, count: int, dtype: str = "float32") -> Callable[[], jax.Array]:
    """Starts looking for objects in `count` images at each call."""
    model = create_model(name, dtype=dtype, trace_blocks_once=True)
    args = jax.device_put((init_variables(model, jax.random.key(0)), _batch(count)[0]))
    compiled = _compiled(jax.jit(model.apply, compiler_options=compiler_options()), *args)
    return lambda: compiled(*args)


def training_step(name: str, count: int, dtype: str = "float32") -> tuple[Any, Any, Any]:
    """The jitted `step(state, batch) -> (state, loss)`, which the state is donated to, a state, and a batch of `count` images."""
    model = create_model(name, dtype=dtype, trace_blocks_once=True)
    variables = init_variables(model, jax.random.key(0))
    drawn = _batch(count)
    packed = jnp.asarray(np.packbits(drawn[3], axis=-1)) if model.masks else None
    images, boxes, labels = map(jnp.asarray, drawn[:3])
    targets = Targets(boxes, labels, jnp.full(len(images), BOXES), packed)
    optimizer = optax.chain(optax.add_decayed_weights(1e-4), optax.sgd(1e-5, momentum=0.9))

    def step(state: Any, batch: Any) -> tuple[Any, jax.Array]:
        (params, opt_state), (frozen, batch_stats, key, images, targets) = state, batch

        def loss(params: Any) -> jax.Array:
            variables = {"params": unflatten_dict(frozen | params), "batch_stats": batch_stats}
            return total(losses(model, variables, images, targets, jax.random.split(key, len(images)))[0])

        value, gradient = jax.value_and_grad(loss)(params)
        updates, opt_state = optimizer.update(gradient, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), value

    parameters = flatten_dict(variables["params"])
    params: Any = {path: jnp.array(x) for path, x in parameters.items() if trainable(path)}
    frozen = {path: x for path, x in parameters.items() if not trainable(path)}
    # Arguments, not constants: XLA would compute the frozen stem of the images while it compiles.
    batch = jax.device_put((frozen, variables["batch_stats"], jax.random.key(1), images, targets))
    jitted = jax.jit(step, donate_argnums=0, compiler_options=compiler_options())
    return jitted, (params, optimizer.init(params)), batch


def our_training(name: str, count: int, dtype: str = "float32") -> Callable[[], jax.Array]:
    """Starts an update of `count` images at each call; what it gives is the loss."""
    step, state, batch = training_step(name, count, dtype)
    compiled = _compiled(step, state, batch)
    held = [state]
    del state

    def update() -> jax.Array:
        held[0], value = compiled(held[0], batch)
        return value

    return update


OURS: dict[str, Callable[..., Callable[[], jax.Array]]] = {"inference": our_inference, "training": our_training}


def _until_ready(name: str, what: str) -> measure.Run:
    start = OURS[what](name, IMAGES[what])
    return lambda: jax.block_until_ready(start())


def theirs(name: str, what: str, count: int, device: str = "cpu") -> measure.Run:
    """Looks at `count` images, or updates torchvision's detector with them, at each call; on GPUs with channels last."""
    import torch

    detection = measure.torchvision(".models.detection")
    frozen = measure.torchvision(".ops").FrozenBatchNorm2d
    torch.manual_seed(0)
    settings = {"min_size": HEIGHT, "max_size": WIDTH, "norm_layer": frozen}
    model = getattr(detection, name)(weights=None, weights_backbone=None, num_classes=CLASSES + 1, **settings)
    for stage in ("conv1", "layer1"):  # its own argument does nothing without pretrained weights
        getattr(model.backbone.body, stage).requires_grad_(False)
    layout = torch.channels_last if device == "cuda" else torch.contiguous_format
    model = model.to(device, memory_format=layout)
    images, boxes, labels, masks = _batch(count)
    pixels = [torch.from_numpy(x).permute(2, 0, 1).contiguous().to(device) for x in images]
    if what == "inference":
        model.eval()

        def look() -> None:
            with torch.inference_mode():
                model(pixels)

        return look
    targets = [
        {"boxes": torch.from_numpy(b), "labels": torch.from_numpy(n).long() + 1, "masks": torch.from_numpy(m).byte()}
        for b, n, m in zip(boxes, labels, masks, strict=True)
    ]
    targets = [{key: value.to(device) for key, value in target.items()} for target in targets]
    model.train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 1e-5, 0.9, weight_decay=1e-4)

    def update() -> None:
        optimizer.zero_grad()
        torch.stack(list(model(pixels, targets).values())).sum().backward()
        optimizer.step()

    return update


if __name__ == "__main__":
    run_cli(main)
