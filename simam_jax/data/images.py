"""One image: from encoded bytes to uint8 pixels (image_size, image_size, 3), as torchvision's transforms make them."""

from simam_jax.data.tensorflow_cpu import tf


def eval_image(encoded: tf.Tensor, *, image_size: int, eval_resize: int) -> tf.Tensor:
    """Resizes the shorter side to `eval_resize` and cuts out the centre; 0 resizes straight to a square."""
    image = tf.cast(tf.io.decode_image(encoded, channels=3, expand_animations=False), tf.float32)
    if not eval_resize:
        return _to_uint8(tf.image.resize(image, (image_size, image_size), antialias=True))
    height, width = tf.unstack(tf.cast(tf.shape(image)[:2], tf.float32))
    scale = eval_resize / tf.minimum(height, width)
    image = tf.image.resize(image, (tf.cast(height * scale, tf.int32), tf.cast(width * scale, tf.int32)), antialias=True)
    return _to_uint8(tf.image.resize_with_crop_or_pad(image, image_size, image_size))


def pad_crop_image(encoded: tf.Tensor, uniform: tf.Tensor, *, image_size: int, padding: int, flip: bool) -> tf.Tensor:
    image = eval_image(encoded, image_size=image_size, eval_resize=0)
    image = tf.pad(image, ((padding, padding), (padding, padding), (0, 0)))
    offset = tf.cast(uniform[:2] * (2 * padding + 1), tf.int32)
    image = tf.slice(image, (offset[0], offset[1], 0), (image_size, image_size, 3))
    if flip:
        image = tf.cond(uniform[2] < 0.5, lambda: image[:, ::-1], lambda: image)
    return image


def _to_uint8(image: tf.Tensor) -> tf.Tensor:
    return tf.saturate_cast(tf.round(image), tf.uint8)
