"""One image: from encoded bytes to uint8 pixels (size, size, 3), as torchvision's transforms on PIL images make them.

Random numbers come in as `uniform`, float32 in [0, 1), so that every function here is deterministic. Only the part of a
JPEG that is needed gets decoded. EXIF rotation is ignored and transparency dropped, as in `simam_jax.preprocessing`.
"""

import io
import math
from collections.abc import Callable

import numpy as np
from PIL import Image

from simam_jax.data.tensorflow_cpu import tf
from simam_jax.preprocessing import naming_the_reason, to_rgb

Box = tuple[tf.Tensor, tf.Tensor, tf.Tensor, tf.Tensor]  # top, left, height, width in whole pixels, int32

CROP_TRIES = 10
CROP_UNIFORMS = 4 * CROP_TRIES  # how many random numbers `random_resized_crop` takes


def centre_crop(encoded: tf.Tensor, *, size: int, resize: int) -> tf.Tensor:
    """Resizes the shorter side to `resize` >= size pixels, then cuts out the centre: torchvision's Resize, CenterCrop.

    With resize = 0 the image is resized straight to size x size instead.
    """

    def choose_box(height: tf.Tensor, width: tf.Tensor) -> Box:
        top, bottom, _ = axis(height, height, width)
        left, right, _ = axis(width, height, width)
        return top, left, bottom - top, right - left

    def axis(length: tf.Tensor, height: tf.Tensor, width: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        """The first and last + 1 pixel that the crop depends on along a side, and the (scale, offset) of the crop."""
        if resize:
            resized = resize * length // tf.minimum(height, width)
            start = tf.round(tf.cast(resized - size, tf.float32) / 2)  # Python's round too goes to the even number
        else:
            resized, start = tf.constant(size), tf.constant(0.0)
        scale = tf.cast(resized, tf.float32) / tf.cast(length, tf.float32)
        reach = tf.maximum(1 / scale, 1) + 1  # of the triangle filter, in pixels, and one for the rounding
        first = tf.maximum(tf.cast(start / scale - reach, tf.int32), 0)
        stop = tf.minimum(tf.cast((start + size) / scale + reach, tf.int32) + 1, length)
        return first, stop, tf.stack((scale, tf.cast(first, tf.float32) * scale - start))

    pixels, height, width = _decode(encoded, choose_box)
    (_, _, vertical), (_, _, horizontal) = axis(height, height, width), axis(width, height, width)
    return _resample(pixels, size, tf.stack((vertical[0], horizontal[0])), tf.stack((vertical[1], horizontal[1])))


def random_resized_crop(
    encoded: tf.Tensor, uniform: tf.Tensor, *, size: int, min_area: float, antialias: bool
) -> tf.Tensor:
    """A random part of the image, resized to size x size: torchvision's RandomResizedCrop.

    The area is uniform in [min_area, 1] of the image's, the ratio width / height log-uniform in [3/4, 4/3]. Of ten tries
    the first that fits is taken; if none does, the largest centred crop with a ratio within the bounds.

    Args:
        uniform: (CROP_UNIFORMS,).
        antialias: filter as PIL does when it makes an image smaller. Without, shrinking aliases a little.
    """

    def choose_box(height: tf.Tensor, width: tf.Tensor) -> Box:
        return random_box(height, width, uniform, min_area)

    if antialias:
        pixels, _, _ = _decode(encoded, choose_box)
        return resize(pixels, size)
    pixels, _, _ = _decode(encoded, choose_box, shrink_to=size)
    return _bilinear(pixels, size)


def whole(encoded: tf.Tensor, *, size: int) -> tf.Tensor:
    """The whole image, resized to size x size."""
    pixels, _, _ = _decode(encoded, lambda height, width: (tf.constant(0), tf.constant(0), height, width))
    return resize(pixels, size)


def pad_and_crop(image: tf.Tensor, uniform: tf.Tensor, *, padding: int) -> tf.Tensor:
    """A random crop of the image's own size after `padding` black pixels were added on each side; uniform: (2,)."""
    padded = tf.pad(image, ((padding, padding), (padding, padding), (0, 0)))
    top, left = tf.unstack(tf.cast(uniform * (2 * padding + 1), tf.int32))
    return tf.slice(padded, (top, left, 0), image.shape)


def resize(pixels: tf.Tensor, size: int) -> tf.Tensor:
    """uint8 (H, W, 3) to uint8 (size, size, 3), as PIL's BILINEAR: with a triangle filter along a side that shrinks."""
    shape = tf.cast(tf.shape(pixels)[:2], tf.float32)
    return _resample(pixels, size, size / shape, tf.zeros(2))


def random_box(height: tf.Tensor, width: tf.Tensor, uniform: tf.Tensor, min_area: float) -> Box:
    """The part of an image that `random_resized_crop` cuts out."""
    area, ratio, vertical, horizontal = tf.unstack(tf.reshape(uniform, (4, CROP_TRIES)))
    h, w = tf.cast(height, tf.float32), tf.cast(width, tf.float32)
    area = h * w * (min_area + (1 - min_area) * area)
    ratio = tf.exp(math.log(4 / 3) * (2 * ratio - 1))
    widths, heights = tf.round(tf.sqrt(area * ratio)), tf.round(tf.sqrt(area / ratio))
    fits = (widths >= 1) & (widths <= w) & (heights >= 1) & (heights <= h)

    fallback_height = tf.minimum(h, tf.round(w / (3 / 4)))
    fallback_width = tf.minimum(w, tf.round(h * (4 / 3)))
    any_fits, first = tf.reduce_any(fits), tf.argmax(fits)
    box_height = tf.where(any_fits, heights[first], fallback_height)
    box_width = tf.where(any_fits, widths[first], fallback_width)
    top = tf.where(any_fits, tf.floor(vertical[first] * (h - box_height + 1)), tf.floor((h - box_height) / 2))
    left = tf.where(any_fits, tf.floor(horizontal[first] * (w - box_width + 1)), tf.floor((w - box_width) / 2))
    top, left = tf.minimum(top, h - box_height), tf.minimum(left, w - box_width)  # the product may round up
    return tuple(tf.unstack(tf.cast(tf.stack((top, left, box_height, box_width)), tf.int32)))


def _decode(
    encoded: tf.Tensor, choose_box: Callable[[tf.Tensor, tf.Tensor], Box], shrink_to: int = 0
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """The pixels in `choose_box(height, width)`, uint8 (h, w, 3), and the height and width of the whole image.

    Where the box is 2, 4 or 8 times larger than `shrink_to`, a JPEG is decoded at that fraction of its size: its
    decoder averages (in the cosine domain) better than sparse samples would, and in less time.
    """

    def jpeg() -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        height, width, _ = tf.unstack(tf.io.extract_jpeg_shape(encoded))
        box = choose_box(height, width)

        def at_ratio(ratio: int) -> tf.Tensor:
            top, left, bottom, right = box[0], box[1], box[0] + box[2], box[1] + box[3]
            first, stop = tf.stack((top, left)) // ratio, -(-tf.stack((bottom, right)) // ratio)
            window = tf.concat((first, stop - first), 0)
            return tf.io.decode_and_crop_jpeg(
                # Two decoders agree to the bit only with the accurate cosine transform; PIL's is that.
                encoded, window, channels=3, ratio=ratio, dct_method="INTEGER_ACCURATE"
            )  # fmt: skip

        if not shrink_to:
            return at_ratio(1), height, width
        power = sum(tf.cast(tf.minimum(box[2], box[3]) >= ratio * shrink_to, tf.int32) for ratio in (2, 4, 8))
        pixels = tf.switch_case(power, [lambda ratio=ratio: at_ratio(ratio) for ratio in (1, 2, 4, 8)])
        return pixels, height, width

    def other() -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        is_png = tf.strings.substr(encoded, 0, 4) == b"\x89PNG"
        pixels = tf.cond(is_png, lambda: tf.io.decode_png(encoded, channels=3), lambda: _decode_with_pil(encoded))
        height, width, _ = tf.unstack(tf.shape(pixels))
        box = choose_box(height, width)
        return pixels[box[0] : box[0] + box[2], box[1] : box[1] + box[3]], height, width

    pixels, height, width = tf.cond(tf.io.is_jpeg(encoded), jpeg, other)
    return tf.ensure_shape(pixels, (None, None, 3)), height, width


def _decode_with_pil(encoded: tf.Tensor) -> tf.Tensor:
    """An image of any other kind: TensorFlow's decoders take palettes for grey values and refuse or blacken transparency."""

    def decode(encoded: bytes) -> np.ndarray:
        with naming_the_reason("The image"), Image.open(io.BytesIO(encoded)) as image:
            return np.asarray(to_rgb(image))

    return tf.ensure_shape(tf.numpy_function(decode, [encoded], tf.uint8), (None, None, 3))


def _resample(pixels: tf.Tensor, size: int, scale: tf.Tensor, offset: tf.Tensor) -> tf.Tensor:
    """Output pixel i lies at (i - offset) / scale of the input; the triangle filter is as wide as an output pixel.

    Both sides are filtered as rows, in between and at the end the image lies transposed: adding whole rows is quick,
    while the op's own way along a row, three numbers at a time, takes more than twice as long as all of this.
    """
    height, width = tf.unstack(tf.shape(pixels)[:2])
    rows = _resample_rows(tf.reshape(pixels, (height, 3 * width)), size, scale[0], offset[0])
    columns = _resample_rows(tf.reshape(tf.transpose(rows), (width, 3 * size)), size, scale[1], offset[1])
    return _to_uint8(tf.transpose(tf.reshape(columns, (3 * size, size))), size)


def _resample_rows(image: tf.Tensor, size: int, scale: tf.Tensor, offset: tf.Tensor) -> tf.Tensor:
    """(rows, n) to (size, n), float32."""
    # The op behind tf.image.resize(antialias=True), which would first copy the image to float32.
    resampled = tf.raw_ops.ScaleAndTranslate(
        images=image[tf.newaxis, :, tf.newaxis],  # an image one pixel wide, with n channels
        size=(size, 1),
        scale=tf.stack((scale, 1.0)),
        translation=tf.stack((offset, 0.0)),
        kernel_type="triangle",
        antialias=True,
    )
    return resampled[0, :, 0]


def _bilinear(pixels: tf.Tensor, size: int) -> tf.Tensor:
    return _to_uint8(tf.image.resize(pixels, (size, size)), size)


def _to_uint8(image: tf.Tensor, size: int) -> tf.Tensor:
    # A weighted mean of bytes cannot leave their range, so adding a half and cutting off is rounding.
    return tf.reshape(tf.cast(image + 0.5, tf.uint8), (size, size, 3))
