"""What is seen is what is computed: attention weights, Grad-CAM, curves, and the pictures made of them."""

import json
from functools import partial
from xml.etree import ElementTree

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from PIL import Image

import simam_jax
from simam_jax import checkpoints, curves, models, visualize
from simam_jax.classification import explain, figures
from simam_jax.inference import Predictor
from simam_jax.models import init_variables
from simam_jax.models.blocks import BasicBlock
from simam_jax.models.registry import Architecture
from simam_jax.models.resnet import ResNet

pytestmark = pytest.mark.usefixtures("quickly_compiled")

SPEC = {"name": "tiny", "num_classes": 3, "attention": "simam", "attention_param": 1e-4, "dtype": "float32"}
NAMES = ["a temple", "a flower", "a cat"]
SEEN = {"image_size": 16, "eval_resize": 20, "mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.2)}


@pytest.fixture(scope="module")
def workdirs(tmp_path_factory):
    """One with SimAM, one without: its variables are the same, as SimAM has none. Of a network of three small blocks."""
    with pytest.MonkeyPatch.context() as patch:
        tiny = partial(ResNet, block=BasicBlock, stage_sizes=(1, 1, 1), width=8, stem="3x3")
        patch.setitem(models.MODELS, "tiny", Architecture(tiny))
        yield _write_workdirs(tmp_path_factory)


def _write_workdirs(tmp_path_factory):
    variables = init_variables(simam_jax.create_model(**SPEC), jax.random.key(0))
    folders = {}
    for attention in ("simam", "none"):
        folders[attention] = tmp_path_factory.mktemp(attention)
        spec = SPEC | {"attention": attention, "attention_param": 1e-4 if attention == "simam" else 0.0}
        checkpoints.write_weights(
            folders[attention],
            {"task": "classification", "model": spec},
            variables,
            class_names=NAMES,
            preprocessing=SEEN,
        )
    return folders


def drawn_and_named(path):
    """The pictures in an SVG and the texts, which matplotlib leaves beside their outlines as comments."""
    parser = ElementTree.XMLParser(target=ElementTree.TreeBuilder(insert_comments=True))
    elements = list(ElementTree.parse(path, parser).iter())
    images = [e for e in elements if e.tag == "{http://www.w3.org/2000/svg}image"]
    return len(images), [e.text.strip() for e in elements if e.tag is ElementTree.Comment]


@pytest.fixture(scope="module")
def network64(tiny_network):
    """The tiny network in float64, its variables, three images and what its stages make of them."""
    with jax.enable_x64(True):
        model = tiny_network("float64")
        images = jax.random.normal(jax.random.key(1), (3, 12, 12, 3), jnp.float64)
        variables = jax.tree.map(jnp.float64, init_variables(model, jax.random.key(0)))
        _, stages = jax.jit(model.apply, static_argnames="features")(variables, images, features=True)
        return model, variables, images, stages


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_the_weights_are_those_of_what_goes_into_each_layer(network64):
    model, variables, images, _ = network64

    @jax.jit
    def inputs_of_simam(variables):
        inputs = {}

        def remember(call, args, kwargs, context):
            if isinstance(context.module, simam_jax.SimAM):
                inputs[context.module.path[0]] = args[0]
            return call(*args, **kwargs)

        with nn.intercept_methods(remember):
            model.apply(variables, images)
        return inputs

    inputs = inputs_of_simam(variables)
    weights = explain.attention_weights(model, variables, images)
    assert list(weights) == list(inputs) == ["layer1_0", "layer2_0", "layer3_0"]
    for name, x in inputs.items():
        np.testing.assert_allclose(weights[name], simam_jax.simam_weights(x, 1e-4), atol=1e-10)


def test_layers_of_any_network_come_in_their_order():
    class Chain(nn.Module):
        @nn.compact
        def __call__(self, x):
            for i in range(12):
                x = simam_jax.SimAM(name=f"layer{i}")(x)
            return x

    weights = explain.attention_weights(Chain(), {}, jnp.ones((1, 4, 4, 3)))
    assert list(weights) == [f"layer{i}" for i in range(12)]
    assert explain.attention_weights(nn.Dense(2), nn.Dense(2).init(jax.random.key(0), jnp.ones(3)), jnp.ones(3)) == {}


@pytest.mark.usefixtures("x64")
def test_grad_cam_of_the_last_stage_is_the_classifier_s_weights_at_each_position(network64):
    model, variables, images, stages = network64
    classes = [1, 7, 4]
    evidence = np.asarray(stages["layer3"]) @ np.asarray(variables["params"]["fc"]["kernel"])
    wanted = np.stack([evidence[i, ..., c] for i, c in enumerate(classes)]).clip(0)
    wanted /= wanted.max((1, 2), keepdims=True)
    heat = explain.grad_cam(model, variables, images, classes)
    assert heat.dtype == np.float64
    np.testing.assert_allclose(heat, wanted, atol=1e-12)
    np.testing.assert_allclose(explain.grad_cam(model, variables, images, 7)[1], wanted[1], atol=1e-12)


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_grad_cam_of_an_inner_stage_is_that_of_finite_differences(network64):
    model, variables, images, stages = network64
    maps = stages["layer2"]
    last = {kind: tree["layer3_0"] for kind, tree in variables.items() if "layer3_0" in tree}

    @jax.jit
    def logit(maps):
        x = model.backbone.block(model.backbone.factory(), 32, 2).apply(last, maps, False)
        return x.mean((1, 2)) @ variables["params"]["fc"]["kernel"][:, 5]

    # A channel's mean gradient is, up to its size, the derivative along a shift of the whole channel.
    step = 1e-7 * np.eye(maps.shape[-1])
    importance = np.stack([logit(maps + s) - logit(maps - s) for s in step], -1)
    wanted = np.einsum("nhwc,nc->nhw", maps, importance).clip(0)
    wanted /= wanted.max((1, 2), keepdims=True)
    np.testing.assert_allclose(explain.grad_cam(model, variables, images, 5, "layer2"), wanted, atol=1e-5)


@pytest.mark.usefixtures("x64")
def test_where_nothing_speaks_for_the_class_grad_cam_is_zero(network64):
    model, variables, images, _ = network64
    head = jax.tree.map(lambda x: -jnp.ones_like(x), variables["params"]["fc"])
    against = variables | {"params": variables["params"] | {"fc": head}}
    np.testing.assert_array_equal(explain.grad_cam(model, against, images, 0), np.zeros((3, 3, 3)))


@pytest.mark.usefixtures("x64")
def test_classes_and_layers_that_are_not_there_are_errors(network64):
    model, variables, images, _ = network64
    for wrong in (10, -1, [3, 11, 0]):
        with pytest.raises(simam_jax.UserError, match=r"class_index must be in 0\.\.9, got"):
            explain.grad_cam(model, variables, images, wrong)
    with pytest.raises(simam_jax.UserError, match=r"Unknown layer 'layer33'\. Did you mean 'layer3'"):
        explain.grad_cam(model, variables, images, 0, "layer33")
    with pytest.raises(simam_jax.UserError, match=r"Unknown layer 'layer2_1'\. Did you mean 'layer2_0'"):
        figures.attention_figure(np.zeros((1, 8, 8, 3), np.uint8), {"layer2_0": np.ones((1, 4, 4, 2))}, "layer2_1")


def test_the_overlay_is_brightest_where_the_heat_is_highest():
    pixels = np.full((64, 64, 3), 128, np.uint8)
    heat = np.zeros((4, 4))
    heat[1, 2] = 1
    seen = figures.overlay(pixels, heat)
    assert (seen.size, seen.mode) == ((64, 64), "RGB")
    light = np.asarray(seen.convert("L"))
    row, column = np.unravel_index(light.argmax(), light.shape)
    assert 16 <= row < 32
    assert 32 <= column < 48
    assert light[0, 0] == light.min()
    np.testing.assert_array_equal(figures.overlay(pixels, 0.1 * heat - 7), seen)  # of any range
    assert len(np.unique(figures.overlay(pixels, np.full((4, 4), 0.7)))) <= 3  # nothing stands out: one colour
    with pytest.raises(simam_jax.UserError, match=r"got float64 \(64, 64, 3\) and \(4, 4\)"):
        figures.overlay(pixels / 255, heat)


def test_a_panel_without_positive_evidence_says_so():
    heat = np.stack([np.eye(4), np.zeros((4, 4))])
    figure = figures.grad_cam_figure(
        np.zeros((2, 32, 32, 3), np.uint8), {"SimAM": heat}, {"SimAM": ["a cat: 9.0 %", "a dog: 1.0 %"]}, ["1", "2"]
    )
    texts = [text.get_text() for text in figure.texts]
    assert "SimAM\na cat: 9.0 %" in texts
    assert "SimAM\na dog: 1.0 %\nno positive evidence" in texts


@pytest.mark.slow
def test_attention_as_png_and_svg(workdirs, photographs, tmp_path):
    command = ["attention", "--checkpoint", str(workdirs["simam"]), *photographs, "--output"]
    assert visualize.main([*command, str(tmp_path / "all.png")]) == 0
    with Image.open(tmp_path / "all.png") as picture:
        width, height = picture.size
    assert 900 < width < 1000  # an image and three layers
    assert width / 2 < height < 0.8 * width  # two rows, and the colour bar
    assert visualize.main([*command, str(tmp_path / "one.svg"), "--layer", "layer2_0", "--channels", "3"]) == 0
    count, texts = drawn_and_named(tmp_path / "one.svg")
    assert count >= 2 * (2 + 3)
    assert {"temple.jpg", "flower.jpg", "mean", "SimAM's weights in layer2_0"} <= set(texts)
    channels = [int(text.removeprefix("channel ")) for text in texts if text.startswith("channel ")]
    predictor = Predictor.load(workdirs["simam"])
    pixels = np.stack([predictor.preprocessing(path) for path in photographs])
    images = (pixels / 255 - SEEN["mean"]) / SEEN["std"]
    weights = explain.attention_weights(predictor.model, predictor.variables, jnp.float32(images))["layer2_0"]
    assert channels == [c for image in np.std(weights, (1, 2)) for c in np.argsort(-image)[:3]]
    assert {p.name for p in tmp_path.iterdir()} == {"all.png", "one.svg"}  # nothing half done is left


@pytest.mark.slow
def test_grad_cam_beside_the_plain_network(workdirs, photographs, tmp_path):
    command = ["grad-cam", "--checkpoint", str(workdirs["simam"]), *photographs]
    both = [*command, "--baseline", str(workdirs["none"]), "--output", str(tmp_path / "both.svg")]
    assert visualize.main(both) == 0
    count, texts = drawn_and_named(tmp_path / "both.svg")
    assert count >= 2 * 3
    ours, plain = (Predictor.load(workdirs[name])(photographs) for name in ("simam", "none"))
    for row, other, (best, _, _) in zip(ours.probabilities, plain.probabilities, ours.top(3), strict=True):
        index = NAMES.index(best[0])
        assert f"{best[0]}: {100 * row[index]:.1f} %" in texts
        assert f"{best[0]}: {100 * other[index]:.1f} %" in texts
    assert (texts.count("SimAM"), texts.count("no attention")) == (2, 2)
    assert visualize.main([*command, "--class", "a cat", "--output", str(tmp_path / "cat.png")]) == 0
    with Image.open(tmp_path / "cat.png") as picture:
        assert picture.height > 1.1 * picture.width > 700  # two rows of two


def write_metrics(folder, rows, end=""):
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + end)


