"""Records for benchmarks and tests: noise."""

import io

import numpy as np
from ml_collections import ConfigDict

from simam_jax import errors
from simam_jax.data.classification_sources import Records
from simam_jax.data.tensorflow_cpu import tf

CLASSES = 1000
EXAMPLES = {"train": 12_800, "validation": 1_000, "test": 1_000}


def open_noise(config: ConfigDict, split: str) -> Records:
    """Images of noise, already of the network's size, with the classes in turn."""
    if split not in EXAMPLES:
        raise errors.unknown("split of the source 'synthetic'", split, EXAMPLES)
    pixels = np.random.default_rng(0).integers(0, 256, (16, config.image_size, config.image_size, 3), np.uint8)
    # BMP: decoding is little more than a copy, so that a benchmark measures what comes after the data.
    images = tf.constant([_bmp(image) for image in pixels])
    names = tuple(f"class {i}" for i in range(CLASSES))

    def read(index: tf.Tensor) -> dict[str, tf.Tensor]:
        label = tf.cast(tf.math.floormod(index, CLASSES), tf.int32)
        return {"image": images[tf.math.floormod(index, len(pixels))], "label": label}

    return Records(EXAMPLES[split], names, read, lambda index: f"synthetic image {index}")


def _bmp(pixels: np.ndarray) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "BMP")
    return buffer.getvalue()
