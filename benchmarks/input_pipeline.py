"""How quickly images are made ready for training and evaluation, beside PIL and beside plain tf.data.

    python -m benchmarks.input_pipeline [--images DIR]

All contestants run in turns, several times, on the same files; medians are printed. PIL runs torchvision's transforms in as
many processes as there are cores; "plain tf.data" decodes whole images, then crops and resizes with tf.image. "(decode only)"
reads and decodes the random crops and does nothing else: no way of resizing could be quicker.
Per CPU-second is the number to go by: it hardly depends on what else the machine does.
"""

import argparse
import functools
import io
import math
import multiprocessing
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from configs import base
from simam_jax import data, errors
from simam_jax.errors import UserError

Cost = tuple[float, float]  # seconds, CPU-seconds
SUFFIXES = (".jpeg", ".jpg")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", default="", help="a folder with JPEGs (default: photographs from scikit-learn)")
    parser.add_argument("--rounds", type=int, default=5, help="how often each contestant runs (default 5)")
    parser.add_argument("--count", type=int, default=512, help="images per run, a multiple of 32 (default 512)")
    args = parser.parse_args()
    if args.rounds < 1 or args.count < 32 or args.count % 32:
        raise UserError(f"--rounds {args.rounds} --count {args.count}: at least 1, and a multiple of 32.")

    with tempfile.TemporaryDirectory() as folder:
        files = _image_files(args.images, Path(folder))
        cores = len(os.sched_getaffinity(0))
        work = (files * math.ceil(args.count / len(files)))[: args.count]
        # Started before TensorFlow is, and without it.
        with multiprocessing.get_context("spawn").Pool(cores) as pool:
            contestants = {
                "train": {
                    "PIL": functools.partial(_run_pil, pool, _pil_train, work),
                    "plain tf.data": _plain_stream(work, train=True),
                    "exact": _stream(folder, args.count, resize="exact"),
                    "fast": _stream(folder, args.count, resize="fast"),
                    "(decode only)": _decode_stream(work),
                },
                "eval": {
                    "PIL": functools.partial(_run_pil, pool, _pil_eval, work),
                    "plain tf.data": _plain_stream(work, train=False),
                    "ours": _stream(folder, args.count, eval_like=True),
                },
            }
            print(f"{len(files)} files, {args.count} images a run, {args.rounds} runs each, {cores} cores")
            for name, group in contestants.items():
                _print_table(name, _measure(group, args.rounds), args.count)
        print("\nmean distance from PIL's pixels, of 255: " + ", ".join(_distances(files[:128])))


def _measure(group: dict[str, Callable[[], Cost]], rounds: int) -> dict[str, list[Cost]]:
    for run in group.values():
        run()
    costs: dict[str, list[Cost]] = {name: [] for name in group}
    for _ in range(rounds):
        for name, run in group.items():
            costs[name].append(run())
    return costs


def _print_table(title: str, costs: dict[str, list[Cost]], count: int) -> None:
    def per_second(name: str, kind: int) -> float:
        return count / statistics.median(cost[kind] for cost in costs[name])

    def ratio(name: str, other: str) -> float:
        """Of images per CPU-second, round by round."""
        return statistics.median(b[1] / a[1] for a, b in zip(costs[name], costs[other], strict=True))

    print(f"\n{title:15}{'images/s':>12}{'per CPU-s':>12}{'x PIL':>9}{'x plain':>9}")
    for name in costs:
        print(
            f"{name:15}{per_second(name, 0):12.0f}{per_second(name, 1):12.0f}"
            f"{ratio(name, 'PIL'):9.2f}{ratio(name, 'plain tf.data'):9.2f}"
        )


def _distances(files: list[str]) -> list[str]:
    """How far the pixels are from those that PIL makes of the same parts of the same files."""
    from simam_jax.data import images
    from simam_jax.data.tensorflow_cpu import tf

    crop = functools.partial(images.random_resized_crop, size=224, min_area=0.08)
    distances: dict[str, list[float]] = {"exact": [], "fast": [], "eval": []}
    for i, file in enumerate(files):
        encoded, image = tf.io.read_file(file), Image.open(file).convert("RGB")
        uniform = tf.random.stateless_uniform((images.CROP_UNIFORMS,), (0, i))
        top, left, height, width = (
            int(x) for x in images.random_box(tf.constant(image.height), tf.constant(image.width), uniform, 0.08)
        )
        part = image.crop((left, top, left + width, top + height)).resize((224, 224), Image.Resampling.BILINEAR)
        for name, ours, pil in (
            ("exact", crop(encoded, uniform, antialias=True), part),
            ("fast", crop(encoded, uniform, antialias=False), part),
            ("eval", images.centre_crop(encoded, size=224, resize=256), _pil_eval(image)),
        ):
            distances[name].append(np.abs(np.asarray(ours, np.float64) - np.asarray(pil)).mean())
    return [f"{name} {np.mean(values):.2f}" for name, values in distances.items()]


