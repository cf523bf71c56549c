"""Stronger augmentation of one image: RandAugment and random erasing, of uint8 (H, W, 3), static shape.

Random numbers come in as `uniform`, float32 in [0, 1).
"""

import math
from collections.abc import Callable

from simam_jax.data.tensorflow_cpu import tf

MAX_MAGNITUDE = 30.0
ERASING_TRIES = 10
ERASING_UNIFORMS = 1 + 4 * ERASING_TRIES  # how many random numbers `random_erasing` takes


def random_erasing(image: tf.Tensor, uniform: tf.Tensor, *, probability: float, fill: tuple[float, ...]) -> tf.Tensor:
    """Covers a random rectangle (Zhong et al. 2020), as torchvision's RandomErasing does with its defaults.

    The area is uniform in [0.02, 0.33] of the image's, the ratio log-uniform in [0.3, 3.3]; of ten tries the first that
    fits is taken.

    Args:
        uniform: (ERASING_UNIFORMS,).
        fill: the colour, per channel in 0..1; the data set's mean is 0 once normalised.
    """
    height, width = _size(image)
    area, ratio, top, left = tf.unstack(tf.reshape(uniform[1:], (4, ERASING_TRIES)))
    area = height * width * (0.02 + (0.33 - 0.02) * area)
    ratio = tf.exp(math.log(0.3) + (math.log(3.3) - math.log(0.3)) * ratio)
    heights, widths = tf.round(tf.sqrt(area * ratio)), tf.round(tf.sqrt(area / ratio))
    fits = (heights < height) & (widths < width)
    first = tf.argmax(fits)
    top = tf.floor(top[first] * (height - heights[first] + 1))
    left = tf.floor(left[first] * (width - widths[first] + 1))
    rows, columns = tf.range(height, dtype=tf.float32)[:, None], tf.range(width, dtype=tf.float32)
    inside = (rows >= top) & (rows < top + heights[first]) & (columns >= left) & (columns < left + widths[first])
    erased = inside & tf.reduce_any(fits) & (uniform[0] < probability)
    colour = tf.cast(tf.round(255 * tf.constant(fill, tf.float32)), tf.uint8)
    return tf.where(erased[..., tf.newaxis], colour, image)


def rand_augment(image: tf.Tensor, uniform: tf.Tensor, *, layers: int, magnitude: float) -> tf.Tensor:
    """Applies `layers` operations drawn from fourteen (Cubuk et al. 2020), with torchvision's strengths.

    Args:
        uniform: (2 * layers,).
        magnitude: 0..30, how strong every operation is.
    """
    level = magnitude / MAX_MAGNITUDE
    for layer in range(layers):
        draw, sign = uniform[2 * layer], uniform[2 * layer + 1]
        signed = tf.where(sign < 0.5, level, -level)
        choice = tf.minimum(tf.cast(draw * len(OPERATIONS), tf.int32), len(OPERATIONS) - 1)
        branches = [
            lambda image=image, signed=signed, operation=operation: operation(image, signed)
            for operation in OPERATIONS.values()
        ]
        image = tf.ensure_shape(tf.switch_case(choice, branches), image.shape)
    return image


def _size(image: tf.Tensor) -> tuple[int, int]:
    height, width, _ = image.shape
    assert height is not None
    assert width is not None
    return height, width


def _affine(image: tf.Tensor, matrix: tf.Tensor) -> tf.Tensor:
    """Moves pixels: the output at (x, y), from the image's centre, shows the input at matrix (2, 3) times (x, y, 1)."""
    height, width = _size(image)
    centre = tf.constant([(width - 1) / 2, (height - 1) / 2])
    linear, shift = matrix[:, :2], matrix[:, 2]
    shift = shift + centre - tf.linalg.matvec(linear, centre)
    transform = tf.concat((tf.reshape(tf.concat((linear, shift[:, None]), 1), (6,)), (0.0, 0.0)), 0)
    moved = tf.raw_ops.ImageProjectiveTransformV3(
        images=image[tf.newaxis],
        transforms=transform[tf.newaxis],
        output_shape=(height, width),
        fill_value=0.0,
        interpolation="NEAREST",
        fill_mode="CONSTANT",
    )
    return moved[0]


def _rotate(image: tf.Tensor, level: tf.Tensor) -> tf.Tensor:
    angle = level * math.radians(30)
    cos, sin = tf.cos(angle), tf.sin(angle)
    return _affine(image, tf.reshape(tf.stack((cos, sin, 0.0, -sin, cos, 0.0)), (2, 3)))


def _shear_x(image: tf.Tensor, level: tf.Tensor) -> tf.Tensor:
    return _affine(image, tf.reshape(tf.stack((1.0, 0.3 * level, 0.0, 0.0, 1.0, 0.0)), (2, 3)))


def _shear_y(image: tf.Tensor, level: tf.Tensor) -> tf.Tensor:
    return _affine(image, tf.reshape(tf.stack((1.0, 0.0, 0.0, 0.3 * level, 1.0, 0.0)), (2, 3)))


