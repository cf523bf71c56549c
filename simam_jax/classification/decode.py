"""From a record of a labelled image to a row of a batch: how training and evaluation images are cut and augmented."""

from collections.abc import Callable

from ml_collections import ConfigDict

from simam_jax import errors
from simam_jax.data import augment, images
from simam_jax.data.batches import Decode
from simam_jax.data.tensorflow_cpu import tf
from simam_jax.errors import UserError

Crop = Callable[[ConfigDict, tf.Tensor, tf.Tensor], tf.Tensor]  # config.data, encoded image, uniform numbers -> pixels
RESIZE = ("exact", "fast")


def train_decode(config: ConfigDict, seed: int) -> Decode:
    """What turns a record and the key of this showing of it into training pixels and a label.

    Args:
        config: the section config.data.
        seed: of the run.
    """
    if config.augmentation not in CROPS:
        raise errors.unknown("config.data.augmentation", config.augmentation, CROPS)
    if config.resize not in RESIZE:
        raise errors.unknown("config.data.resize", config.resize, RESIZE)
    if not 0 <= config.randaugment_magnitude <= augment.MAX_MAGNITUDE:
        raise UserError(
            f"config.data.randaugment_magnitude={config.randaugment_magnitude} is outside 0..{augment.MAX_MAGNITUDE:g}."
        )
    _check_sizes(config)
    crop, crop_draws = CROPS[config.augmentation]
    draws = (crop_draws, 1, 2 * config.randaugment_layers, augment.ERASING_UNIFORMS if config.random_erasing else 0)

    def decode(record: dict[str, tf.Tensor], key: tf.Tensor) -> dict[str, tf.Tensor]:
        keys = tf.stack((tf.constant(seed, tf.int64), key))
        uniform = tf.random.stateless_uniform((sum(draws),), keys, alg="philox")
        for_crop, for_flip, for_randaugment, for_erasing = tf.split(uniform, draws)
        image = crop(config, record["image"], for_crop)
        if config.flip:
            mirrored = tf.cond(for_flip[0] < 0.5, lambda: tf.reverse(image, (1,)), lambda: image)
            image = tf.ensure_shape(mirrored, image.shape)
        if config.randaugment_layers:
            image = augment.rand_augment(
                image, for_randaugment, layers=config.randaugment_layers, magnitude=config.randaugment_magnitude
            )
        if config.random_erasing:
            image = augment.random_erasing(image, for_erasing, probability=config.random_erasing, fill=config.mean)
        return {"image": image, "label": record["label"]}

    return decode


def eval_decode(config: ConfigDict) -> Decode:
    """What turns a record into evaluation pixels and a label."""
    _check_sizes(config)
    return lambda record, _key: {"image": _centre_crop(config, record["image"]), "label": record["label"]}


def _check_sizes(config: ConfigDict) -> None:
    if config.image_size < 1 or 0 < config.eval_resize < config.image_size or config.eval_resize < 0:
        raise UserError(
            f"config.data.eval_resize={config.eval_resize} is smaller than config.data.image_size={config.image_size}: "
            "the centre crop would not fit. Make it as large, or 0."
        )


def _centre_crop(config: ConfigDict, encoded: tf.Tensor) -> tf.Tensor:
    return images.centre_crop(encoded, size=config.image_size, resize=config.eval_resize)


def _random_resized_crop(config: ConfigDict, encoded: tf.Tensor, uniform: tf.Tensor) -> tf.Tensor:
    return images.random_resized_crop(
        encoded, uniform, size=config.image_size, min_area=config.min_area, antialias=config.resize == "exact"
    )


def _pad_crop(config: ConfigDict, encoded: tf.Tensor, uniform: tf.Tensor) -> tf.Tensor:
    return images.pad_and_crop(_centre_crop(config, encoded), uniform, padding=config.crop_padding)


# How training images are cut, and how many random numbers that takes.
CROPS: dict[str, tuple[Crop, int]] = {
    "random_resized_crop": (_random_resized_crop, images.CROP_UNIFORMS),
    "pad_crop": (_pad_crop, 2),
    "none": (lambda config, encoded, _uniform: _centre_crop(config, encoded), 0),
}
