"""A detector applied to uint8 images that are padded to one shape, as evaluation, prediction and training see them."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike

from simam_jax.models import Detector
from simam_jax.models.detector import own_extent
from simam_jax.ops.extent import zero_beyond
from simam_jax.ops.images import normalize
from simam_jax.preprocessing import SIZE_DIVISOR, DetectionPreprocessing, Resized


def detections(
    model: Detector,
    preprocessing: DetectionPreprocessing,
    variables: Any,
    pixels: jax.Array,
    sizes: jax.Array,
    scale: jax.Array,
) -> Any:
    """What `model.apply` returns for padded images.

    Args:
        model, preprocessing, variables: the detector.
        pixels: uint8 (N, H, W, 3).
        sizes: (N, 2) int32, height and width of each image without padding.
        scale: (N, 4) float32: see `models.detector.Detector`.
    """
    images = prepared(pixels, sizes, preprocessing.mean, preprocessing.std, model.dtype)
    return model.apply(variables, images, own_extent(sizes), sizes, scale)


@functools.cache
def compiler_options() -> dict[str, Any]:
    """XLA's options for a program that applies a whole detector to images, or trains it.

    XLA:CPU orders operations so that several could run at once. It then makes the zeros that gradients are added to, and
    copies of large maps, long before their use. The order that needs the least memory is also the faster one here.
    """
    least_memory = {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"}
    if jax.default_backend() != "cpu":
        return {}
    try:
        jax.jit(lambda: 0, compiler_options=least_memory).lower().compile()
    except jax.errors.JaxRuntimeError:  # this XLA does not have the option
        return {}
    return least_memory


def padded(images: Sequence[Resized], shape: tuple[int, int], count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The pixels, sizes and scale of `count` images padded to `shape`, as `detections` takes them; the last ones are empty."""
    pixels = np.zeros((count, *shape, 3), np.uint8)
    sizes, scale = np.full((count, 2), SIZE_DIVISOR, np.int32), np.ones((count, 4), np.float32)
    for i, (image, original) in enumerate(images):
        sizes[i] = image.shape[:2]
        pixels[i, : image.shape[0], : image.shape[1]] = image
        height, width = np.array(image.shape[:2]) / original
        scale[i] = width, height, width, height
    return pixels, sizes, scale


def prepared(
    pixels: ArrayLike, sizes: ArrayLike, mean: tuple[float, ...], std: tuple[float, ...], dtype: DTypeLike
) -> jax.Array:
    """The images normalised, then zero beyond their sizes."""
    return zero_beyond(normalize(jnp.asarray(pixels), mean, std, jnp.dtype(dtype)), jnp.asarray(sizes))
