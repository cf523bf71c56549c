"""`Predictor` and `python -m simam_jax.predict`: pixels as torchvision makes them, any images, every bad one named."""

import json

import jax
import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_sample_images

import simam_jax
from simam_jax import checkpoints, predict
from simam_jax.convert import write_state
from simam_jax.inference import Predictor
from simam_jax.models import init_variables
from simam_jax.ops.images import normalize
from simam_jax.preprocessing import CIFAR, IMAGENET, Preprocessing
from simam_jax.torch_weights.names import to_torch

pytestmark = pytest.mark.usefixtures("quickly_compiled")

SPEC = {"name": "cifar_resnet20", "num_classes": 7, "attention": "simam", "attention_param": 1e-4, "dtype": "float32"}
NAMES = [f"class {letter}" for letter in "abcdefg"]
SMALL = Preprocessing(16, 20, (0.5, 0.4, 0.3), (0.2, 0.3, 0.2))
PHOTOGRAPHS = load_sample_images().images  # two, 427 x 640


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    model = simam_jax.create_model(**SPEC)
    variables = init_variables(model, jax.random.key(0))
    stored = {"image_size": 16, "eval_resize": 20, "mean": SMALL.mean, "std": SMALL.std}
    checkpoints.write_weights(
        folder, {"task": "classification", "model": SPEC}, variables, class_names=NAMES, preprocessing=stored
    )
    return folder


@pytest.fixture(scope="module")
def predictor(workdir):
    return Predictor.load(workdir, batch_size=4)


@pytest.fixture
def folder(tmp_path):
    """Five images, one of them in a folder below."""
    (tmp_path / "below").mkdir()
    for i, name in enumerate(("a.jpg", "b.png", "c.jpg", "below/d.JPEG", "e.jpg")):
        Image.fromarray(PHOTOGRAPHS[i % 2][50 * i :, 20 * i :]).save(tmp_path / name, quality=90)
    return tmp_path


def torchvision(image, how):
    """torchvision's Resize(how.eval_resize), CenterCrop(how.image_size)."""
    if not how.eval_resize:
        return np.asarray(image.resize((how.image_size, how.image_size), Image.BILINEAR))
    shorter = min(image.size)
    image = image.resize([how.eval_resize * length // shorter for length in image.size], Image.BILINEAR)
    left, top = (round((length - how.image_size) / 2) for length in image.size)
    return np.asarray(image.crop((left, top, left + how.image_size, top + how.image_size)))


@pytest.mark.parametrize("how", [IMAGENET, CIFAR, SMALL, Preprocessing(64, 64, SMALL.mean, SMALL.std)])
@pytest.mark.parametrize("size", [(640, 427), (333, 500), (61, 300), (20, 20), (1, 1)])
def test_pixels_are_torchvisions(how, size):
    image = Image.fromarray(PHOTOGRAPHS[0]).resize(size)
    difference = np.abs(how(image).astype(int) - torchvision(image, how))
    # PIL filters rows or columns first, whichever is cheaper: for the crop alone that may be the other one, and the bytes
    # in between round differently.
    assert difference.max() <= 1
    assert difference.mean() < 0.25


def test_one_many_paths_arrays_and_pil_images_give_the_same(predictor, folder):
    paths = [
        folder / "b.png",
        str(folder / "b.png"),
        Image.open(folder / "b.png"),
        np.asarray(Image.open(folder / "b.png")),
    ]
    (first, *others) = predictor(paths).probabilities
    for other in others:
        np.testing.assert_array_equal(other, first)
    for path in paths:
        np.testing.assert_allclose(predictor(path).probabilities, first[None], rtol=1e-5)


def test_probabilities_are_those_of_the_bare_network(predictor, folder):
    paths = sorted(folder.glob("*.*"))
    result = predictor(paths)
    pixels = np.stack([SMALL(path) for path in paths])
    logits = predictor.model.apply(predictor.variables, normalize(pixels, SMALL.mean, SMALL.std))
    np.testing.assert_allclose(result.probabilities, jax.nn.softmax(logits), rtol=1e-5)
    (name, probability), second = result.top(2)[0]
    assert name == NAMES[int(logits[0].argmax())]
    assert probability == pytest.approx(float(jax.nn.softmax(logits[0]).max()), rel=1e-5)
    assert probability >= second[1]


def test_few_sizes_are_compiled_for_many_counts(predictor):
    images = np.zeros((9, 8, 8, 3), np.uint8)
    for count in range(10):
        assert predictor(images[:count]).probabilities.shape == (count, 7)
    assert predictor._apply._cache_size() <= 3  # 1, 2 and 4 images


def test_the_order_stays_and_bad_images_are_named_in_their_place(predictor, folder):
    (folder / "text.jpg").write_text("no image")
    (folder / "cut.jpg").write_bytes((folder / "a.jpg").read_bytes()[:2000])
    bad = [folder / "text.jpg", folder / "cut.jpg", folder / "gone.jpg", folder]
    good = sorted(folder.glob("[a-e].*"))
    given = [*good, bad[0], *good, bad[1], bad[2], *good, bad[3]]
    results = list(predictor.stream(iter(given)))
    assert [source for source, _ in results] == given
    expected = {path: predictor(path).probabilities[0] for path in good}
    for source, result in results:
        if source in bad:
            assert str(source) in str(result)
        else:
            np.testing.assert_allclose(result, expected[source], rtol=1e-5)
    with pytest.raises(simam_jax.UserError, match=r"text\.jpg cannot be read as an image"):
        predictor([good[0], bad[0]])


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "CMYK", "1", "I;16"])
def test_images_of_other_modes_work(mode, tmp_path):
    photograph = Image.fromarray(PHOTOGRAPHS[0])
    if mode == "I;16":
        image = Image.fromarray(np.asarray(photograph.convert("L")).astype(np.uint16) * 257)
    else:
        image = photograph.convert(mode)
    path = tmp_path / ("image.jpg" if mode == "CMYK" else "image.png")
    image.save(path)
    limit = {"CMYK": 12, "P": 16, "1": 128}.get(mode, 1)  # what the mode itself loses
    wanted = SMALL(photograph.convert("L") if mode in ("L", "LA", "I;16", "1") else photograph)
    assert np.abs(SMALL(path).astype(int) - wanted).mean() <= limit


