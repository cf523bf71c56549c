"""Order, sharding, batching, prefetch: everything is keyed by the step, so that resuming is starting a range later."""

import functools
import itertools
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
    rows = _host_rows(global_batch_size, process_index, process_count)
    decode = _train_decode(config)
    permutation = functools.lru_cache(maxsize=2)(functools.partial(_permutation, split.num_examples, seed))

    def examples_of(step: int) -> tuple[np.ndarray, np.ndarray]:
        """(epoch, index) of this host's rows."""
        epochs, places = np.divmod(step * global_batch_size + rows, split.num_examples)
        indices = np.empty_like(places)
        for epoch in np.unique(epochs):
            indices[epochs == epoch] = permutation(int(epoch))[places[epochs == epoch]]
        return epochs, indices

    return _batches(split, decode, seed, examples_of, start_step, None, config.prefetch)


def eval_batches(
    config: ConfigDict, global_batch_size: int, process_index: int, process_count: int
) -> Iterator[Batch]:
    """See `simam_jax.data.eval_batches`."""
    split = open_split(config, config.eval_split)
    rows = _host_rows(global_batch_size, process_index, process_count)
    num_steps = -(-split.num_examples // global_batch_size)

    def decode(encoded: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:  # noqa: ARG001
        return images.eval_image(encoded, image_size=config.image_size, eval_resize=config.eval_resize)

    def examples_of(step: int) -> tuple[np.ndarray, np.ndarray]:
        places = step * global_batch_size + rows
        return np.zeros_like(places), np.minimum(places, split.num_examples - 1)

    for step, batch in enumerate(_batches(split, decode, 0, examples_of, 0, num_steps, config.prefetch)):
        batch["mask"] = (step * global_batch_size + rows < split.num_examples).astype(np.float32)
        yield batch


def _host_rows(global_batch_size: int, process_index: int, process_count: int) -> np.ndarray:
    if global_batch_size % process_count:
        raise UserError(f"A batch of {global_batch_size} cannot be divided among {process_count} hosts.")
    share = global_batch_size // process_count
    return process_index * share + np.arange(share, dtype=np.int64)


def _permutation(num_examples: int, seed: int, epoch: int) -> np.ndarray:
    """The order of an epoch. NumPy promises that a bit generator's raw stream never changes, so nor does the order."""
    noise = np.random.Philox(key=np.array([seed, epoch], np.uint64)).random_raw(num_examples)
    return np.argsort(noise, kind="stable")


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
    examples_of: Callable[[int], tuple[np.ndarray, np.ndarray]],
    start_step: int,
    num_steps: int | None,
    prefetch: int,
) -> Iterator[Batch]:
    """The batches of consecutive steps; reading and decoding run in tf.data's threads, in order."""

    def read(index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        encoded, label = split.read(int(index))
        return np.array(encoded, object), np.array(label, np.int32)

    def load(epoch: tf.Tensor, index: tf.Tensor) -> dict[str, tf.Tensor]:
        encoded, label = tf.numpy_function(read, [index], (tf.string, tf.int32), stateful=False)
        encoded, label = tf.ensure_shape(encoded, ()), tf.ensure_shape(label, ())
        return {"image": decode(encoded, tf.stack((tf.constant(seed, tf.int64), epoch * 2**32 + index))), "label": label}

    def examples(step: tf.Tensor) -> tf.data.Dataset:
        keys = tf.numpy_function(lambda step: examples_of(int(step)), [step], (tf.int64, tf.int64), stateful=False)
        return tf.data.Dataset.from_tensor_slices(tuple(tf.ensure_shape(key, (share,)) for key in keys))

    share = len(examples_of(0)[0])
    stop = np.iinfo(np.int64).max if num_steps is None else num_steps
    dataset = (
        tf.data.Dataset.range(start_step, stop)
        .flat_map(examples)
        .map(load, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True)
        .batch(share, drop_remainder=True)
        .prefetch(prefetch)
    )
    yield from dataset.as_numpy_iterator()
