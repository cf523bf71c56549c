"""Order, sharding, batching, prefetch: everything is keyed by the step, so that resuming is starting a range later."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from absl import logging
from ml_collections import ConfigDict

from simam_jax import errors
from simam_jax.data import Batch, augment, images
from simam_jax.data.sources import Split, open_split
from simam_jax.data.tensorflow_cpu import tf
from simam_jax.errors import UserError

RESIZE = ("exact", "fast")
# What TensorFlow raises for a file that is gone, locked, cut short or no image.
UNREADABLE = (
    tf.errors.InvalidArgumentError,
    tf.errors.DataLossError,
    tf.errors.NotFoundError,
    tf.errors.PermissionDeniedError,
    tf.errors.UnknownError,
)


@dataclass(frozen=True)
class _Stream:
    """The batches of one host."""

    split: Split
    share: int  # rows per batch
    examples: Callable[[int], tf.data.Dataset]  # first step -> the host's rows from there on, each (epoch, index)
    decode: Callable[[tf.Tensor, tf.Tensor], tf.Tensor]  # encoded image, key int64 () -> uint8 (H, W, 3)
    prefetch: int
    max_unreadable: float | None  # fraction of the examples that may be replaced; None: every one must be readable


def train_batches(
    config: ConfigDict, seed: int, start_step: int, global_batch_size: int, process_index: int, process_count: int
) -> Iterator[Batch]:
    """See `simam_jax.data.train_batches`."""
    split = open_split(config, config.train_split)
    share = _host_share(global_batch_size, process_count)

    def examples(step: int) -> tf.data.Dataset:
        first_epoch, first_place = divmod(step * global_batch_size, split.num_examples)

        def of_epoch(epoch: tf.Tensor) -> tf.data.Dataset:
            start = tf.where(epoch == first_epoch, tf.constant(first_place, tf.int64), 0)
            order = _permutation(split.num_examples, seed, epoch)[start:]
            return tf.data.Dataset.from_tensor_slices((tf.fill(tf.shape(order), epoch), order))

        epochs = tf.data.Dataset.range(first_epoch, np.iinfo(np.int64).max)
        return _rows_of_host(epochs.flat_map(of_epoch), share, process_index, process_count)

    decode = _train_image(config, seed)
    return _batches(_Stream(split, share, examples, decode, config.prefetch, config.max_unreadable), start_step)


def eval_batches(config: ConfigDict, global_batch_size: int, process_index: int, process_count: int) -> Iterator[Batch]:
    """See `simam_jax.data.eval_batches`."""
    split = open_split(config, config.eval_split)
    share = _host_share(global_batch_size, process_count)
    num_steps = -(-split.num_examples // global_batch_size)

    def examples(step: int) -> tf.data.Dataset:
        places = tf.data.Dataset.range(step * global_batch_size, num_steps * global_batch_size)
        last = split.num_examples - 1
        padded = places.map(lambda place: (tf.zeros_like(place), tf.minimum(place, last)))
        return _rows_of_host(padded, share, process_index, process_count)

    def decode(encoded: tf.Tensor, key: tf.Tensor) -> tf.Tensor:  # noqa: ARG001
        return _centre_crop(config, encoded)

    def masked() -> Iterator[Batch]:
        rows = process_index * share + np.arange(share)
        for step, batch in enumerate(_batches(_Stream(split, share, examples, decode, config.prefetch, None), 0)):
            yield {**batch, "mask": (step * global_batch_size + rows < split.num_examples).astype(np.float32)}

    return masked()


def _host_share(global_batch_size: int, process_count: int) -> int:
    if global_batch_size < 1 or global_batch_size % process_count:
        raise UserError(f"A batch of {global_batch_size} images cannot be divided among {process_count} hosts.")
    return global_batch_size // process_count


def _rows_of_host(rows: tf.data.Dataset, share: int, process_index: int, process_count: int) -> tf.data.Dataset:
    """Of every global batch the part of this host."""
    return rows.batch(share).shard(process_count, process_index).unbatch()


def _permutation(num_examples: int, seed: int, epoch: tf.Tensor) -> tf.Tensor:
    """The order of an epoch, int64 (num_examples,)."""
    key = tf.stack((tf.constant(seed, tf.int64), -1 - epoch))  # negative: no example's key
    noise = tf.random.stateless_uniform((num_examples,), key, tf.int64.min, tf.int64.max, tf.int64, alg="philox")
    return tf.cast(tf.argsort(noise, stable=True), tf.int64)


def _train_image(config: ConfigDict, seed: int) -> Callable[[tf.Tensor, tf.Tensor], tf.Tensor]:
    """What turns an encoded image and the key of this showing of it into training pixels."""
    if config.augmentation not in CROPS:
        raise errors.unknown("config.data.augmentation", config.augmentation, CROPS)
    if config.resize not in RESIZE:
        raise errors.unknown("config.data.resize", config.resize, RESIZE)
    if not 0 <= config.randaugment_magnitude <= augment.MAX_MAGNITUDE:
        raise UserError(
            f"config.data.randaugment_magnitude={config.randaugment_magnitude} is outside 0..{augment.MAX_MAGNITUDE:g}."
        )
    crop, crop_draws = CROPS[config.augmentation]
    draws = (crop_draws, 1, 2 * config.randaugment_layers, augment.ERASING_UNIFORMS if config.random_erasing else 0)

    def decode(encoded: tf.Tensor, key: tf.Tensor) -> tf.Tensor:
        keys = tf.stack((tf.constant(seed, tf.int64), key))
        uniform = tf.random.stateless_uniform((sum(draws),), keys, alg="philox")
        for_crop, for_flip, for_randaugment, for_erasing = tf.split(uniform, draws)
        image = crop(config, encoded, for_crop)
        if config.flip:
            mirrored = tf.cond(for_flip[0] < 0.5, lambda: tf.reverse(image, (1,)), lambda: image)
            image = tf.ensure_shape(mirrored, image.shape)
        if config.randaugment_layers:
            image = augment.rand_augment(
                image, for_randaugment, layers=config.randaugment_layers, magnitude=config.randaugment_magnitude
            )
        if config.random_erasing:
            image = augment.random_erasing(image, for_erasing, probability=config.random_erasing, fill=config.mean)
        return image

    return decode


def _centre_crop(config: ConfigDict, encoded: tf.Tensor) -> tf.Tensor:
    if 0 < config.eval_resize < config.image_size:
        raise UserError(
            f"config.data.eval_resize={config.eval_resize} is smaller than config.data.image_size={config.image_size}: "
            "the centre crop would not fit. Make it as large, or 0."
        )
    return images.centre_crop(encoded, size=config.image_size, resize=config.eval_resize)


def _random_resized_crop(config: ConfigDict, encoded: tf.Tensor, uniform: tf.Tensor) -> tf.Tensor:
    return images.random_resized_crop(
        encoded, uniform, size=config.image_size, min_area=config.min_area, antialias=config.resize == "exact"
    )


def _pad_crop(config: ConfigDict, encoded: tf.Tensor, uniform: tf.Tensor) -> tf.Tensor:
    return images.pad_and_crop(_centre_crop(config, encoded), uniform, padding=config.crop_padding)


def _no_crop(config: ConfigDict, encoded: tf.Tensor, uniform: tf.Tensor) -> tf.Tensor:  # noqa: ARG001
    return _centre_crop(config, encoded)


# How training images are cut, and how many random numbers that takes.
CROPS: dict[str, tuple[Callable[[ConfigDict, tf.Tensor, tf.Tensor], tf.Tensor], int]] = {
    "random_resized_crop": (_random_resized_crop, images.CROP_UNIFORMS),
    "pad_crop": (_pad_crop, 2),
    "none": (_no_crop, 0),
}


def _batches(stream: _Stream, step: int) -> Iterator[Batch]:
    """The batches from `step` on; reading and decoding run in tf.data's threads, results come in order."""

    # Traced once, however often an unreadable file makes the stream start anew.
    @tf.function(autograph=False, input_signature=[tf.TensorSpec((), tf.int64)] * 2)
    def load(epoch: tf.Tensor, index: tf.Tensor) -> dict[str, tf.Tensor]:
        encoded, label = stream.split.read(index)
        return {"image": stream.decode(encoded, epoch * 2**32 + index), "label": label}

    def batches_from(step: int) -> Iterator[Any]:
        loaded = stream.examples(step).map(load, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True)
        return loaded.batch(stream.share, drop_remainder=True).prefetch(stream.prefetch).as_numpy_iterator()

    unreadable: set[int] = set()

    def load_readable(epoch: int, index: int) -> dict[str, np.ndarray]:
        """The image, or the next that can be read: so the stream stays a function of the files and the key."""
        try:
            row = load(tf.constant(epoch, tf.int64), tf.constant(index, tf.int64))
        except UNREADABLE as error:
            if index not in unreadable:
                unreadable.add(index)
                _report(stream, index, len(unreadable), error.message.splitlines()[0])
            return load_readable(epoch, (index + 1) % stream.split.num_examples)
        return {name: x.numpy() for name, x in row.items()}

    def mended(step: int) -> Batch:
        """A batch with unreadable images, one by one."""
        rows = [load_readable(*key) for key in stream.examples(step).take(stream.share).as_numpy_iterator()]
        return {name: np.stack([row[name] for row in rows]) for name in rows[0]}

    batches = batches_from(step)
    while True:
        try:
            batch = next(batches)
        except StopIteration:
            return
        except UNREADABLE:
            batch = mended(step)
            batches = batches_from(step + 1)
        yield batch
        step += 1


def _report(stream: _Stream, index: int, count: int, reason: str) -> None:
    """Warns of the `count`-th unreadable image, or raises where that is too many."""
    message = f"Cannot read {stream.split.name(index)}: {reason}"
    if stream.max_unreadable is None:
        raise UserError(f"{message}\nEvaluation leaves no image out: repair or remove it.")
    if count > stream.max_unreadable * stream.split.num_examples or count == stream.split.num_examples:
        raise UserError(
            f"{message}\nUnreadable so far: {count} of {stream.split.num_examples} training images, more than "
            f"config.data.max_unreadable={stream.max_unreadable} allows. Repair the data, or raise the limit."
        )
    logging.warning("%s Another image takes its place (unreadable so far: %d).", message, count)