def _image_files(source: str, folder: Path) -> list[str]:
    """The files to read, and the same as a tree train/all/* in `folder`."""
    tree = folder / "train" / "all"
    tree.mkdir(parents=True)
    if source:
        files = sorted(path for path in Path(source).resolve().rglob("*") if path.suffix.lower() in SUFFIXES)[:5000]
        for i, file in enumerate(files):
            (tree / f"{i:05d}.jpg").symlink_to(file)
    else:
        from sklearn.datasets import load_sample_images

        for i, photo in enumerate(load_sample_images().images * 16):
            image = (
                Image.fromarray(photo).crop((8 * (i // 2), 0, 640, 427)).resize((500, 375), Image.Resampling.LANCZOS)
            )
            image.save(tree / f"{i:05d}.jpg", quality=95, subsampling=0)
    if not any(tree.iterdir()):
        raise UserError(f"No JPEGs ({', '.join(SUFFIXES)}) in {source}.")
    return [str(path) for path in sorted(tree.iterdir())]


def _stream(folder: str, count: int, *, eval_like: bool = False, **fields: str) -> Callable[[], Cost]:
    config = base.get_config().data
    with config.unlocked():
        config.update(source="folder", data_dir=folder, eval_split="train", **fields)
        if eval_like:  # the same pixels as eval_batches, endlessly
            config.update(augmentation="none", flip=False)
    from simam_jax.classification.decode import train_decode

    records, decode = data.open_records(config, "train"), train_decode(config, 0)
    batches = data.train_batches(records, decode, seed=0, start_step=0, batch_size=32, process_index=0, process_count=1)
    return functools.partial(_drain, batches, count // 32)


def _plain_stream(files: list[str], *, train: bool) -> Callable[[], Cost]:
    from simam_jax.data import images
    from simam_jax.data.tensorflow_cpu import tf

    def load(index, path):
        image = tf.io.decode_jpeg(tf.io.read_file(path), channels=3)
        height, width, _ = tf.unstack(tf.shape(image))
        if train:
            uniform = tf.random.stateless_uniform((images.CROP_UNIFORMS,), tf.stack((0, index)))
            top, left, crop_height, crop_width = images.random_box(height, width, uniform, 0.08)
            image = image[top : top + crop_height, left : left + crop_width]
            image = tf.image.resize(image, (224, 224), antialias=True)
            image = tf.image.stateless_random_flip_left_right(image, tf.stack((1, index)))
        else:
            size = 256 * tf.stack((height, width)) // tf.minimum(height, width)
            image = tf.image.resize(image, size, antialias=True)
            image = tf.image.resize_with_crop_or_pad(image, 224, 224)
        return tf.saturate_cast(tf.round(image), tf.uint8)

    return _mapped(files, load)


def _decode_stream(files: list[str]) -> Callable[[], Cost]:
    from simam_jax.data import images
    from simam_jax.data.tensorflow_cpu import tf

    def load(index, path):
        uniform = tf.random.stateless_uniform((images.CROP_UNIFORMS,), tf.stack((0, index)))
        box = functools.partial(images.random_box, uniform=uniform, min_area=0.08)
        pixels, _, _ = images._decode(tf.io.read_file(path), box)
        return tf.shape(pixels)

    return _mapped(files, load)


def _mapped(files: list[str], load: Callable[..., Any]) -> Callable[[], Cost]:
    """Batches of `load(index, path)` by tf.data, endlessly."""
    from simam_jax.data.tensorflow_cpu import tf

    dataset = tf.data.Dataset.from_tensor_slices(files).repeat().enumerate()
    dataset = dataset.map(load, num_parallel_calls=tf.data.AUTOTUNE).batch(32).prefetch(2)
    return functools.partial(_drain, dataset.as_numpy_iterator(), len(files) // 32)


def _drain(batches, count: int) -> Cost:
    """Takes `count` batches. Before and after, all buffers are full: so the cost is that of `count` batches."""
    _settle()
    start, cpu_start = time.perf_counter(), time.process_time()
    for _ in range(count):
        next(batches)
    _settle()
    return time.perf_counter() - start, time.process_time() - cpu_start


def _settle() -> None:
    """Waits until the threads of all streams rest."""
    while True:
        cpu = time.process_time()
        time.sleep(0.05)
        if time.process_time() - cpu < 0.005:
            return


def _run_pil(pool, transform: Callable[[Image.Image], Image.Image], files: list[str]) -> Cost:
    start = time.perf_counter()
    cpu = sum(
        pool.imap_unordered(
            functools.partial(_load_pil, transform), [files[i : i + 32] for i in range(0, len(files), 32)]
        )
    )
    return time.perf_counter() - start, cpu


def _load_pil(transform: Callable[[Image.Image], Image.Image], files: list[str]) -> float:
    """The CPU-seconds that a batch takes."""
    start = time.process_time()
    batch = []
    for file in files:
        with open(file, "rb") as opened:
            image = Image.open(io.BytesIO(opened.read())).convert("RGB")
        batch.append(np.asarray(transform(image)))
    np.stack(batch)
    return time.process_time() - start


def _pil_train(image: Image.Image) -> Image.Image:
    width, height = image.size
    for _ in range(10):
        area = width * height * random.uniform(0.08, 1)
        ratio = math.exp(random.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            break
    else:
        w, h = min(width, round(height * 4 / 3)), min(height, round(width * 4 / 3))
    left, top = random.randint(0, width - w), random.randint(0, height - h)
    image = image.crop((left, top, left + w, top + h)).resize((224, 224), Image.Resampling.BILINEAR)
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if random.random() < 0.5 else image


def _pil_eval(image: Image.Image) -> Image.Image:
    width, height = (256 * length // min(image.size) for length in image.size)
    left, top = round((width - 224) / 2), round((height - 224) / 2)
    image = image.resize((width, height), Image.Resampling.BILINEAR)
    return image.crop((left, top, left + 224, top + 224))


if __name__ == "__main__":
    errors.run_cli(main)
