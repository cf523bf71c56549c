"""TensorFlow, kept off the accelerators: they are JAX's."""

import tensorflow as tf

tf.config.set_visible_devices([], "GPU")

__all__ = ["tf"]
