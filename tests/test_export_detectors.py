"""Detectors exported with `python -m simam_jax.export`: run by their own runtime in a fresh process, they find what `Predictor` finds."""

import dataclasses
import json
import subprocess
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_sample_images

from simam_jax import DetectionPreprocessing, UserError, checkpoints, create_model, export, to_onnx
from simam_jax.detection.masks import Masks
from simam_jax.export import detectors
from simam_jax.export.agreement import agreement
from simam_jax.inference import DetectorPredictor
from simam_jax.models import init_variables
from simam_jax.ops.dispatch import lowering_for
from simam_jax.ops.nms import nms
from simam_jax.ops.roi_align import roi_align
from simam_jax.ops.top_k import top_k

TEMPLE, FLOWER = load_sample_images().images
PHOTOGRAPHS = [TEMPLE, TEMPLE.transpose(1, 0, 2).copy(), FLOWER[:300, :300]]
SMALL = DetectionPreprocessing(min_size=64, max_size=96)
SIZES = [(64, 96), (96, 64)]

# Of a fresh process: the folder, then the pixels and extents to read and what is found to write.
RUNTIMES = {
    "stablehlo": """
        import jax
        detect = {}
        for size in ("64x96", "96x64"):
            exported = jax.export.deserialize(bytearray(open(f"{path}/{size}.stablehlo", "rb").read()))
            assert exported.platforms == ("cpu", "cuda", "tpu")
            detect[size] = exported.call
    """,
    "saved_model": """
        import tensorflow as tf
        served = tf.saved_model.load(path).signatures
        assert served["serving_default"].structured_input_signature == served["64x96"].structured_input_signature
        detect = {
            size: lambda pixels, extent, size=size: served[size](pixels=tf.constant(pixels), extent=tf.constant(extent))
            for size in ("64x96", "96x64")
        }
    """,
}
FRESH = """if True:
        import sys
        import numpy as np
        path, folder = sys.argv[1:]
        RUNTIME
        for size in ("64x96", "96x64"):
            given = np.load(f"{folder}/{size}.npz")
            found = detect[size](given["pixels"], given["extent"])
            np.savez(f"{folder}/found{size}.npz", **{name: np.asarray(x) for name, x in found.items()})
        assert not any(name.startswith("simam_jax") for name in sys.modules)
"""


def detector(name: str) -> DetectorPredictor:
    """One that finds objects in photographs and none in a grey image: its scores are spread, and background is likely."""
    model = create_model(name, num_classes=3)
    variables = init_variables(model, jax.random.key(0))
    for head, layer in (("rpn_head", "rpn_cls"), ("bbox_head", "fc_cls"), ("bbox_head", "fc_reg")):
        variables["params"][head][layer]["kernel"] *= 30
    variables["params"]["bbox_head"]["fc_cls"]["bias"][-1] = 3.5
    return DetectorPredictor(model, variables, SMALL, ["cat", "dog", "bird"], category_ids=[17, 18, 16])


def write_workdir(predictor: DetectorPredictor, folder) -> str:
    spec = {
        "task": "detection",
        "model": predictor.model.spec(),
        "preprocessing": dataclasses.asdict(SMALL),
        "class_names": list(predictor.class_names),
        "category_ids": list(predictor.category_ids),
    }
    checkpoints.write_weights(folder, spec, predictor.variables)
    return str(folder)


def padded(images, size):
    """Pixels and extents of resized images, with noise around them: it must change nothing."""
    pixels = np.random.default_rng(2).integers(0, 256, (len(images), *size, 3), np.uint8)
    for row, image in zip(pixels, images, strict=True):
        row[: image.shape[0], : image.shape[1]] = image
    return pixels, np.array([image.shape[:2] for image in images], np.int32)


@pytest.fixture(scope="module")
def mask_rcnn():
    return detector("mask_rcnn_tiny_fpn")


