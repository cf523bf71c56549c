"""A trained detector as a folder for other programs: a program for each size of padded images, and what must be known of it.

A program takes images as `DetectionPreprocessing` resizes them, padded right and below:

- pixels: uint8 (N, height, width, 3), RGB, with any N; of a size that was exported.
- extent: int32 (N, 2), each image's own height and width. What lies beyond them changes nothing.

It normalises them itself and returns arrays of fixed sizes, in which the rows from `count` on are 0:

- boxes: float32 (N, 100, 4), x1 y1 x2 y2 in the pixels that it was given, the most certain first.
- scores: float32 (N, 100). labels: int32 (N, 100). count: int32 (N,).
- masks: float32 (N, 100, 28, 28), of a Mask R-CNN: probabilities over each box. They are not pasted: 100 bitmaps of 800 x 1344
  pixels are 107 MB, and whoever asks wants them in the size of a photograph that the program never sees.
"""

import functools
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from simam_jax import errors
from simam_jax.detection.apply import detections, padded
from simam_jax.export.agreement import Agreement, agreement
from simam_jax.export.files import PLATFORMS, check, complete
from simam_jax.ops.dispatch import lowering_for
from simam_jax.preprocessing import SIZE_DIVISOR, DetectionPreprocessing, ImageLike, Resized
from simam_jax.rcnn import masks, proposals

if TYPE_CHECKING:
    from simam_jax.inference import DetectorPredictor

Size = tuple[int, int]  # height, width
Found = dict[str, Any]  # boxes, scores, labels, count, masks
Program = Callable[[Any, Any, Any], Found]  # of variables, pixels and extent
ABOUT = "about.json"
NO_ONNX = (
    "Detectors cannot be exported to onnx: their non-maximum suppression and RoIAlign are loops as long as the image "
    "makes them (JAX's while, with sort, top_k, scatter and dynamic slices inside), for which the translation has no "
    "rules. Export to stablehlo or saved_model."
)


def export(
    predictor: "DetectorPredictor",
    format: str,
    output: str | Path,
    sizes: Sequence[Size] | None = None,
    photographs: Iterable[ImageLike] = (),
) -> Agreement:
    """Writes the detector of `predictor`, runs what was written in its own runtime and compares what both find.

    The exported detector computes in float32, whatever dtype it was trained in.

    Args:
        format: stablehlo, a folder with a file HEIGHTxWIDTH.stablehlo for each size; or saved_model, one for all of them.
        output: a new folder. It appears once it is complete and has passed the comparison.
        sizes: (height, width) of padded images, multiples of 32; None: the two that hold every image that
            `predictor.preprocessing` resizes.
        photographs: what to compare on, beside a drawn and a black image of each size.

    Raises:
        UserError: the format is unknown or onnx, a package is missing, a size is wrong, a photograph cannot be read or
            fits into no size, `output` exists or cannot be written, or both find different objects.
    """
    if format == "onnx":
        raise errors.UserError(NO_ONNX)
    check(format, output)
    sizes = default_sizes(predictor.preprocessing) if sizes is None else _checked(sizes)
    images = _images(predictor.preprocessing, sizes, photographs)
    program, variables = _program(predictor), jax.device_get(predictor.variables)
    write, read = _HOW[format]
    with complete(output) as written:
        write(program, variables, sizes, written)
        (written / ABOUT).write_text(json.dumps(about(predictor, sizes), indent=2) + "\n")
        return agreement(_run(functools.partial(jax.jit(program), variables), read(written), images))


def default_sizes(preprocessing: DetectionPreprocessing) -> list[Size]:
    """The largest lying and the largest upright size that images are padded to."""
    largest = preprocessing.min_size, preprocessing.max_size
    return list(dict.fromkeys((preprocessing.bucket(*largest), preprocessing.bucket(*reversed(largest)))))


