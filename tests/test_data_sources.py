"""Where images come from: every source gives the same stream of what it holds, and says plainly what it lacks."""

import io
import os
import tarfile
import time

import numpy as np
import pytest
from PIL import Image

from configs import base
from simam_jax import data
from simam_jax.errors import UserError

DAY_NS = 24 * 3600 * 10**9


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def data_config(**fields):
    config = base.get_config().data
    with config.unlocked():
        config.update(image_size=32, eval_resize=0, augmentation="none", flip=False, **fields)
    return config


def encode(pixels, form="PNG"):
    buffer = io.BytesIO()
    Image.fromarray(np.asarray(pixels, np.uint8)).save(buffer, form)
    return buffer.getvalue()


def make_folder(root, classes, per_class=3):
    """Plain colours: the red value says which image it is."""
    for split in ("train", "val"):
        for c, name in enumerate(classes):
            (root / split / name).mkdir(parents=True)
            for i in range(per_class):
                image = encode(np.full((10, 12, 3), 10 * (c * per_class + i)))
                (root / split / name / f"{i}.png").write_bytes(image)


def shown(config, num_examples):
    """One epoch as a sorted list of (red value, label)."""
    batch = next(data.train_batches(config, seed=0, start_step=0, global_batch_size=num_examples))
    return sorted(zip(batch["image"][:, 5, 5, 0].tolist(), batch["label"].tolist(), strict=True))


def test_digits_are_prepared_on_first_use_with_a_fixed_stratified_split(tmp_path):
    config = data_config(source="digits", eval_split="test", data_dir=str(tmp_path))
    info = data.describe(config)
    assert (info.num_train, info.num_eval, info.num_classes) == (1437, 360, 10)
    assert info.class_names == tuple("0123456789")
    (batch,) = data.eval_batches(config, global_batch_size=360)
    assert np.bincount(batch["label"]).tolist() == [36] * 10
    assert batch["image"].shape == (360, 32, 32, 3)
    assert np.ptp(batch["image"], axis=-1).max() == 0  # grey
    assert batch["image"].max() == 255


def test_synthetic_images_need_no_files():
    config = data_config(source="synthetic")
    batch = next(data.train_batches(config, seed=0, start_step=3, global_batch_size=8))
    assert batch["image"].shape == (8, 32, 32, 3)
    assert batch["image"].std() > 60
    assert data.describe(config).num_classes == 1000


def test_folder_reads_the_classic_tree(tmp_path):
    make_folder(tmp_path, ["cat", "dog"])
    (tmp_path / "train" / "cat" / "notes.txt").write_text("no image")
    config = data_config(source="folder", data_dir=str(tmp_path), eval_split="val")
    assert data.describe(config) == data.DatasetInfo(6, 6, 2, ("cat", "dog"))
    assert shown(config, 6) == [(0, 0), (10, 0), (20, 0), (30, 1), (40, 1), (50, 1)]


def test_folder_index_is_kept_until_the_tree_changes(tmp_path, monkeypatch):
    make_folder(tmp_path / "tree", ["cat", "dog"])
    past = time.time_ns() - DAY_NS
    for name in ("cat", "dog"):
        os.utime(tmp_path / "tree" / "train" / name, ns=(past, past))
    config = data_config(source="folder", data_dir=str(tmp_path / "tree"), eval_split="val")
    before = shown(config, 6)

    listed, scandir = [], os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: listed.append(os.path.basename(path)) or scandir(path))
    assert shown(config, 6) == before
    assert listed == ["train"]  # the classes are looked at, not the files in them

    (tmp_path / "tree" / "train" / "dog" / "new.png").write_bytes(encode(np.full((9, 9, 3), 200)))
    assert shown(config, 7) == [*before, (200, 1)]


def test_folder_index_survives_a_broken_cache_and_an_unwritable_one(tmp_path, monkeypatch):
    make_folder(tmp_path / "tree", ["cat"])
    past = time.time_ns() - DAY_NS
    os.utime(tmp_path / "tree" / "train" / "cat", ns=(past, past))
    config = data_config(source="folder", data_dir=str(tmp_path / "tree"), eval_split="val")
    before = shown(config, 3)
    (cache,) = (tmp_path / "cache").rglob("folder-*.npz")
    cache.write_bytes(cache.read_bytes()[:40])
    assert shown(config, 3) == before
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/no_such_place")
    assert shown(config, 3) == before


