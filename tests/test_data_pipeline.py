"""The promises of the stream: order, resume, hosts, evaluation, unreadable files."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from batches import eval_batches, train_batches
from PIL import Image

from configs import base
from simam_jax import data
from simam_jax.data.tensorflow_cpu import tf
from simam_jax.errors import UserError

NUM_IMAGES = 23  # prime: no batch divides it


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A folder of small noisy JPEGs; labels tell the halves apart."""
    root = tmp_path_factory.mktemp("tree")
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for i in range(NUM_IMAGES):
            folder = root / split / f"class{i % 2}"
            folder.mkdir(parents=True, exist_ok=True)
            shape = (rng.integers(40, 90), rng.integers(40, 90), 3)
            Image.fromarray(rng.integers(0, 256, shape, np.uint8)).save(folder / f"{i:03d}.jpg", quality=90)
    return root


def data_config(tree, **fields):
    config = base.get_config().data
    with config.unlocked():
        config.update(source="folder", data_dir=str(tree), eval_split="val", image_size=32, eval_resize=40)
        config.update(fields)
    return config


def take(stream, count):
    return [next(stream) for _ in range(count)]


def train(config, *, start_step=0, batch=5, **kwargs):
    return train_batches(config, seed=3, start_step=start_step, global_batch_size=batch, **kwargs)


def assert_equal(batches, others):
    for batch, other in zip(batches, others, strict=True):
        assert batch.keys() == other.keys()
        for name in batch:
            np.testing.assert_array_equal(batch[name], other[name])


def digest(batches):
    return hashlib.sha256(b"".join(batch[name].tobytes() for batch in batches for name in sorted(batch))).hexdigest()


def undrawn(tree):
    """What each training image looks like when nothing is drawn, to find it again in a batch."""
    config = data_config(tree, augmentation="none", flip=False, image_size=8, eval_resize=0)
    return config, lambda batches: [image.tobytes() for batch in batches for image in batch["image"]]


def test_batches_have_the_promised_form(tree):
    (batch,) = take(train(data_config(tree)), 1)
    assert (batch["image"].shape, batch["image"].dtype) == ((5, 32, 32, 3), np.uint8)
    assert (batch["label"].shape, batch["label"].dtype) == ((5,), np.int32)
    assert batch.keys() == {"image", "label"}


