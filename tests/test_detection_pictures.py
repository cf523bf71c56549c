"""Pictures of objects: names that can be read, detectors beside the ground truth, the worst first."""

import json
from xml.etree import ElementTree

import jax
import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask
from sklearn.datasets import load_sample_images

from simam_jax import DetectionPreprocessing, Predictor, UserError, create_model, visualize
from simam_jax.classification import explain
from simam_jax.detection import comparison, figures
from simam_jax.detection.detections import Detections
from simam_jax.detection.drawing import Drawn, class_colour, draw_objects, place_labels
from simam_jax.detection.mistakes import compare
from simam_jax.models import init_variables
from simam_jax.ops.images import normalize
from simam_jax.preprocessing import ORIENTATION

pytestmark = pytest.mark.usefixtures("quickly_compiled")

PHOTOGRAPHS = dict(zip(("temple", "flower"), load_sample_images().images, strict=True))


def overlap(a, b):
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


@pytest.mark.parametrize("seed", range(5))
def test_names_stand_at_their_boxes_and_never_on_one_another(seed):
    rng = np.random.default_rng(seed)
    picture = 1000, 700
    corners = np.sort(rng.integers(0, picture, (100, 2, 2)), axis=1)
    boxes = [(x1, y1, x2 + 1, y2 + 1) for (x1, y1), (x2, y2) in corners.tolist()]
    sizes = [(int(width), 20) for width in rng.integers(30, 120, 100)]
    places = place_labels(boxes, sizes, picture)
    assert places[0] is not None
    there = [place for place in places if place is not None]
    assert len(there) > 50
    assert sum(w * h for (w, h), place in zip(sizes, places, strict=True) if place) <= 0.25 * 1000 * 700
    for i, place in enumerate(there):
        assert min(place) >= 0
        assert place[2] <= 1000
        assert place[3] <= 700
        assert not any(overlap(place, other) for other in there[:i])
    for place, (width, height), box in zip(places, sizes, boxes, strict=True):
        if place is not None:
            assert (place[2] - place[0], place[3] - place[1]) == (width, height)
            touching = box[0] - 1, box[1] - 1, box[2] + 1, box[3] + 1
            assert overlap(place, touching)


def test_what_has_no_name_takes_no_place():
    assert place_labels([(0, 0, 5, 5)] * 2, [None, (4, 4)], (20, 20)) == [None, (0, 0, 4, 4)]
    assert place_labels([(0, 0, 5, 5)], [(30, 4)], (20, 20)) == [None]  # wider than the picture
    assert place_labels([], [], (20, 20)) == []


@pytest.mark.parametrize("colour", [class_colour(label) for label in range(12)])
@pytest.mark.parametrize("ground", ["as the box", 0, 255])
def test_a_box_is_seen_on_any_background(colour, ground):
    pixels = np.full((600, 600, 3), colour if ground == "as the box" else ground, np.uint8)
    picture = np.asarray(draw_objects(pixels, [Drawn((200, 200, 400, 400), "", colour)])).astype(int)
    along = picture[300, 150:250]
    grey = along @ [0.299, 0.587, 0.114]
    assert abs(grey - grey[0]).max() > 70


@pytest.mark.parametrize(
    ("size", "shown"), [((20, 20), (480, 480)), ((640, 427), (640, 427)), ((4000, 40), (4000, 40))]
)
def test_pictures_are_as_large_as_the_image_or_can_be_read(size, shown):
    pixels = np.zeros((*size[::-1], 3), np.uint8)
    objects = [Drawn((1, 1, 10, 10), "dog", (255, 0, 0), lambda: np.ones(size[::-1], bool))]
    assert draw_objects(pixels, objects).size == shown
    np.testing.assert_array_equal(draw_objects(np.zeros((480, 500, 3), np.uint8), []), 0)
    assert draw_objects(pixels, objects, 100).size == tuple(max(round(100 * s / max(size)), 1) for s in size)


def test_a_crowd_is_shown_larger():
    pixels = np.zeros((100, 200, 3), np.uint8)
    sizes = [draw_objects(pixels, count * [Drawn((1, 1, 10, 10), "dog", (255, 0, 0))]).size for count in (20, 21)]
    assert sizes == [(480, 240), (960, 480)]