def test_curves_of_two_runs(tmp_path):
    def train(step, top1):
        return {"step": step, "epoch": step / 4, "train/top1": top1}

    def evaluated(step, top1):
        return {"step": step, "epoch": step / 4, "eval/top1": top1}

    # The run was interrupted after update 6: updates 5 and 6 were done again. Its last line is cut off.
    rows = [train(3, 0.1), train(4, 0.5), evaluated(4, 0.2), train(5, 0.9), train(6, 0.9)]
    rows += [train(5, 0.6), train(6, 0.6), train(8, 0.8), evaluated(8, 0.75)]
    write_metrics(tmp_path / "simam", rows, end='{"step": 9, "ep')
    write_metrics(tmp_path / "plain", rows[:2])
    read = curves.read_curves(tmp_path / "simam")
    np.testing.assert_allclose(read["train"], [[1, 100 * (1 - 0.2)], [2, 100 * (1 - 0.7)]])
    np.testing.assert_allclose(read["eval"], [[1, 80], [2, 25]])

    workdirs = [str(tmp_path / "simam"), str(tmp_path / "plain")]
    assert visualize.main(["curves", *workdirs, "--output", str(tmp_path / "curves.svg")]) == 0
    _, texts = drawn_and_named(tmp_path / "curves.svg")
    assert {"simam (ends at 25.00 %)", "plain", "training", "validation", "epoch", "top-1 error (%)"} <= set(texts)
    assert visualize.main(["curves", workdirs[0], "--output", str(tmp_path / "curves.png")]) == 0
    with Image.open(tmp_path / "curves.png") as picture:
        assert picture.size == (1024, 672)


