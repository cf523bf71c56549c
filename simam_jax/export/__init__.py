"""A trained network for other programs: `python -m simam_jax.export`."""

import argparse
import re
from typing import TYPE_CHECKING

import numpy as np

from simam_jax import errors
from simam_jax.command_line import add_checkpoint_arguments, find_images, load_predictor
from simam_jax.export import classifiers, detectors
from simam_jax.export.classifiers import export, read_onnx
from simam_jax.export.files import FORMATS, check
from simam_jax.paths import local

if TYPE_CHECKING:
    from simam_jax.inference import ClassifierPredictor, DetectorPredictor

__all__ = ["check", "classifiers", "detectors", "export", "main", "read_onnx"]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m simam_jax.export",
        description="Writes a trained network for other programs. A classifier: from uint8 pixels (N, S, S, 3) to logits. "
        "A detector: from uint8 pixels (N, H, W, 3), padded, and the images' sizes (N, 2) to boxes, scores, labels and "
        "masks. For any N.",
    )
    add_checkpoint_arguments(parser)
    parser.add_argument("--format", required=True, help=f"one of {', '.join(FORMATS)}; onnx for classifiers only")
    parser.add_argument(
        "--size",
        help="of a detector: the heights and widths that images are padded to, multiples of 32, such as 800x1344,1344x800; "
        "default: the two that hold every image",
    )
    parser.add_argument(
        "--compare",
        action="append",
        metavar="PHOTOGRAPHS",
        help="of a detector: a photograph, a folder or a pattern to compare on, beside drawn pixels; again for more",
    )
    parser.add_argument("output", help="a new file; for saved_model, and of a detector, a new folder")
    args = parser.parse_args(argv)
    check(args.format, args.output)
    sizes = None if args.size is None else parse_sizes(args.size)
    photographs = find_images(args.compare) if args.compare else []
    predictor = load_predictor(args)

    from simam_jax.inference import DetectorPredictor

    if isinstance(predictor, DetectorPredictor):
        _detector(predictor, args.format, args.output, sizes, photographs)
    elif sizes or photographs:
        raise errors.UserError(f"--size and --compare are for detectors, and {args.checkpoint} is a classifier.")
    else:
        _classifier(predictor, args.format, args.output)  # pyright: ignore[reportArgumentType]


def parse_sizes(text: str) -> list[tuple[int, int]]:
    """(height, width) of each size in a text such as "800x1344,1344x800".

    Raises:
        UserError: it is no such text.
    """
    if not re.fullmatch(r"\d+x\d+(,\d+x\d+)*", text):
        raise errors.UserError(f"--size={text} must be HEIGHTxWIDTH, or several with commas: 800x1344,1344x800.")
    return [(int(height), int(width)) for height, width in (size.split("x") for size in text.split(","))]


def _classifier(predictor: "ClassifierPredictor", format: str, output: str) -> None:
    print(f"Writing {output}, then running it beside the network ...", flush=True)
    difference = classifiers.export(predictor, format, output)
    size = predictor.preprocessing.image_size
    print(
        f"{output}: uint8 (N, {size}, {size}, 3) to float32 (N, {len(predictor.class_names)}); "
        f"its logits differ by at most {difference:.1e}"
    )


def _detector(predictor: "DetectorPredictor", format: str, output: str, sizes, photographs) -> None:
    if format == "onnx":
        raise errors.UserError(detectors.NO_ONNX)
    print(f"Writing {output}, then running it beside the network ...", flush=True)
    found = detectors.export(predictor, format, output, sizes, photographs)
    sizes = sizes or detectors.default_sizes(predictor.preprocessing)
    shapes = ", ".join(f"{height}x{width}" for height, width in sizes)
    print(f"{output}: for images padded to {shapes}; classes, preprocessing, thresholds are in its {detectors.ABOUT}")
    for size in detectors.default_sizes(predictor.preprocessing):
        if not any(np.greater_equal(other, size).all() for other in sizes):
            print(f"the largest images, which need {size[0]}x{size[1]}, fit into none of its sizes")
    if found.objects:
        print(
            f"its {found.objects} objects in {found.images} images differ by at most {found.boxes:.1e} pixels, "
            f"{found.scores:.1e} in score, {found.masks:.1e} in masks"
        )
    else:
        print(f"neither it nor the network finds objects in {found.images} drawn images: --compare takes photographs")
    print("To use it:\n" + USE[format].format(path=local(output), height=sizes[0][0], width=sizes[0][1]))


_GIVEN = "uint8 (N, {height}, {width}, 3), int32 (N, 2): the images' heights and widths"
_FOUND = """\
    found["boxes"][0, : found["count"][0]]  # of the first image; also scores, labels, and a Mask R-CNN's masks"""
USE = {
    "stablehlo": f"""\
    import jax
    detect = jax.jit(jax.export.deserialize(bytearray(open("{{path}}/{{height}}x{{width}}.stablehlo", "rb").read())).call)
    found = detect(pixels, extent)  # {_GIVEN}
{_FOUND}""",
    "saved_model": f"""\
    import tensorflow as tf
    detect = tf.saved_model.load("{{path}}").signatures["{{height}}x{{width}}"]
    found = detect(pixels=tf.constant(pixels), extent=tf.constant(extent))  # {_GIVEN}
{_FOUND}""",
}
