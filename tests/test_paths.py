"""`~` is the home folder in every path; an address is refused wherever a path is taken, and nothing is made."""

from functools import partial

import pytest
from ml_collections import ConfigDict

import simam_jax
from configs import base
from simam_jax import UserError, convert, export, predict, visualize
from simam_jax.command_line import read_class_names
from simam_jax.data.folder import open_tree
from simam_jax.data.prepare import prepare
from simam_jax.data.tfds import open_prepared
from simam_jax.inference import Predictor
from simam_jax.paths import local
from simam_jax.preprocessing import CIFAR
from simam_jax.training.workdir import writable
from simam_jax.weights import start_from

MODEL = simam_jax.create_model("resnet18")
ADDRESS = "gs://bucket/thing"
ENTRIES = {
    "load": simam_jax.load,
    "load_torch": lambda path: simam_jax.load_torch(path, "resnet50"),
    "Predictor.load": Predictor.load,
    "an image": CIFAR,
    "workdir": writable,
    "init_from": lambda path: start_from(path, MODEL, {"model": MODEL.spec()}, {}, skip_head=False),
    "data_dir": lambda path: open_tree(ConfigDict({"data_dir": path}), "train"),
    "data_dir of TFDS": lambda path: open_prepared(ConfigDict({"name": "cifar10", "data_dir": path}), "train"),
    "class names": read_class_names,
    "tars": lambda path: prepare("imagenet2012", data_dir="", tars=path),
    "convert from": lambda path: convert.main([path, "there", "--model", "resnet50"]),
    "convert to": lambda path: convert.main(["here.npz", path, "--model", "resnet50"]),
    "predict": lambda path: predict.main(["--checkpoint", "here", path]),
    "visualize from": lambda path: visualize.main(["curves", path, "--output", "curves.png"]),
    "visualize to": lambda path: visualize.main(["curves", "here", "--output", f"{path}.png"]),
    "export to": partial(export.check, "stablehlo"),
}


@pytest.mark.parametrize("entry", ENTRIES)
def test_an_address_is_refused(entry, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        UserError, match=r"gs://bucket/thing.* is an address: name a path of this machine's file systems"
    ):
        ENTRIES[entry](ADDRESS)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("field", ["init_from", "compilation_cache_dir", "data.data_dir"])
def test_an_address_in_the_config_is_refused_before_anything_is_made(field):
    config = base.get_config()
    config.update_from_flattened_dict({field: ADDRESS})
    with pytest.raises(UserError, match=rf"--config\.{field}=gs://bucket/thing: .* is an address"):
        base.check(config)


@pytest.mark.parametrize("entry", [name for name in ENTRIES if name not in ("workdir", "tars")])
def test_the_home_folder_has_its_usual_short_name(entry, tmp_path, monkeypatch):
    home = tmp_path / "home"
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as caught:
        ENTRIES[entry]("~/thing")
    assert str(home) in str(caught.value) or entry in ("convert to", "visualize to", "visualize from")
    assert not list(tmp_path.iterdir())


def test_other_paths_stay_as_they_are():
    assert str(local("a:b/~x")) == "a:b/~x"