def test_curves_of_detectors(tmp_path):
    def evaluated(step, **scores):
        return {"step": step, "epoch": step / 4} | {f"eval/{name}": ap for name, ap in scores.items()}

    write_metrics(tmp_path / "mask", [evaluated(4, bbox_AP=0.2, segm_AP=0.1), evaluated(8, bbox_AP=0.3, segm_AP=0.25)])
    write_metrics(tmp_path / "faster", [{"step": 3, "epoch": 0.75, "train/loss": 1.0}, evaluated(4, bbox_AP=0.15)])
    read = curves.read_curves(tmp_path / "mask")
    np.testing.assert_allclose(read["bbox_AP"], [[1, 20], [2, 30]])
    np.testing.assert_allclose(read["segm_AP"], [[1, 10], [2, 25]])
    assert list(curves.read_curves(tmp_path / "faster")) == ["bbox_AP"]

    workdirs = [str(tmp_path / "mask"), str(tmp_path / "faster")]
    assert visualize.main(["curves", *workdirs, "--output", str(tmp_path / "curves.svg")]) == 0
    _, texts = drawn_and_named(tmp_path / "curves.svg")
    assert {"mask (ends at 30.00 %, 25.00 %)", "faster (ends at 15.00 %)", "boxes", "masks", "AP (%)"} <= set(texts)
    write_metrics(tmp_path / "classifier", [{"step": 1, "epoch": 1, "eval/top1": 0.5}])
    with pytest.raises(simam_jax.UserError, match="draw them in two pictures"):
        visualize.main(["curves", *workdirs, str(tmp_path / "classifier"), "--output", str(tmp_path / "no.svg")])


