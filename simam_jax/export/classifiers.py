"""A trained classifier as one file for other programs.

The exported network takes pixels as `Preprocessing` gives them, uint8 (N, image_size, image_size, 3) with any N,
normalises them itself and returns logits, float32 (N, classes).
"""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from simam_jax import errors
from simam_jax.export.files import PLATFORMS, check, complete

if TYPE_CHECKING:
    from simam_jax.inference import ClassifierPredictor

TOLERANCE = 1e-4  # of the difference that `export` returns

Network = Callable[[Any], Any]  # from pixels to logits: JAX's arrays while it is traced, NumPy's when it is run again


def export(predictor: "ClassifierPredictor", format: str, output: str | Path) -> float:
    """Writes the network of `predictor`, runs the written file in its own runtime and compares the logits.

    The exported network computes in float32, whatever dtype it was trained in, because its parameters are float32.

    Args:
        format: a name in `FORMATS`.
        output: a new file, for saved_model a new folder. It appears once it is complete and has passed the comparison.

    Returns:
        The largest difference between both networks' logits of random pixels, over the largest logit where that is
        above 1.

    Raises:
        UserError: no such format, a package is missing, `output` exists or cannot be written, or the logits differ.
    """
    check(format, output)
    network, size = _network(predictor), predictor.preprocessing.image_size
    write, read = _HOW[format]
    with complete(output) as written:
        write(network, size, written)
        return _difference(network, read(written), size)


def write_stablehlo(network: Network, image_size: int, path: Path) -> None:
    """One file for `jax.export.deserialize`, for every platform in `PLATFORMS`."""
    (batch,) = jax.export.symbolic_shape("batch")
    pixels = jax.ShapeDtypeStruct((batch, image_size, image_size, 3), jnp.uint8)
    path.write_bytes(jax.export.export(jax.jit(network), platforms=PLATFORMS)(pixels).serialize())


def read_stablehlo(path: Path) -> Network:
    """The network in the file, run by JAX."""
    exported = jax.export.deserialize(bytearray(path.read_bytes()))
    return jax.jit(exported.call)


def write_saved_model(network: Network, image_size: int, path: Path) -> None:
    """A folder for `tf.saved_model.load(folder).logits` and TensorFlow Serving, for every platform in `PLATFORMS`."""
    import tensorflow as tf
    from jax.experimental import jax2tf

    converted = jax2tf.convert(
        network, polymorphic_shapes=["(batch, ...)"], with_gradient=False, native_serialization_platforms=PLATFORMS
    )
    signature = [tf.TensorSpec((None, image_size, image_size, 3), tf.uint8, name="pixels")]
    module: Any = tf.Module()
    module.logits = tf.function(converted, input_signature=signature, autograph=False)
    served = tf.function(lambda pixels: {"logits": module.logits(pixels)}, input_signature=signature, autograph=False)
    tf.saved_model.save(module, str(path), signatures={"serving_default": served})


def read_saved_model(path: Path) -> Network:
    """The network in the folder, run by TensorFlow."""
    import tensorflow as tf

    module: Any = tf.saved_model.load(str(path))
    return lambda pixels: module.logits(pixels).numpy()


def write_onnx(network: Network, image_size: int, path: Path) -> None:
    """One file for any ONNX runtime, from `pixels` to `logits`."""
    from simam_jax.to_onnx import translate

    model = translate(network, (image_size, image_size, 3), jnp.uint8, ("pixels", "logits"))
    path.write_bytes(model.SerializeToString())


def read_onnx(path: Path) -> Network:
    """The network in the file, run by ONNX Runtime on the CPU."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return lambda pixels: session.run(["logits"], {"pixels": pixels})[0]


_HOW: dict[str, tuple[Callable[[Network, int, Path], None], Callable[[Path], Network]]] = {
    "stablehlo": (write_stablehlo, read_stablehlo),
    "saved_model": (write_saved_model, read_saved_model),
    "onnx": (write_onnx, read_onnx),
}


def _network(predictor: "ClassifierPredictor") -> Network:
    """A function from pixels to float32 logits, with the weights as constants."""
    model = predictor.model.with_backbone(dtype=jnp.dtype(jnp.float32))
    in_float32 = type(predictor)(model, predictor.variables, predictor.preprocessing, predictor.class_names)
    return functools.partial(in_float32.logits, jax.device_get(predictor.variables))


def _difference(network: Network, exported: Network, image_size: int) -> float:
    pixels = np.random.default_rng(0).integers(0, 256, (3, image_size, image_size, 3), np.uint8)
    with jax.default_device("cpu"):  # where float32 is not shortened
        expected, got = np.asarray(jax.jit(network)(pixels)), np.asarray(exported(pixels))
    if (got.shape, got.dtype) != (expected.shape, expected.dtype):
        raise errors.UserError(f"The exported network gives {got.dtype} {got.shape}: nothing was written.")
    difference = float(np.abs(got - expected).max() / max(1, np.abs(expected).max()))
    if not difference <= TOLERANCE:  # NaN neither
        raise errors.UserError(
            f"The exported network's logits differ by {difference:.1e}, more than {TOLERANCE:.0e}: nothing was written."
        )
    return difference
