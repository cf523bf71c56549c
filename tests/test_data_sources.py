"""Where images come from: every source gives the same stream of what it holds, and says plainly what it lacks."""

import io
import logging
import os
import tarfile
import time

import numpy as np
import pytest
from batches import eval_batches, train_batches
from PIL import Image

from configs import base
from simam_jax.classification.task import open_data
from simam_jax.errors import UserError


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
    batch = next(train_batches(config, seed=0, start_step=0, global_batch_size=num_examples))
    return sorted(zip(batch["image"][:, 5, 5, 0].tolist(), batch["label"].tolist(), strict=True))


def test_digits_are_prepared_on_first_use_with_a_fixed_stratified_split(tmp_path):
    config = data_config(source="digits", eval_split="test", data_dir=str(tmp_path))
    train, test = open_data(config)
    assert (train.num_examples, test.num_examples) == (1437, 360)
    assert train.class_names == tuple("0123456789")
    (batch,) = eval_batches(config, global_batch_size=360)
    assert np.bincount(batch["label"]).tolist() == [36] * 10
    assert batch["image"].shape == (360, 32, 32, 3)
    assert np.ptp(batch["image"], axis=-1).max() == 0  # grey
    assert batch["image"].max() == 255


def test_synthetic_images_need_no_files():
    config = data_config(source="synthetic")
    batch = next(train_batches(config, seed=0, start_step=3, global_batch_size=8))
    assert batch["image"].shape == (8, 32, 32, 3)
    assert batch["image"].std() > 60
    assert len(open_data(config)[0].class_names) == 1000


def test_folder_reads_the_classic_tree(tmp_path):
    make_folder(tmp_path, ["cat", "dog"])
    config = data_config(source="folder", data_dir=str(tmp_path), eval_split="val")
    train, val = open_data(config)
    assert (train.num_examples, val.num_examples, train.class_names) == (6, 6, ("cat", "dog"))
    assert shown(config, 6) == [(0, 0), (10, 0), (20, 0), (30, 1), (40, 1), (50, 1)]


def test_what_lies_in_real_folders_is_an_image_or_said_to_be_left_out(tmp_path, caplog):
    """Hidden files and folders, sub-folders, a folder called x.jpg, names that are not UTF-8, WebP, and other kinds."""
    make_folder(tmp_path, ["cat", "dog"], per_class=1)
    cats = tmp_path / "train" / "cat"
    for hidden in (".ipynb_checkpoints", ".git"):
        for place in (tmp_path / "train", cats):
            (place / hidden).mkdir()
            (place / hidden / "copy.png").write_bytes(encode(np.full((9, 9, 3), 99)))
    (cats / "._0.png").write_bytes(b"a Macintosh's own notes")
    (cats / "x.jpg" / "below").mkdir(parents=True)
    (cats / "x.jpg" / "below" / "deep.png").write_bytes(encode(np.full((9, 9, 3), 120)))
    with open(os.path.join(os.fsencode(cats), b"caf\xe9.PNG"), "wb") as file:
        file.write(encode(np.full((9, 9, 3), 130)))
    with Image.fromarray(np.full((9, 9, 3), 140, np.uint8)) as image:
        image.save(cats / "photo.webp", lossless=True)
    for name in ("a.tif", "b.tif", "notes.txt"):
        (cats / name).write_bytes(b"of another kind")
    config = data_config(source="folder", data_dir=str(tmp_path), eval_split="val")
    with caplog.at_level(logging.WARNING):
        assert shown(config, 5) == [(0, 0), (10, 1), (120, 0), (130, 0), (140, 0)]
    assert "left out: 2 .tif, 1 .txt." in caplog.text


def test_folder_index_notices_files_that_come_with_the_folder_s_time_kept(tmp_path):
    make_folder(tmp_path / "tree", ["cat"])
    cats = tmp_path / "tree" / "train" / "cat"
    config = data_config(source="folder", data_dir=str(tmp_path / "tree"), eval_split="val")
    before = shown(config, 3)
    time.sleep(2.1)  # until the folders have settled
    assert shown(config, 3) == before
    state = os.stat(cats)
    (cats / "new.png").write_bytes(encode(np.full((9, 9, 3), 200)))
    os.utime(cats, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert shown(config, 4) == [*before, (200, 0)]


def test_folder_index_is_kept_until_the_tree_changes(tmp_path, monkeypatch):
    make_folder(tmp_path / "tree", ["cat", "dog"])
    config = data_config(source="folder", data_dir=str(tmp_path / "tree"), eval_split="val")
    time.sleep(2.1)  # until the folders have settled
    before = shown(config, 6)

    listed, scandir = [], os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: listed.append(path) or scandir(path))
    assert shown(config, 6) == before
    assert not listed
    (tmp_path / "tree" / "train" / "dog" / "new.png").write_bytes(encode(np.full((9, 9, 3), 200)))
    assert shown(config, 7) == [*before, (200, 1)]


def test_folder_index_survives_a_broken_cache_and_an_unwritable_one(tmp_path, monkeypatch):
    make_folder(tmp_path / "tree", ["cat"])
    time.sleep(2.1)  # until the folders have settled
    config = data_config(source="folder", data_dir=str(tmp_path / "tree"), eval_split="val")
    before = shown(config, 3)
    (cache,) = (tmp_path / "cache").rglob("tree-*.npz")
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
    train, validation = open_data(config)
    assert (train.num_examples, validation.num_examples, len(train.class_names)) == (9, 4, 1000)
    expected = [(60 * c + 20 * i, label) for c, label in enumerate((0, 1, 999)) for i in range(3)]
    assert shown(config, 9) == expected
    (batch,) = eval_batches(config, global_batch_size=4)
    assert sorted(batch["image"][:, 5, 5, 0].tolist()) == [50, 100, 150, 200]


def test_a_part_of_a_tfds_split(imagenet):
    config = data_config(source="tfds", name="imagenet2012", data_dir=imagenet, train_split="train[3:8]")
    assert open_data(config)[0].num_examples == 5
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
        open_data(data_config(**{"data_dir": place, "eval_split": "test", **fields}))
