"""A detector applied to uint8 images that are padded to one shape, as evaluation, prediction and training see them."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from simam_jax.models import Detector
from simam_jax.ops.extent import zero_beyond
from simam_jax.ops.images import normalize
from simam_jax.preprocessing import STRIDE, DetectionPreprocessing, Resized


def detections(
    model: Detector, how: DetectionPreprocessing, variables: Any, pixels: jax.Array, sizes: jax.Array, scale: jax.Array
) -> Any:
    """What `model.apply` returns for padded images.

    Args:
        model, how, variables: the detector.
        pixels: uint8 (N, H, W, 3).
        sizes: (N, 2) int32, height and width of each image without padding.
        scale: (N, 4) float32: see `models.detector.Detector`.
    """
    images = prepared(pixels, sizes, how.mean, how.std, model.dtype)
    return model.apply(variables, images, own_extent(sizes), sizes, scale)


def padded(how: DetectionPreprocessing, image: Resized, dtype: DTypeLike) -> tuple[jax.Array, jax.Array]:
    """One image as `Detector.pyramid` takes it: normalised, padded to a bucket (1, H, W, 3), and its extent (1, 2)."""
    height, width = image.pixels.shape[:2]
    pixels = np.zeros((1, *how.bucket(height, width), 3), np.uint8)
    pixels[0, :height, :width] = image.pixels
    size = jnp.array([[height, width]], jnp.int32)
    return prepared(jnp.asarray(pixels), size, how.mean, how.std, dtype), own_extent(size)


def prepared(
    pixels: jax.Array, sizes: jax.Array, mean: tuple[float, ...], std: tuple[float, ...], dtype: DTypeLike
) -> jax.Array:
    """The images normalised, then zero beyond their sizes."""
    return zero_beyond(normalize(jnp.asarray(pixels), mean, std, jnp.dtype(dtype)), sizes)


def own_extent(sizes: jax.Array) -> jax.Array:
    """(N, 2) int32: the sizes rounded up to `STRIDE`, what each image is padded to for itself alone."""
    return -(-jnp.asarray(sizes) // STRIDE) * STRIDE