def about(predictor: "DetectorPredictor", sizes: Sequence[Size]) -> dict[str, Any]:
    """What a program that uses the export must know, as JSON."""
    preprocessing = predictor.preprocessing
    return {
        "model": predictor.model.spec() | {"dtype": "float32"},
        "class_names": list(predictor.class_names),
        "category_ids": list(predictor.category_ids),
        "sizes": [list(size) for size in sizes],
        "preprocessing": {
            "min_size": preprocessing.min_size,
            "max_size": preprocessing.max_size,
            "resize": "the shorter side min_size long, the longer one at most max_size; bilinear, not antialiased",
            "mean": list(preprocessing.mean),
            "std": list(preprocessing.std),
            "normalised": "inside",
        },
        "thresholds": {
            "score": proposals.MIN_SCORE,
            "iou": proposals.MAX_IOU,
            "objects": proposals.MOST,
            **({"mask": masks.THRESHOLD} if predictor.model.masks else {}),
        },
        "inputs": {
            "pixels": "uint8 (N, height, width, 3), RGB, a size of sizes, each image at the top left",
            "extent": "int32 (N, 2), height and width of each image in pixels, without padding",
        },
        "outputs": {
            "boxes": "float32 (N, objects, 4), x1 y1 x2 y2 in pixels as given: times original over resized size",
            "scores": "float32 (N, objects), the most certain first",
            "labels": "int32 (N, objects), places in class_names",
            "count": "int32 (N,), how many are objects; the rows after them are 0",
            **(
                {
                    "masks": "float32 (N, objects, 28, 28), probabilities: stretch each over its box, cut at thresholds.mask"
                }
                if predictor.model.masks
                else {}
            ),
        },
    }


def write_stablehlo(program: Program, variables: Any, sizes: Sequence[Size], path: Path) -> None:
    """A file for `jax.export.deserialize` for each size, for every platform in `PLATFORMS`."""
    path.mkdir()
    function = jax.jit(functools.partial(program, variables))
    for height, width in sizes:
        (batch,) = jax.export.symbolic_shape("batch")
        pixels = jax.ShapeDtypeStruct((batch, height, width, 3), jnp.uint8)
        exported = jax.export.export(function, platforms=PLATFORMS)(pixels, jax.ShapeDtypeStruct((batch, 2), jnp.int32))
        (path / f"{height}x{width}.stablehlo").write_bytes(exported.serialize())


def read_stablehlo(path: Path) -> Callable[[Any, Any], Found]:
    """The programs in the folder, run by JAX."""
    calls = {}

    def run(pixels: np.ndarray, extent: np.ndarray) -> Found:
        name = "{}x{}.stablehlo".format(*pixels.shape[1:3])
        if name not in calls:
            calls[name] = jax.jit(jax.export.deserialize(bytearray((path / name).read_bytes())).call)
        return calls[name](pixels, extent)

    return run


def write_saved_model(program: Program, variables: Any, sizes: Sequence[Size], path: Path) -> None:
    """For TensorFlow and TensorFlow Serving, for every platform in `PLATFORMS`.

    Each size is a signature HEIGHTxWIDTH, the first is `serving_default` too. They share the weights.
    """
    import tensorflow as tf
    from jax.experimental import jax2tf

    converted = jax2tf.convert(
        program,
        polymorphic_shapes=[None, "(batch, ...)", "(batch, ...)"],
        with_gradient=False,
        native_serialization_platforms=PLATFORMS,
    )
    module: Any = tf.Module()
    module.weights = tf.nest.map_structure(functools.partial(tf.Variable, trainable=False), variables)
    detect: Any = tf.function(lambda pixels, extent: converted(module.weights, pixels, extent), autograph=False)
    extent = tf.TensorSpec((None, 2), tf.int32)
    with lowering_for("tensorflow"):
        signatures = {
            f"{height}x{width}": detect.get_concrete_function(tf.TensorSpec((None, height, width, 3), tf.uint8), extent)
            for height, width in sizes
        }
    first = next(iter(signatures.values()))
    tf.saved_model.save(module, str(path), signatures={"serving_default": first, **signatures})