def test_an_update_across_the_end_of_an_epoch_belongs_to_where_it_began(tmp_path):
    rows = [{"step": step, "epoch": step / 3.9, "train/top1": step / 100} for step in range(1, 9)]
    write_metrics(tmp_path / "run", rows)
    train = curves.read_curves(tmp_path / "run")["train"]
    np.testing.assert_allclose(train, [[4 / 3.9, 100 - 2.5], [8 / 3.9, 100 - 6.5]])


@pytest.mark.slow
def test_what_cannot_be_drawn_is_an_error(workdirs, photographs, tmp_path, capsys):
    def refused(command, message, output="out.png"):
        with pytest.raises(simam_jax.UserError, match=message):
            visualize.main([*command, "--output", str(tmp_path / output)])

    simam, none = (["--checkpoint", str(workdirs[name])] for name in ("simam", "none"))
    refused(["attention", *simam, *photographs], "Unknown ending '.jpg'. Did you mean '.png'", "out.jpg")
    refused(["attention", *simam, *photographs], "cannot be written", "nowhere/out.png")
    refused(["attention", *none, *photographs], "no SimAM in it")
    refused(["attention", *simam, *17 * photographs[:1]], "17 images are too many for one picture: name at most 16")
    refused(["grad-cam", *simam, *photographs, "--class", "a cart"], "Unknown class 'a cart'. Did you mean 'a cat'")
    refused(["grad-cam", *simam, *photographs, "--class", "3"], "Unknown class '3'")
    refused(["curves", str(tmp_path)], "no workdir with metrics")
    write_metrics(tmp_path / "new", [{"step": 1, "epoch": 0.1, "learning_rate": 0.1}])
    refused(["curves", str(tmp_path / "new")], "holds no top-1 accuracy and no AP yet")
    (tmp_path / "text.jpg").write_text("no image")
    refused(["attention", *simam, str(tmp_path / "text.jpg")], "None of the images could be read")
    assert not (tmp_path / "out.png").exists()

    mixed = ["grad-cam", *simam, str(tmp_path / "text.jpg"), photographs[0], "--class", "2"]
    assert visualize.main([*mixed, "--output", str(tmp_path / "out.png")]) == 1
    assert (tmp_path / "out.png").exists()
    assert "1 of 2 files could not be read" in capsys.readouterr().err


@pytest.mark.slow
def test_networks_that_cannot_be_compared_are_errors(workdirs, photographs, tmp_path):
    _, variables = simam_jax.load(workdirs["none"])
    spec = SPEC | {"attention": "none", "attention_param": 0.0}
    others = {
        "has other classes": {"class_names": ["x", "y", "z"], "preprocessing": SEEN},
        r"\(32, 40\).*cannot be compared": {
            "class_names": NAMES,
            "preprocessing": SEEN | {"image_size": 32, "eval_resize": 40},
        },
    }
    for i, (message, meta) in enumerate(others.items()):
        checkpoints.write_weights(tmp_path / str(i), {"task": "classification", "model": spec}, variables, **meta)
        command = ["grad-cam", "--checkpoint", str(workdirs["simam"]), "--baseline", str(tmp_path / str(i))]
        with pytest.raises(simam_jax.UserError, match=message):
            visualize.main([*command, *photographs, "--output", str(tmp_path / "out.png")])
