"""What the documentation shows is run: every Python block, every command; the site is built."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import textwrap

import jax
import numpy as np
import pytest
from PIL import Image
from processes import ROOT
from sklearn.datasets import load_sample_images

import simam_jax
from benchmarks.report import BEGIN, END, PAGES, updated
from simam_jax import checkpoints, video
from simam_jax.models import variable_shapes
from simam_jax.torch_weights.files import write_state
from simam_jax.torch_weights.names import to_torch

DOCUMENTS = {path.name: path.read_text() for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))}


def blocks(text: str, language: str) -> list[str]:
    """The fenced blocks, also those indented under a tab."""
    found = re.findall(rf"^( *)```{language}\n(.*?)^ *```$", text, re.DOTALL | re.MULTILINE)
    return [textwrap.dedent(block) for _, block in found]


# Each once, in the order of the pages.
COMMANDS = list(
    dict.fromkeys(line for text in DOCUMENTS.values() for block in blocks(text, "bash") for line in block.splitlines())
)
SET_UP = [line for line in COMMANDS if "python3 -m venv" in line]  # the tests themselves run in what these make


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with what the README speaks of: trained networks, a PyTorch file, photographs."""
    folder = tmp_path_factory.mktemp("readme")
    for workdir, name, classes in (
        ("digits", "cifar_resnet20", 10),
        ("digits_none", "cifar_resnet20", 10),
        ("resnet50_imagenet", "resnet50", 1000),
    ):
        attention = "none" if workdir.endswith("none") else "simam"
        model = simam_jax.create_model(name, num_classes=classes, attention=attention)
        random = np.random.default_rng(0)
        variables = jax.tree.map(
            lambda leaf, r=random: 0.05 * np.abs(r.standard_normal(leaf.shape, np.float32)), variable_shapes(model)
        )
        spec = {
            "name": name,
            "num_classes": classes,
            "attention": attention,
            "attention_param": model.attention_param,
            "dtype": "float32",
        }
        checkpoints.write_weights(folder / "runs" / workdir, {"task": "classification", "model": spec}, variables)
        rows = [{"step": k, "epoch": k, "train/top1": k / 9, "eval/top1": k / 10} for k in range(1, 9)]
        (folder / "runs" / workdir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name in ("resnet50_simam.pth.tar", "resnet50_plain.pth"):
        write_state(to_torch(variables, "resnet50"), folder / name)
    (folder / "photos").mkdir()
    for name, photograph in zip(("cat.jpg", "dog.jpg"), load_sample_images().images, strict=True):
        for target in (folder / name, folder / "photos" / name):
            Image.fromarray(photograph).save(target)
    for name in ("digit.jpg", "scene.jpg"):
        shutil.copy(folder / "cat.jpg", folder / name)
    _write_detectors(folder)
    return folder


def _write_detectors(folder):
    """runs/scenes, runs/coco, own.json with an object in one of the photographs, and a short video."""
    for workdir, num_classes in (("scenes", 10), ("coco", 80)):
        detector = simam_jax.create_model("mask_rcnn_tiny_fpn", num_classes=num_classes)
        variables = simam_jax.init_variables(detector, jax.random.key(0))
        how = {"min_size": 128, "max_size": 224, "mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
        spec = {"task": "detection", "model": detector.spec(), "preprocessing": how}
        checkpoints.write_weights(folder / "runs" / workdir, spec, variables)
    images = [
        {"id": i, "file_name": name, "height": 427, "width": 640} for i, name in enumerate(("cat.jpg", "dog.jpg"))
    ]
    box = {"id": 1, "image_id": 0, "category_id": 3, "bbox": [9, 9, 90, 90], "area": 8100, "iscrowd": 0}
    own = {"images": images, "annotations": [box], "categories": [{"id": i, "name": str(i)} for i in range(10)]}
    (folder / "own.json").write_text(json.dumps(own))
    rows = [{"step": k, "epoch": k, "eval/bbox_AP": k / 20, "eval/segm_AP": k / 25} for k in range(1, 9)]
    (folder / "runs" / "scenes" / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with video.written(folder / "street.mp4", rate=25) as write:
        for _ in range(6):
            write(load_sample_images().images[0][:128, :192])


def test_the_readme_is_short():
    assert len(DOCUMENTS["README.md"].splitlines()) <= 130


def test_links_between_the_pages_lead_somewhere():
    for name, text in DOCUMENTS.items():
        folder = ROOT if name == "README.md" else ROOT / "docs"
        # The badge of CI is relative to the repository's own address.
        for target in re.findall(r"\]\((?!http|\.\./\.\./actions/)([^)#\s]+)", text):
            assert (folder / target).exists(), f"{name}: {target}"


@pytest.mark.parametrize("page", PAGES)
def test_the_tables_of_speed_are_those_of_the_results(page):
    text = (ROOT / page).read_text()
    assert BEGIN in text
    assert END in text
    assert updated(text, PAGES[page]) == text


@pytest.mark.slow
def test_the_site_is_built_without_a_warning(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    page = (tmp_path / "api" / "index.html").read_text()
    assert "Eq. 5 and 6" in page
    assert "simam_jax.training" not in page  # internals are no API
    assert "<math" in (tmp_path / "mathematics" / "index.html").read_text()


@pytest.mark.parametrize("page", ["mathematics.md"])
def test_the_python_of_a_page_runs(page):
    run_python(page)


@pytest.mark.slow
@pytest.mark.parametrize("page", sorted(DOCUMENTS.keys() - {"mathematics.md"}))
def test_the_python_of_a_page_with_networks_runs(page, place, monkeypatch):
    monkeypatch.chdir(place)
    run_python(page)


def run_python(page: str) -> None:
    names: dict = {}
    for block in blocks(DOCUMENTS[page], "python"):
        exec(block, names)


@pytest.mark.slow
def test_the_commands_run_one_after_the_other(place):
    for command in COMMANDS:
        if not command.startswith("python -m "):
            continue
        module, *arguments = shlex.split(command)[2:]
        # The first needs the data sets, the second goes on until Ctrl-C, benchmarks take minutes.
        if module in ("simam_jax.data.prepare", "simam_jax.demo") or module.startswith("benchmarks."):
            arguments = ["--help"]
        result = subprocess.run(
            [sys.executable, "-m", module, *arguments],
            cwd=place,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert result.returncode == 0, f"{command}\n{result.stderr}"


UNDERSTOOD = """if True:
    import json
    from absl import app
    import train
    from configs import base

    def show(_):
        base.check(train.CONFIG.value)
        print(json.dumps({"workdir": train.WORKDIR.value, "mode": train.MODE.value, "config": train.CONFIG.value.to_dict()}))

    app.run(show, flags_parser=train.parse)
"""


@pytest.mark.parametrize("command", [line for line in COMMANDS if "train.py" in line and line not in SET_UP])
def test_the_training_commands_are_understood(command):
    """By train.py's own flags, up to where it would open the data: every value given is the value that arrives."""
    words = shlex.split(command)
    arguments = words[words.index("train.py") + 1 :]
    result = subprocess.run(
        [sys.executable, "-c", UNDERSTOOD, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    understood = json.loads(result.stdout)
    given = {
        arguments[i]: arguments[i + 1] for i, word in enumerate(arguments) if word.startswith("--") and "=" not in word
    }
    assert understood["workdir"] == given["--workdir"]
    assert understood["mode"] == given.get("--mode", "train")
    recipe, _, choice = given["--config"].partition(":")
    assert (ROOT / recipe).is_file()
    chosen = dict(part.split("=") for part in choice.split(",") if part)
    assert understood["config"]["model"]["attention"] == chosen.get("attention", "simam")
    for name, value in re.findall(r"^--config\.([\w.]+)=(.+)$", "\n".join(arguments), re.MULTILINE):
        found = understood["config"]
        for part in name.split("."):
            found = found[part]
        found = f"({','.join(map(str, found))})" if isinstance(found, list) else str(found)
        assert found in (value, f"{value}.0"), name