@pytest.mark.slow
@pytest.mark.parametrize("format", ["saved_model", "stablehlo"])
def test_a_fresh_process_finds_what_predictor_finds(format, mask_rcnn, tmp_path, capsys):
    output = tmp_path / "exported"
    export.main(["--checkpoint", write_workdir(mask_rcnn, tmp_path / "run"), "--format", format, str(output)])
    printed = capsys.readouterr().out
    assert "for images padded to 64x96, 96x64; classes, preprocessing, thresholds are in its about.json" in printed
    assert "objects in 4 images differ by at most" in printed
    about = json.loads((output / "about.json").read_text())
    assert about["class_names"] == ["cat", "dog", "bird"]
    assert about["category_ids"] == [17, 18, 16]
    assert about["sizes"] == [[64, 96], [96, 64]]
    assert about["preprocessing"]["max_size"] == 96
    assert about["thresholds"] == {"score": 0.05, "iou": 0.5, "objects": 100, "mask": 0.5}

    images = {size: [] for size in SIZES}
    for photograph in PHOTOGRAPHS:
        resized = SMALL(photograph)
        images[SMALL.bucket(*resized.pixels.shape[:2])].append((resized, photograph))
    assert [len(members) for members in images.values()] == [2, 1]
    grey = np.full((32, 64, 3), 255 * np.array(SMALL.mean), np.uint8)
    for size, members in images.items():
        pixels, extent = padded([*(resized.pixels for resized, _ in members), grey], size)
        np.savez(tmp_path / "{}x{}.npz".format(*size), pixels=pixels, extent=extent)
    code = FRESH.replace("RUNTIME", RUNTIMES[format].strip())
    command = [sys.executable, "-c", code, str(output), str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr

    for size, members in images.items():
        found = dict(np.load(tmp_path / "found{}x{}.npz".format(*size)))
        assert {name: x.shape[1:] for name, x in found.items()} == {
            "boxes": (100, 4), "scores": (100,), "labels": (100,), "count": (), "masks": (100, 28, 28)
        }  # fmt: skip
        assert found["count"][-1] == 0
        assert not any(found[name][-1].any() for name in found)
        for row, (resized, photograph) in enumerate(members):
            (expected,) = mask_rcnn(photograph)
            count, scale = found["count"][row], np.array(resized.pixels.shape[:2]) / resized.size
            assert count == len(expected) > 0
            boxes = found["boxes"][row] / scale[[1, 0, 1, 0]]
            masks = np.asarray(Masks(found["masks"][row][:count], boxes[:count].astype(np.float32), resized.size))
            for box, score, label, mask in zip(
                expected.boxes, expected.scores, expected.labels, expected.masks, strict=True
            ):
                distance = np.abs(boxes[:count] - box).max(1) + 1000 * (found["labels"][row, :count] != label)
                nearest = int(distance.argmin())
                assert distance[nearest] < 2e-3  # pixels of the photograph
                assert abs(found["scores"][row, nearest] - score) < 1e-5
                assert (masks[nearest] != mask).sum() <= 5


@pytest.mark.slow
def test_a_faster_rcnn_in_one_size_is_compared_on_a_photograph(tmp_path, capsys):
    run, output = write_workdir(detector("faster_rcnn_tiny_fpn"), tmp_path / "run"), tmp_path / "exported"
    Image.fromarray(FLOWER[:300, :300]).save(tmp_path / "flower.png")
    wishes = ["--format", "stablehlo", "--size", "64x64", "--compare", str(tmp_path / "flower.png")]
    export.main(["--checkpoint", run, *wishes, str(output)])
    printed = capsys.readouterr().out
    assert "objects in 3 images differ by at most" in printed
    for size in ("64x96", "96x64"):
        assert f"the largest images, which need {size}, fit into none of its sizes" in printed
    assert {path.name for path in output.iterdir()} == {"64x64.stablehlo", "about.json"}
    about = json.loads((output / "about.json").read_text())
    assert "mask" not in about["thresholds"]
    assert "masks" not in about["outputs"]


def test_wrong_wishes_are_errors_before_anything_is_written(mask_rcnn, workdir, tmp_path):
    own = write_workdir(mask_rcnn, tmp_path / "run")

    def run(*wishes, checkpoint=own):
        export.main(["--checkpoint", str(checkpoint), *wishes, str(tmp_path / "new")])

    with pytest.raises(UserError, match=r"cannot be exported to onnx: .* loops .* Export to stablehlo or saved_model"):
        run("--format", "onnx")
    for wish, message in (
        ("64", r"--size=64 must be HEIGHTxWIDTH"),
        ("64x100", r"multiples of 32, got 64x100 \(height, width\)"),
        ("0x64", "multiples of 32, got 0x64"),
    ):
        with pytest.raises(UserError, match=message):
            run("--format", "stablehlo", "--size", wish)
    with pytest.raises(UserError, match="is resized to 64x96, which fits into no size of the export"):
        detectors.export(mask_rcnn, "stablehlo", tmp_path / "new", [(64, 64)], [TEMPLE])
    with pytest.raises(UserError, match=r"--size and --compare are for detectors"):
        run("--format", "stablehlo", "--size", "64x64", checkpoint=workdir)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_what_stands_in_the_way_of_onnx_is_what_the_error_says():
    boxes, many = jnp.zeros((9, 4)), jnp.zeros((1, 9), jnp.int32)
    maps = [jnp.zeros((1, 4, 4, 2))]
    suppress = partial(nms, threshold=0.5, most=3)
    traced = (
        jax.make_jaxpr(suppress)(boxes, boxes[:, 0], many[0], many[0] > 0),
        jax.make_jaxpr(partial(roi_align, size=2))(maps, many[:, :2], boxes[None], many, many > 0),
    )
    for text in map(str, traced):
        for name in ("while", "sort", "dynamic_slice"):
            assert f" {name}[" in text
    assert " top_k[" in str(traced[0])
    assert " scatter" in str(traced[0])
    assert not {"while", "sort", "top_k", "scatter", "dynamic_slice"} & set(to_onnx._RULES)


@pytest.mark.parametrize("k", [0, 3, 40])
def test_tensorflows_form_of_top_k_gives_the_same(k):
    x = np.random.default_rng(0).integers(0, 6, (2, 40)).astype(np.float32)  # with equal numbers
    x[:, ::7] = -np.inf
    x = jnp.asarray(x)
    values, places = top_k(x, k)
    with lowering_for("tensorflow"):
        assert "sort" in str(jax.make_jaxpr(lambda x: top_k(x, k))(x))
        sorted_values, sorted_places = top_k(x, k)
    np.testing.assert_array_equal(values, sorted_values)
    np.testing.assert_array_equal(places, sorted_places)


def found_in_two_images(**changes):
    boxes = np.zeros((2, 4, 4), np.float32)
    boxes[0, :2] = [[1, 2, 3, 4], [5, 6, 7, 8]]
    scores, labels = np.zeros((2, 4), np.float32), np.zeros((2, 4), np.int32)
    scores[0, :2], labels[0, :2] = [0.9, 0.8], [2, 1]
    return {"boxes": boxes, "scores": scores, "labels": labels, "count": np.array([2, 0], np.int32)} | changes


def test_agreement_states_the_largest_differences():
    expected, got = found_in_two_images(), found_in_two_images()
    for name in ("boxes", "scores", "labels"):
        got[name][0, :2] = got[name][0, 1::-1]  # another order
    got["boxes"][0, 0, 3] += 0.01
    found = agreement([(expected, got), (expected, expected)])
    assert (found.images, found.objects, found.scores, found.masks) == (4, 4, 0, 0)
    assert found.boxes == pytest.approx(0.01, rel=1e-3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"count": np.array([1, 0], np.int32)}, "finds 1 objects where the network finds 2"),
        ({"count": np.array([2, 0], np.int64)}, "The exported detector gives"),
        ({"labels": np.zeros((2, 4), np.int32)}, "boxes differ by inf, more than 0.05"),
        ({"scores": np.zeros((2, 4), np.float32)}, "scores differ by 9.0e-01, more than 0.001"),
        ({"boxes": np.full((2, 4, 4), np.nan, np.float32)}, "boxes differ by nan"),
    ],
)
def test_disagreement_is_an_error(changes, message):
    with pytest.raises(UserError, match=message):
        agreement([(found_in_two_images(), found_in_two_images(**changes))])
