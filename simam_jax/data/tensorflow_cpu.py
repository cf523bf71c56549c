"""TensorFlow as the input pipeline uses it: off the accelerators, which are JAX's, and with one thread an operation.

All cores are busy with images of their own. Sharing a small operation out among them as well costs more than it gives:
a third of the time that a CPU needs for an image (`python -m benchmarks.input_pipeline`).
"""

import contextlib
import os

os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")  # reading images does not use it, and it announces itself

import tensorflow as tf

tf.config.set_visible_devices([], "GPU")
with contextlib.suppress(RuntimeError):  # a notebook that has used TensorFlow already keeps its threads
    tf.config.threading.set_intra_op_parallelism_threads(1)

__all__ = ["tf"]
