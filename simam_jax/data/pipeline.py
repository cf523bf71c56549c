"""Order, sharding, batching, prefetch: everything is keyed by the step, so that resuming is starting a range later."""

from collections.abc import Callable, Iterator

import numpy as np
from absl import logging
from ml_collections import ConfigDict

from simam_jax import errors
from simam_jax.data import images
from simam_jax.data.sources import Split, open_split
from simam_jax.data.tensorflow_cpu import tf
from simam_jax.errors import UserError

Batch = dict[str, np.ndarray]
Decode = Callable[[tf.Tensor, tf.Tensor], tf.Tensor]  # encoded bytes, seed (2,) -> uint8 (H, W, 3)


def train_batches(
    config: ConfigDict, seed: int, start_step: int, global_batch_size: int, process_index: int, process_count: int
) -> Iterator[Batch]:
    """See `simam_jax.data.train_batches`."""
    split = open_split(config, config.train_split)
    share = _host_share(global_batch_size, process_count)
    decode = _train_decode(config)

    def positions(step: int) -> tf.data.Dataset:
        first_epoch, first_place = divmod(step * global_batch_size, split.num_examples)

        def epoch_positions(epoch: tf.Tensor) -> tf.data.Dataset:
            start = tf.where(epoch == first_epoch, tf.constant(first_place, tf.int64), 0)
            order = _permutation(split.num_examples, seed, epoch)[start:]
            return tf.data.Dataset.from_tensor_slices((tf.fill(tf.shape(order), epoch), order))

        return tf.data.Dataset.range(first_epoch, np.iinfo(np.int64).max).flat_map(epoch_positions)

    def examples(step: int) -> tf.data.Dataset:
        return _rows_of_host(positions(step), share, process_index, process_count)

    return _batches(split, decode, seed, examples, start_step, share, config.prefetch)


def eval_batches(config: ConfigDict, global_batch_size: int, process_index: int, process_count: int) -> Iterator[Batch]:
    """See `simam_jax.data.eval_batches`."""
    split = open_split(config, config.eval_split)
    share = _host_share(global_batch_size, process_count)
    num_steps = -(-split.num_examples // global_batch_size)

    def decode(encoded: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:  # noqa: ARG001
        return images.eval_image(encoded, image_size=config.image_size, eval_resize=config.eval_resize)

    def examples(step: int) -> tf.data.Dataset:
        positions = tf.data.Dataset.range(step * global_batch_size, num_steps * global_batch_size)
        last = split.num_examples - 1
        positions = positions.map(lambda position: (tf.constant(0, tf.int64), tf.minimum(position, last)))
        return _rows_of_host(positions, share, process_index, process_count)

    for step, batch in enumerate(_batches(split, decode, 0, examples, 0, share, config.prefetch)):
        places = step * global_batch_size + process_index * share + np.arange(share)
        yield {**batch, "mask": (places < split.num_examples).astype(np.float32)}


def _host_share(global_batch_size: int, process_count: int) -> int:
    if global_batch_size % process_count:
        raise UserError(f"A batch of {global_batch_size} images cannot be divided among {process_count} hosts.")
    return global_batch_size // process_count


def _rows_of_host(positions: tf.data.Dataset, share: int, process_index: int, process_count: int) -> tf.data.Dataset:
    """Of each global batch the `share` rows of this host."""
    return positions.batch(share).shard(process_count, process_index).unbatch()


def _permutation(num_examples: int, seed: int, epoch: tf.Tensor) -> tf.Tensor:
    """The order of an epoch, int64 (num_examples,)."""
    key = tf.stack((tf.constant(seed, tf.int64), -1 - epoch))  # negative: no example's key
    noise = tf.random.stateless_uniform((num_examples,), key, None, None, tf.int64, alg="philox")
    return tf.cast(tf.argsort(noise, stable=True), tf.int64)


def _train_decode(config: ConfigDict) -> Decode:
    if config.augmentation not in AUGMENTATIONS:
        raise errors.unknown("config.data.augmentation", config.augmentation, AUGMENTATIONS)
    return AUGMENTATIONS[config.augmentation](config)


def _pad_crop(config: ConfigDict) -> Decode:
    def decode(encoded: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
        return images.pad_crop_image(
            encoded,
            tf.random.stateless_uniform((3,), seed, alg="philox"),
            image_size=config.image_size,
            padding=config.crop_padding,
            flip=config.flip,
        )

    return decode


def _no_crop(config: ConfigDict) -> Decode:
    def decode(encoded: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
        return images.pad_crop_image(
            encoded,
            tf.random.stateless_uniform((3,), seed, alg="philox"),
            image_size=config.image_size,
            padding=0,
            flip=config.flip,
        )

    return decode


AUGMENTATIONS: dict[str, Callable[[ConfigDict], Decode]] = {"pad_crop": _pad_crop, "none": _no_crop}


def _batches(
    split: Split,
    decode: Decode,
    seed: int,
    examples: Callable[[int], tf.data.Dataset],
    start_step: int,
    share: int,
    prefetch: int,
) -> Iterator[Batch]:
    """The batches of consecutive steps; reading and decoding run in tf.data's threads, in order."""

    def load(epoch: tf.Tensor, index: tf.Tensor) -> dict[str, tf.Tensor]:
        encoded, label = split.read(index)
        return {"image": decode(encoded, tf.stack((tf.constant(seed, tf.int64), epoch * 2**32 + index))), "label": label}

    dataset = (
        examples(start_step)
        .map(load, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True)
        .batch(share, drop_remainder=True)
        .prefetch(prefetch)
    )
    yield from dataset.as_numpy_iterator()