def test_extreme_sizes_work_or_say_why_not(predictor):
    assert (
        len(predictor([np.zeros((1, 1, 3), np.uint8), Image.new("RGB", (20_000, 30)), Image.new("L", (3, 9_000))])) == 3
    )
    with pytest.raises(simam_jax.UserError, match="20000 x 10000 pixels, more than"):
        predictor(Image.new("1", (20_000, 10_000)))


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((8, 8, 3)), "must be uint8 in 0..255, got float64"),
        (np.zeros((8, 8, 5), np.uint8)[None], r"got \(8, 8, 5\)"),
        (np.zeros((8, 8, 2), np.uint8), r"got \(8, 8, 2\)"),
        (np.zeros((0, 8, 3), np.uint8), r"got \(0, 8, 3\)"),
        (np.uint8(7), r"got \(\)"),
        (None, "None is no image: give a path"),
        ([7], "7 is no image: give a path"),
    ],
)
def test_arrays_that_are_no_images_are_errors(predictor, array, message):
    with pytest.raises(simam_jax.UserError, match=message):
        predictor(array)


def test_files_of_pytorch_need_a_name_and_take_its_preprocessing(predictor, tmp_path):
    state = to_torch(predictor.variables, "cifar_resnet20")
    write_state(state, tmp_path / "weights.npz")
    with pytest.raises(simam_jax.UserError, match="give its name"):
        Predictor.load(tmp_path / "weights.npz")
    loaded = Predictor.load(tmp_path / "weights.npz", name="cifar_resnet20")
    assert loaded.preprocessing == CIFAR
    assert loaded.class_names == tuple("0123456")
    image = np.zeros((32, 32, 3), np.uint8)
    assert loaded(image).probabilities.shape == (1, 7)


def test_imagenets_class_names_are_assumed_where_they_fit_and_said(tmp_path, caplog):
    for classes in (1000, 999):
        model = simam_jax.create_model("resnet18", num_classes=classes)
        write_state(to_torch(init_variables(model, jax.random.key(0)), "resnet18"), tmp_path / f"{classes}.npz")
    with caplog.at_level("WARNING"):
        names = Predictor.load(tmp_path / "1000.npz", name="resnet18").class_names
    assert "assumed: ImageNet's 1,000" in caplog.text
    assert len(set(names)) == 1000
    # As the indices of the published networks go.
    assert [names[i] for i in (0, 207, 281, 999)] == ["tench", "golden retriever", "tabby", "toilet tissue"]
    assert Predictor.load(tmp_path / "999.npz", name="resnet18").class_names[:2] == ("0", "1")


def test_wrong_requests_are_errors(workdir, predictor):
    with pytest.raises(simam_jax.UserError, match="is of cifar_resnet20, not of resnet50"):
        Predictor.load(workdir, name="resnet50")
    with pytest.raises(simam_jax.UserError, match="2 class names for 7 classes"):
        Predictor.load(workdir, class_names=["one", "two"])
    with pytest.raises(simam_jax.UserError, match="batch_size must be at least 1"):
        Predictor.load(workdir, batch_size=0)
    with pytest.raises(simam_jax.UserError, match="no such folder"):
        Predictor.load(workdir / "nothing")
    with pytest.raises(simam_jax.UserError, match="at least 1 class"):
        predictor(np.zeros((8, 8, 3), np.uint8)).top(0)
    with pytest.raises(simam_jax.UserError, match="eval_resize=10 must be 0 or at least image_size=16"):
        Preprocessing(16, 10, SMALL.mean, SMALL.std)


def test_the_command_prints_a_table_or_json(workdir, folder, predictor, capsys):
    command = ["--checkpoint", str(workdir), str(folder / "c.jpg"), str(folder), "--top", "2"]
    assert predict.main(command) == 0
    lines = capsys.readouterr().out.splitlines()
    files = [folder / "c.jpg", *sorted(folder.rglob("*.*"))]
    assert lines[::3] == list(map(str, files))
    assert predict.main([*command, "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["image"] for row in rows] == lines[::3]
    for row, best, file in zip(rows, lines[1::3], files, strict=True):
        ((expected, second),) = predictor(file).top(2)
        assert [entry["class"] for entry in row["top"]] == [expected[0], second[0]]
        assert row["top"][0]["probability"] == pytest.approx(expected[1], rel=1e-4)
        assert best == f"  {100 * expected[1]:6.2f} %  {expected[0]}"


def test_the_command_names_and_skips_what_it_cannot_read(workdir, folder, tmp_path, capsys):
    (folder / "text.jpg").write_text("no image")
    assert predict.main(["--checkpoint", str(workdir), str(folder), "--json"]) == 1
    output = capsys.readouterr()
    assert len(output.out.splitlines()) == 5
    assert "text.jpg cannot be read as an image" in output.err
    assert "1 of 6 files could not be read" in output.err
    (tmp_path / "empty").mkdir()
    with pytest.raises(simam_jax.UserError, match="no images in the folder"):
        predict.main(["--checkpoint", str(workdir), str(tmp_path / "empty")])
    with pytest.raises(simam_jax.UserError, match="no file or folder"):
        predict.main(["--checkpoint", str(workdir), str(tmp_path / "gone.jpg")])