def read_saved_model(path: Path) -> Callable[[Any, Any], Found]:
    """The programs in the folder, run by TensorFlow."""
    import tensorflow as tf

    module: Any = tf.saved_model.load(str(path))

    def run(pixels: np.ndarray, extent: np.ndarray) -> Found:
        detect = module.signatures["{}x{}".format(*pixels.shape[1:3])]
        return {name: x.numpy() for name, x in detect(pixels=tf.constant(pixels), extent=tf.constant(extent)).items()}

    return run


_HOW: dict[str, tuple[Callable[[Program, Any, Sequence[Size], Path], None], Callable[[Path], Any]]] = {
    "stablehlo": (write_stablehlo, read_stablehlo),
    "saved_model": (write_saved_model, read_saved_model),
}


def _program(predictor: "DetectorPredictor") -> Program:
    model, preprocessing = predictor.model.with_backbone(dtype=jnp.dtype(jnp.float32)), predictor.preprocessing

    def program(variables: Any, pixels: jax.Array, extent: jax.Array) -> Found:
        sizes = jnp.clip(extent, 1, jnp.array(pixels.shape[1:3]))  # rows that a server fills up with are often 0
        scale = jnp.ones((pixels.shape[0], 4))
        found: Any = detections(model, preprocessing, variables, pixels, sizes, scale)  # pyright: ignore[reportArgumentType]
        return {name: x for name, x in found._asdict().items() if x is not None}

    return program


def _checked(sizes: Sequence[Size]) -> list[Size]:
    for height, width in sizes:
        if min(height, width) < SIZE_DIVISOR or height % SIZE_DIVISOR or width % SIZE_DIVISOR:
            raise errors.UserError(
                f"A size must be of multiples of {SIZE_DIVISOR}, got {height}x{width} (height, width)."
            )
    if not sizes:
        raise errors.UserError("There are no sizes to export.")
    return list(dict.fromkeys(sizes))


def _images(
    preprocessing: DetectionPreprocessing, sizes: Sequence[Size], photographs: Iterable[ImageLike]
) -> dict[Size, list[np.ndarray]]:
    """For each size a drawn and a black image, and the resized photographs that are padded to it."""
    rng = np.random.default_rng(0)
    black = np.zeros((SIZE_DIVISOR, SIZE_DIVISOR, 3), np.uint8)
    images = {}
    for height, width in sizes:
        squares = rng.integers(0, 256, (height // SIZE_DIVISOR, width // SIZE_DIVISOR, 3), np.uint8)
        images[height, width] = [squares.repeat(SIZE_DIVISOR, 0).repeat(SIZE_DIVISOR, 1), black]
    for photograph in photographs:
        pixels = preprocessing(photograph).pixels
        height, width = pixels.shape[:2]
        fitting = [size for size in sizes if size[0] >= height and size[1] >= width]
        if not fitting:
            name = photograph if isinstance(photograph, str | Path) else "A photograph"
            raise errors.UserError(f"{name} is resized to {height}x{width}, which fits into no size of the export.")
        images[fitting[0]].append(pixels)
    return images


def _run(
    network: Callable[[Any, Any], Found], exported: Callable[[Any, Any], Found], images: dict[Size, list[np.ndarray]]
) -> Iterator[tuple[Found, Found]]:
    """What both find, two images at a time."""
    for size, members in images.items():
        for i in range(0, len(members), 2):
            pair = [Resized(image, image.shape[:2]) for image in members[i : i + 2]]
            pixels, extent, _ = padded(pair, size, 2)
            with jax.default_device("cpu"):  # where float32 is not shortened
                both = network(pixels, extent), exported(pixels, extent)
            rows = len(pair)
            expected, got = ({name: np.asarray(x)[:rows] for name, x in found.items()} for found in both)
            yield expected, got