def _translate_x(image: tf.Tensor, level: tf.Tensor) -> tf.Tensor:
    shift = tf.round(150 / 331 * _size(image)[1] * level)
    return _affine(image, tf.reshape(tf.stack((1.0, 0.0, shift, 0.0, 1.0, 0.0)), (2, 3)))


def _translate_y(image: tf.Tensor, level: tf.Tensor) -> tf.Tensor:
    shift = tf.round(150 / 331 * _size(image)[0] * level)
    return _affine(image, tf.reshape(tf.stack((1.0, 0.0, 0.0, 0.0, 1.0, shift)), (2, 3)))


def _blend(base: tf.Tensor, image: tf.Tensor, level: tf.Tensor) -> tf.Tensor:
    """From `base` (at -1) over the image (at 0) and beyond (at 1)."""
    base = tf.cast(base, tf.float32)
    return tf.saturate_cast(base + (1 + 0.9 * level) * (tf.cast(image, tf.float32) - base), tf.uint8)


def _brightness(image: tf.Tensor, level: tf.Tensor) -> tf.Tensor:
    return _blend(tf.zeros_like(image), image, level)


def _colour(image: tf.Tensor, level: tf.Tensor) -> tf.Tensor:
    return _blend(_grey(image), image, level)


def _contrast(image: tf.Tensor, level: tf.Tensor) -> tf.Tensor:
    return _blend(tf.reduce_mean(_grey(image)), image, level)


def _sharpness(image: tf.Tensor, level: tf.Tensor) -> tf.Tensor:
    kernel = tf.constant([[1.0, 1.0, 1.0], [1.0, 5.0, 1.0], [1.0, 1.0, 1.0]]) / 13
    kernel = tf.tile(kernel[:, :, None, None], (1, 1, 3, 1))
    pixels = tf.cast(image, tf.float32)
    smooth = tf.nn.depthwise_conv2d(pixels[tf.newaxis], kernel, (1, 1, 1, 1), "VALID")[0]
    inner = tf.pad(tf.ones_like(smooth), ((1, 1), (1, 1), (0, 0))) > 0  # the border stays as it is
    return _blend(tf.where(inner, tf.pad(smooth, ((1, 1), (1, 1), (0, 0))), pixels), image, level)


def _posterize(image: tf.Tensor, level: tf.Tensor) -> tf.Tensor:
    dropped_bits = tf.cast(tf.round(4 * tf.abs(level)), tf.uint8)
    return tf.bitwise.left_shift(tf.bitwise.right_shift(image, dropped_bits), dropped_bits)


def _solarize(image: tf.Tensor, level: tf.Tensor) -> tf.Tensor:
    return tf.where(tf.cast(image, tf.float32) >= 255 * (1 - tf.abs(level)), 255 - image, image)


def _auto_contrast(image: tf.Tensor, level: tf.Tensor) -> tf.Tensor:  # noqa: ARG001
    pixels = tf.cast(image, tf.float32)
    low, high = tf.reduce_min(pixels, (0, 1)), tf.reduce_max(pixels, (0, 1))
    stretched = (pixels - low) * (255 / tf.maximum(high - low, 1))
    return tf.where(high > low, tf.saturate_cast(stretched, tf.uint8), image)


def _equalize(image: tf.Tensor, level: tf.Tensor) -> tf.Tensor:  # noqa: ARG001
    def channel(pixels: tf.Tensor) -> tf.Tensor:
        values = tf.cast(pixels, tf.int32)
        counts = tf.math.bincount(tf.reshape(values, (-1,)), minlength=256, maxlength=256)
        step = (tf.size(values) - counts[tf.reduce_max(values)]) // 255
        table = (tf.cumsum(counts, exclusive=True) + step // 2) // tf.maximum(step, 1)
        return tf.where(step == 0, pixels, tf.gather(tf.saturate_cast(table, tf.uint8), values))

    return tf.stack([channel(pixels) for pixels in tf.unstack(image, axis=-1)], axis=-1)


def _grey(image: tf.Tensor) -> tf.Tensor:
    """ITU-R 601 luma, float32 (H, W, 1)."""
    return tf.round(tf.reduce_sum(tf.cast(image, tf.float32) * (0.299, 0.587, 0.114), -1, keepdims=True))


Operation = Callable[[tf.Tensor, tf.Tensor], tf.Tensor]  # image, signed level in -1..1 -> image
OPERATIONS: dict[str, Operation] = {
    "identity": lambda image, level: image,  # noqa: ARG005
    "shear_x": _shear_x,
    "shear_y": _shear_y,
    "translate_x": _translate_x,
    "translate_y": _translate_y,
    "rotate": _rotate,
    "brightness": _brightness,
    "colour": _colour,
    "contrast": _contrast,
    "sharpness": _sharpness,
    "posterize": _posterize,
    "solarize": _solarize,
    "auto_contrast": _auto_contrast,
    "equalize": _equalize,
}