def test_letters_and_lines_grow_with_the_picture():
    def drawn(side):
        picture = draw_objects(np.zeros((side, side, 3), np.uint8), [Drawn((0, 0, side, side), "dog", (255, 0, 0))])
        row = np.asarray(picture)[side // 2, : side // 4]
        return (row == (255, 0, 0)).all(-1).sum()

    assert [drawn(side) for side in (480, 1000, 4000)] == [2, 3, 13]


def test_the_first_object_is_on_top_and_others_do_not_shine_through():
    masks = np.zeros((2, 500, 500), bool)
    masks[0, 100:300, 100:300] = masks[1, 100:400, 100:400] = True
    objects = [
        Drawn((0, 0, 1, 1), "", (255, 0, 0), lambda: masks[0]),
        Drawn((0, 0, 1, 1), "", (0, 0, 255), lambda: masks[1]),
    ]
    picture = np.asarray(draw_objects(np.zeros((500, 500, 3), np.uint8), objects))
    assert picture[200, 200].tolist() == [115, 0, 0]
    assert picture[350, 350].tolist() == [0, 0, 115]
    assert picture[100, 200].tolist() == [255, 0, 0]  # the rim
    assert not picture[450, 450].any()


def row(box, category=1, **more):
    return {"bbox": box, "category_id": category, **more}


def test_mistakes_are_matched_as_coco_does():
    annotations = [
        row([0, 0, 10, 10]),
        row([50, 50, 20, 20], 2),
        row([80, 80, 10, 10]),
        row([0, 40, 30, 30], iscrowd=1),
    ]
    results = [
        row([1, 0, 10, 10], score=0.6),  # of the first, but a better one is there
        row([0, 0, 10, 10], score=0.9),
        row([50, 50, 20, 20], 1, score=0.5),  # of another class
        row([5, 45, 5, 5], score=0.7),  # in the crowd
    ]
    mistakes = compare(results, annotations)
    assert (mistakes.right, mistakes.wrong, mistakes.missed) == ([1], [0, 2], [1, 2])
    assert mistakes.weight == pytest.approx(0.6 + 0.5 + 2)
    assert compare([], annotations) == ([], [], [0, 1, 2], 3)
    assert compare(results[:1], []) == ([], [0], [], 0.6)
    assert compare([], []) == ([], [], [], 0)


@pytest.fixture(scope="module")
def predictor():
    """A detector that finds things: its scores are spread."""
    model = create_model("mask_rcnn_tiny_fpn", num_classes=3)
    variables = init_variables(model, jax.random.key(0))
    for head, layer in (("rpn_head", "rpn_cls"), ("bbox_head", "fc_cls"), ("bbox_head", "fc_reg")):
        variables["params"][head][layer]["kernel"] *= 30
    return Predictor(model, variables, DetectionPreprocessing(64, 96), ["cat", "dog", "bird"])


@pytest.fixture
def annotated(predictor, tmp_path):
    """A json and a folder of images: what the detector finds in the temple is right, in the flower there is one cat."""
    images, annotations = [], []
    (tmp_path / "images").mkdir()
    ids = {"cat": 5, "dog": 3, "bird": 8, "fish": 9}
    for i, (name, pixels) in enumerate(PHOTOGRAPHS.items(), 1):
        Image.fromarray(pixels).save(tmp_path / "images" / f"{name}.png")
        images.append({"id": i, "file_name": f"{name}.png", "height": pixels.shape[0], "width": pixels.shape[1]})
    (found,) = predictor(PHOTOGRAPHS["temple"])
    of_temple = found.results(1, [ids[name] for name in predictor.class_names])
    cat = np.zeros((427, 640), np.uint8, order="F")
    cat[100:140, 100:170] = 1
    rle = coco_mask.encode(cat)
    cat = {"size": rle["size"], "counts": rle["counts"].decode()}
    rows = [*of_temple, {"image_id": 2, "category_id": 5, "bbox": [100, 100, 70, 40], "segmentation": cat}]
    for i, each in enumerate(rows, 1):
        area = each["bbox"][2] * each["bbox"][3]
        annotations.append(
            {name: x for name, x in each.items() if name != "score"} | {"id": i, "iscrowd": 0, "area": area}
        )
    categories = [{"id": i, "name": name} for name, i in ids.items()]
    (tmp_path / "truth.json").write_text(
        json.dumps({"images": images, "annotations": annotations, "categories": categories})
    )
    return tmp_path


def test_a_detector_is_shown_what_the_annotations_are_for(tmp_path):
    """Both files are wide and tagged to be turned; the second's annotations do not know of the tag."""
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    images = []
    for i, (height, width) in enumerate([(60, 40), (40, 60)]):
        Image.fromarray(PHOTOGRAPHS["temple"][:40, :60]).save(tmp_path / f"{i}.jpg", exif=exif)
        images.append({"id": i, "file_name": f"{i}.jpg", "height": height, "width": width})
    box = {"id": 1, "image_id": 0, "category_id": 3, "bbox": [9, 9, 20, 20], "area": 400, "iscrowd": 0}
    truth = {"images": images, "annotations": [box], "categories": [{"id": 3, "name": "dog"}]}
    (tmp_path / "truth.json").write_text(json.dumps(truth))

    truth, paths = comparison.read_truth(tmp_path / "truth.json", tmp_path)
    shown = [DetectionPreprocessing(64, 96)(image).size for image in comparison.images(truth, paths)]

    assert [tuple(size) for size in shown] == [(60, 40), (40, 60)]


def texts_in(path):
    """The texts of an SVG, which matplotlib leaves beside their outlines as comments."""
    parser = ElementTree.XMLParser(target=ElementTree.TreeBuilder(insert_comments=True))
    return [e.text.strip() for e in ElementTree.parse(path, parser).iter() if e.tag is ElementTree.Comment]


@pytest.fixture
def draw(predictor, annotated, monkeypatch):
    """`visualize detections` with the detector that is there already."""
    monkeypatch.setattr(visualize, "load_detector", lambda _: predictor)
    where = ["--annotations", str(annotated / "truth.json"), "--images", str(annotated / "images")]
    return lambda *more: visualize.main(["detections", *where, "--output", str(annotated / "out.svg"), *more])


def test_detectors_stand_beside_the_ground_truth_the_worst_image_first(draw, annotated, predictor, capsys):
    assert draw("--checkpoint", "runs/a", "--checkpoint", "runs/b", "--score", "0") == 0
    texts = texts_in(annotated / "out.svg")
    assert texts[:3] == ["ground truth", "a", "b"]
    found = {name: len(predictor(pixels)[0]) for name, pixels in PHOTOGRAPHS.items()}
    captions = {"flower.png": f"0 right, {found['flower']} wrong, 1 missed"}
    captions["temple.png"] = f"{found['temple']} right, 0 wrong, 0 missed"
    assert texts[3:9] == [text for name, caption in captions.items() for text in (name, caption, caption)]
    scores = texts_in(annotated / "out_scores.svg")
    assert {"boxes: mean over classes", "masks: each class", "fish", "n/a: no ground truth"} <= set(scores)
    assert f"Wrote {annotated / 'out_scores.svg'}\nWrote {annotated / 'out.svg'}\n" == capsys.readouterr().out


def test_the_figure_has_the_scores_of_the_evaluation(draw, annotated):
    assert draw("--checkpoint", "runs/a", "--first", "1") == 0  # the temple alone
    (line,) = {text for text in texts_in(annotated / "out_scores.svg") if text.startswith("a: AP")}
    assert line == "a: AP 100.0, AP50 100.0, AP75 100.0"
    assert "flower.png" not in texts_in(annotated / "out.svg")


def test_an_unreadable_image_is_left_out(draw, annotated, capsys):
    (annotated / "images" / "flower.png").write_text("no image")
    assert draw("--checkpoint", "runs/a") == 1
    assert "1 of 2 files could not be read" in capsys.readouterr().err
    assert any(text.startswith("a: AP 100.0") for text in texts_in(annotated / "out_scores.svg"))


def test_what_cannot_be_compared_is_an_error(draw, annotated):
    with pytest.raises(UserError, match=r"--count must be in 1\.\.16, got 17"):
        draw("--checkpoint", "a", "--count", "17")
    with pytest.raises(UserError, match="There is nothing to look at"):
        draw("--checkpoint", "a", "--first", "0")
    truth, _ = comparison.read_truth(annotated / "truth.json", annotated / "images")
    with pytest.raises(UserError, match=r"None of the classes of X \(car, bus\).*\(cat, dog, bird, fish\)"):
        comparison.category_ids(truth, ["car", "bus"], "X")
    assert comparison.category_ids(truth, ["bus", "dog"], "X") == [None, 3]
    Image.fromarray(PHOTOGRAPHS["temple"].transpose(1, 0, 2)).save(annotated / "images" / "temple.png")
    with pytest.raises(UserError, match=r"temple\.png has 640 x 427 pixels, and the annotations say 427 x 640"):
        draw("--checkpoint", "a")
    (annotated / "images" / "temple.png").unlink()
    with pytest.raises(UserError, match=r"1 of 2 images of .* are not in .*, the first is temple\.png"):
        draw("--checkpoint", "a")


def test_simam_s_weights_in_a_detector_s_backbone(predictor, tmp_path, monkeypatch):
    monkeypatch.setattr(visualize, "load_predictor", lambda _: predictor)
    how = predictor.preprocessing
    Image.fromarray(PHOTOGRAPHS["temple"][:300, :300]).save(tmp_path / "square.png")
    square = how(tmp_path / "square.png")
    maps = visualize._weights_in_detector(predictor, square, "layer2_0")
    assert {name: w.shape for name, w in maps.items()} == {
        "layer1_0": (16, 16, 1), "layer2_0": (8, 8, 64), "layer3_0": (4, 4, 1), "layer4_0": (2, 2, 1)
    }  # fmt: skip
    own = normalize(square.pixels[None], how.mean, how.std)  # not padded to 64 x 96
    weights = explain.attention_weights(predictor.model, predictor.variables, own, method="pyramid")
    np.testing.assert_allclose(maps["layer2_0"], weights["backbone/layer2_0"][0], atol=1e-5)
    np.testing.assert_allclose(maps["layer4_0"], weights["backbone/layer4_0"][0].mean(-1, keepdims=True), atol=1e-5)

    command = [
        "attention",
        "--checkpoint",
        "a detector",
        str(tmp_path / "square.png"),
        "--output",
        str(tmp_path / "out.svg"),
    ]
    assert visualize.main(command) == 0
    assert {"square.png", "layer1_0", "layer4_0"} <= set(texts_in(tmp_path / "out.svg"))
    assert visualize.main([*command, "--layer", "layer3_0", "--channels", "2"]) == 0
    assert "SimAM's weights in layer3_0" in texts_in(tmp_path / "out.svg")


def test_a_classifier_finds_no_objects(annotated, workdir):
    where = ["--annotations", str(annotated / "truth.json"), "--images", str(annotated / "images")]
    with pytest.raises(UserError, match="is a classifier, and this command is for detectors"):
        visualize.main(["detections", *where, "--checkpoint", str(workdir), "--output", str(annotated / "out.svg")])


def test_a_figure_of_boxes_alone(annotated):
    truth, _ = comparison.read_truth(annotated / "truth.json", annotated / "images")
    plain = [{k: x for k, x in each.items() if k != "segmentation"} | {"score": 0.5} for each in truth.annotations]
    scores = comparison.scores(truth, {"a": plain, "nothing": []})
    assert list(scores) == ["bbox"]
    assert scores["bbox"]["a"].stats[0] == pytest.approx(1)
    assert scores["bbox"]["nothing"].stats[0] == 0
    assert len(figures.scores_figure(scores, truth.class_names).axes) == 2


def test_objects_of_classes_without_a_category_are_left_out_of_the_results():
    found = Detections(np.eye(2, 4, dtype=np.float32), np.ones(2, np.float32), np.arange(2), None, ("bus", "dog"))
    assert [row["category_id"] for row in found.results(1, [None, 3])] == [3]