def tar_of(files):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory):
    """A miniature imagenet2012, made by TFDS's own builder from tar files like the real ones."""
    from simam_jax.data.prepare import prepare

    root = tmp_path_factory.mktemp("imagenet")
    (root / "tars").mkdir()
    synsets = ["n01440764", "n01443537", "n15075141"]
    train = {
        f"{synset}.tar": tar_of({f"{synset}_{i}.JPEG": encode(np.full((40, 50, 3), 60 * c + 20 * i), "JPEG")
                                 for i in range(3)})
        for c, synset in enumerate(synsets)
    }  # fmt: skip
    val = {f"ILSVRC2012_val_{i:08d}.JPEG": encode(np.full((50, 40, 3), 50 * i), "JPEG") for i in range(1, 5)}
    (root / "tars" / "ILSVRC2012_img_train.tar").write_bytes(tar_of(train))
    (root / "tars" / "ILSVRC2012_img_val.tar").write_bytes(tar_of(val))
    prepare("imagenet2012", data_dir=str(root / "data"), tars=str(root / "tars"))
    return str(root / "data")


def test_imagenet2012_from_its_tar_files(imagenet):
    config = data_config(source="tfds", name="imagenet2012:5.*.*", data_dir=imagenet)
    info = data.describe(config)
    assert (info.num_train, info.num_eval, info.num_classes) == (9, 4, 1000)
    expected = [(60 * c + 20 * i, label) for c, label in enumerate((0, 1, 999)) for i in range(3)]
    assert shown(config, 9) == expected
    (batch,) = data.eval_batches(config, global_batch_size=4)
    assert sorted(batch["image"][:, 5, 5, 0].tolist()) == [50, 100, 150, 200]


def test_a_part_of_a_tfds_split(imagenet):
    config = data_config(source="tfds", name="imagenet2012", data_dir=imagenet, train_split="train[3:8]")
    assert data.describe(config).num_train == 5
    whole = data_config(source="tfds", name="imagenet2012", data_dir=imagenet)
    part = shown(config, 5)
    assert len(set(part)) == 5
    assert set(part) < set(shown(whole, 9))


def test_prepare_twice_does_nothing_and_names_the_place(imagenet, capsys):
    from simam_jax.data.prepare import prepare

    assert prepare("imagenet2012", data_dir=imagenet).startswith(imagenet)
    assert capsys.readouterr().out == ""


def test_prepare_says_which_tar_files_are_missing(tmp_path):
    from simam_jax.data.prepare import prepare

    (tmp_path / "ILSVRC2012_img_val.tar").write_bytes(b"")
    with pytest.raises(UserError, match=r"^ILSVRC2012_img_train\.tar not found in .*--tars"):
        prepare("imagenet2012", data_dir=str(tmp_path), tars=str(tmp_path))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"source": "tdfs"}, "Did you mean 'tfds'"),
        ({"source": "tfds", "name": "imagnet2012"}, "Did you mean 'imagenet2012'"),
        ({"source": "tfds", "name": "cifar10"}, r"python -m simam_jax\.data\.prepare cifar10 --data_dir"),
        ({"source": "tfds", "name": "imagenet2012:77.0.0"}, "77.0.0"),
        ({"source": "tfds", "name": "imagenet2012", "train_split": "trian"}, "Did you mean 'train'"),
        ({"source": "folder", "data_dir": ""}, "needs config.data.data_dir"),
        ({"source": "folder", "train_split": "trian"}, "folder .*trian"),
        ({"source": "digits", "train_split": "trian"}, "Did you mean 'train'"),
        ({"source": "synthetic", "train_split": "trian"}, "Did you mean 'train'"),
    ],
)
def test_what_cannot_be_opened_is_named_with_the_way_out(fields, message, imagenet, tmp_path):
    place = imagenet if fields.get("name") == "imagenet2012" else str(tmp_path)
    with pytest.raises(UserError, match=message):
        data.describe(data_config(**{"data_dir": place, "eval_split": "test", **fields}))