def test_every_epoch_shows_every_example_once_in_another_order_and_drops_none(tree):
    config, names = undrawn(tree)
    flat = names(take(train(config), NUM_IMAGES))  # 23 batches of 5: five epochs, borders inside batches
    epochs = [flat[e * NUM_IMAGES : (e + 1) * NUM_IMAGES] for e in range(5)]
    assert all(len(set(epoch)) == NUM_IMAGES for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 5


def test_the_order_does_not_depend_on_the_batch_size(tree):
    config, names = undrawn(tree)
    by_five, by_seven = (names(take(train(config, batch=n), 35 // n)) for n in (5, 7))
    assert by_five == by_seven


def test_another_seed_gives_another_order_and_other_pixels(tree):
    config = data_config(tree)
    streams = [train_batches(config, seed=s, start_step=0, global_batch_size=NUM_IMAGES) for s in (0, 1, 0)]
    first, second, again = (next(stream) for stream in streams)
    assert digest([first]) == digest([again])
    assert not np.array_equal(first["label"], second["label"])


def test_an_example_is_augmented_anew_in_each_epoch(tree):
    stream = train(data_config(tree), batch=NUM_IMAGES)
    first, second = ({image.tobytes() for image in batch["image"]} for batch in take(stream, 2))
    assert not first & second


def test_resume_is_bit_identical(tree):
    config = data_config(tree, randaugment_layers=1, random_erasing=0.5)
    whole = take(train(config), 12)
    for start_step in (1, 4, 11):  # mid-epoch, in the batch that the first epoch's end cuts, epochs later
        assert_equal(whole[start_step:], take(train(config, start_step=start_step), 12 - start_step))


def test_resume_does_not_touch_what_was_skipped(tree, tmp_path):
    """All files of the skipped part are destroyed: a stream that decoded any of them would fail (the limit is 0)."""
    config, names = undrawn(tree)
    first_epoch = take(train(config, batch=1), NUM_IMAGES)
    skipped = set(names(first_epoch[:20]))
    broken = tmp_path / "broken"
    for split in ("train", "val"):
        for file in (tree / split).rglob("*.jpg"):
            copy = broken / file.relative_to(tree)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(file.read_bytes())
    files = sorted((broken / "train").rglob("*.jpg"))
    in_order = eval_batches(data_config(tree, **{**config, "eval_split": "train"}), global_batch_size=NUM_IMAGES)
    for file, name in zip(files, names(in_order), strict=True):
        if name in skipped:
            file.write_bytes(b"")
    config = data_config(broken, **{**config, "data_dir": str(broken), "max_unreadable": 0.0})
    assert_equal(first_epoch[20:], take(train(config, batch=1, start_step=20), 3))
    with pytest.raises(UserError, match="Cannot read"):
        take(train(config, batch=1, start_step=19), 1)


def test_a_far_step_starts_at_once(tree):
    (batch,) = take(train(data_config(tree), start_step=10**9), 1)
    assert batch["image"].shape == (5, 32, 32, 3)


def test_threads_do_not_matter(tree):
    """A process bound to one core, with one thread everywhere, gives the bytes of this one. (It also ends by itself,
    though it leaves an endless stream open.)"""
    config = data_config(tree, randaugment_layers=1, random_erasing=0.5)
    script = f"""
import os, sys
os.sched_setaffinity(0, {{min(os.sched_getaffinity(0))}})
sys.path[:0] = {[str(Path(__file__).parent), str(Path(__file__).parent.parent)]!r}
import tensorflow as tf
tf.config.threading.set_inter_op_parallelism_threads(1)
tf.config.threading.set_intra_op_parallelism_threads(1)
import test_data_pipeline as t
config = t.data_config({str(tree)!r}, randaugment_layers=1, random_erasing=0.5)
stream = t.train(config)
print(t.digest(t.take(stream, 12)), t.digest(t.eval_batches(config, global_batch_size=5)))
"""
    alone = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False)
    here = [digest(take(train(config), 12)), digest(eval_batches(config, global_batch_size=5))]
    assert alone.stdout.split() == here, alone.stderr


def test_two_hosts_share_the_stream_of_one(tree):
    config = data_config(tree)
    whole = take(train(config, batch=6, start_step=2, process_index=0, process_count=1), 8)
    hosts = [take(train(config, batch=6, start_step=2, process_index=h, process_count=2), 8) for h in (0, 1)]
    joined = [{name: np.concatenate([a[name], b[name]]) for name in a} for a, b in zip(*hosts, strict=True)]
    assert_equal(whole, joined)


@pytest.mark.parametrize(("batch", "process_count"), [(4, 1), (22, 2), (46, 2), (64, 1)])
def test_evaluation_sees_every_example_once(tree, batch, process_count):
    config, names = undrawn(tree)
    hosts = [
        list(eval_batches(config, global_batch_size=batch, process_index=h, process_count=process_count))
        for h in range(process_count)
    ]
    assert len({len(batches) for batches in hosts}) == 1
    assert {len(b["image"]) for batches in hosts for b in batches} == {batch // process_count}
    rows = [
        (name, real) for batches in hosts for b in batches for name, real in zip(names([b]), b["mask"], strict=True)
    ]
    real = [name for name, mask in rows if mask]
    assert len(real) == len(set(real)) == NUM_IMAGES


@pytest.fixture
def damaged(tree, tmp_path):
    """The tree with one file cut short and one that is text, of 23, and where they are."""
    for split in ("train", "val"):
        for file in sorted((tree / split).rglob("*.jpg")):
            copy = tmp_path / file.relative_to(tree)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(file.read_bytes())
    short, text = tmp_path / "train/class0/004.jpg", tmp_path / "train/class1/007.jpg"
    short.write_bytes(short.read_bytes()[:200])
    text.write_text("this is no image")
    return tmp_path, short, text


def test_unreadable_files_are_named_and_replaced_the_same_way_every_time(damaged, caplog):
    root, short, text = damaged
    config, names = undrawn(root)
    with config.unlocked():
        config.max_unreadable = 0.1
    with caplog.at_level("WARNING"):
        epochs = take(train(config, batch=NUM_IMAGES), 2)
    warnings = [record.getMessage() for record in caplog.records if "Cannot read" in record.getMessage()]
    assert len(warnings) == 2  # once each, though both were met twice
    assert all(any(str(file) in warning for warning in warnings) for file in (short, text))
    assert [len(set(names([epoch]))) for epoch in epochs] == [NUM_IMAGES - 2] * 2
    assert_equal(epochs[1:], take(train(config, batch=NUM_IMAGES, start_step=1), 1))
    assert names(take(train(config, batch=12), 2))[:NUM_IMAGES] == names(epochs[:1])


def test_too_many_unreadable_files_stop_the_run(damaged):
    root, _, _ = damaged
    config = data_config(root, max_unreadable=0.05)  # one of 23 is allowed
    with pytest.raises(UserError, match=r"2 of 23 .* config\.data\.max_unreadable=0\.05"):
        take(train(config, batch=NUM_IMAGES), 1)


def test_an_unreadable_file_stops_an_evaluation(damaged):
    root, short, _ = damaged
    with pytest.raises(UserError, match=str(short)):
        list(eval_batches(data_config(root, eval_split="train"), global_batch_size=4))


def test_what_is_wrong_with_a_file_is_said_without_where_tensorflow_noticed(damaged, caplog):
    root, _, _ = damaged
    Image.new("F", (9, 9)).save(root / "train" / "class0" / "floating.tif")
    (root / "train" / "class0" / "floating.tif").rename(root / "train" / "class0" / "floating.png")
    with caplog.at_level("WARNING"):
        take(train(data_config(root, max_unreadable=0.2), batch=NUM_IMAGES + 1), 1)
    warnings = "\n".join(record.getMessage() for record in caplog.records)
    assert "Graph execution error" not in warnings
    assert "Traceback" not in warnings
    assert "of a kind that PIL does not know" in warnings
    assert "has floating-point values: save it with 8 or 16 bits a value." in warnings


def test_thousands_of_unreadable_neighbours_are_no_recursion():
    def read(index):
        return {"image": tf.debugging.check_numerics(1 / tf.cast(tf.maximum(index - 2999, 0), tf.float32), "rotten")}

    records = data.Records(3001, (), read, str)
    batches = data.train_batches(
        records, lambda record, _key: record, seed=0, start_step=0, batch_size=3, max_unreadable=1.0
    )
    assert next(batches)["image"].tolist() == [1.0, 1.0, 1.0]  # the only one that can be read


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"augmentation": "random_crop"}, "Did you mean"),
        ({"resize": "exakt"}, "Did you mean 'exact'"),
        ({"eval_resize": 16, "augmentation": "pad_crop"}, "eval_resize=16 is smaller"),
        ({"randaugment_magnitude": 31.0}, r"outside 0\.\.30"),
    ],
)
def test_settings_that_mean_nothing_are_errors(tree, fields, message):
    with pytest.raises(UserError, match=message):
        next(train(data_config(tree, **fields)))


def test_a_batch_that_hosts_cannot_share_is_an_error(tree):
    with pytest.raises(UserError, match="5 images cannot be divided among 2 hosts"):
        train(data_config(tree), batch=5, process_index=0, process_count=2)


def test_the_package_is_light():
    script = "import sys, simam_jax.data, simam_jax.ops.images; sys.exit('tensorflow' in sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True, cwd=Path(__file__).parent.parent, env=dict(os.environ))
