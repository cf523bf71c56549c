"""Videos: read frame by frame, looked at by `predict`, written with a detector's objects."""

import json

import cv2
import jax
import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_sample_images

from simam_jax import DetectionPreprocessing, Predictor, UserError, create_model, predict, video
from simam_jax.command_line import find_images
from simam_jax.models import init_variables

pytestmark = pytest.mark.usefixtures("quickly_compiled")

TEMPLE = load_sample_images().images[0]
LEVELS = [40, 80, 120, 160, 200]  # of the red in each frame


@pytest.fixture
def clip(tmp_path):
    """Five frames of 64 x 48 pixels, ten a second, each of its own red."""
    with video.written(tmp_path / "clip.mp4", 10) as add:
        for level in LEVELS:
            add(np.full((48, 64, 3), (level, 0, 0), np.uint8))
    return tmp_path / "clip.mp4"


def reds(frames):
    return [round(float(frame[..., 0].mean()) / 40) * 40 for frame in frames]


def test_a_video_comes_back_frame_by_frame(clip):
    assert video.about(clip) == (10, 5)
    frames = list(video.frames(clip))
    assert {(frame.shape, frame.dtype.name) for frame in frames} == {((48, 64, 3), "uint8")}
    assert max(frame[..., 1:].max() for frame in frames) < 30
    assert reds(frames) == LEVELS
    assert reds(video.frames(clip, every=2)) == LEVELS[::2]
    assert [path.name for path in clip.parent.iterdir()] == ["clip.mp4"]


def test_a_video_is_written_whole_or_not_at_all(clip):
    before = clip.read_bytes()

    def write(path, *sizes):
        with video.written(path, 5) as add:
            for size in sizes:
                add(np.zeros((*size, 3), np.uint8))

    with pytest.raises(UserError, match=r"has frames of \(48, 64\) .* the next one is \(48, 66\)"):
        write(clip, (49, 65), (48, 66))  # of which the first are made even
    with pytest.raises(UserError, match="cannot be written"):
        write(clip / "other.mp4", (48, 64))
    write(clip)  # no frame, no video
    assert clip.read_bytes() == before
    assert [path.name for path in clip.parent.iterdir()] == ["clip.mp4"]


def test_a_video_that_ends_too_early_says_so(clip, caplog):
    cut = clip.with_name("cut.avi")
    writer = cv2.VideoWriter(str(cut), cv2.VideoWriter.fourcc(*"MJPG"), 10, (64, 48))
    for _ in range(50):
        writer.write(TEMPLE[:48, :64])
    writer.release()
    cut.write_bytes(cut.read_bytes()[: cut.stat().st_size // 2])
    count = len(list(video.frames(cut)))
    assert 10 < count < 40
    assert f"cut.avi ends after {count} of the 50 frames that it names" in caplog.text


def test_frames_are_looked_at_in_natural_order(tmp_path):
    for name in ("frame10.png", "frame2.png", "frame1.png", "b/1.mp4", "a10/x.png", "a9/x.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    names = ["a9/x.png", "a10/x.png", "frame1.png", "frame2.png", "frame10.png"]
    assert find_images([str(tmp_path)]) == [tmp_path / name for name in names]
    assert find_images([str(tmp_path / "frame*")]) == [tmp_path / name for name in names[2:]]


@pytest.fixture(scope="module")
def detector():
    """A detector that finds things: its scores are spread."""
    model = create_model("faster_rcnn_tiny_fpn", num_classes=3)
    variables = init_variables(model, jax.random.key(0))
    for head, layer in (("rpn_head", "rpn_cls"), ("bbox_head", "fc_cls"), ("bbox_head", "fc_reg")):
        variables["params"][head][layer]["kernel"] *= 30
    return Predictor(model, variables, DetectionPreprocessing(64, 96), ["cat", "dog", "bird"], batch_size=1)


@pytest.fixture
def look(detector, monkeypatch):
    """`predict` with the detector that is there already."""
    monkeypatch.setattr(predict, "load_predictor", lambda *_, **__: detector)
    return lambda *arguments: predict.main(["--checkpoint", "a detector", *map(str, arguments)])


def test_predict_makes_a_video_with_objects(look, clip, tmp_path, capsys):
    photographs = tmp_path / "photographs"
    photographs.mkdir()
    Image.fromarray(TEMPLE).save(photographs / "7.jpg")
    (photographs / "broken.avi").write_text("no video")
    assert look(clip, photographs, "--output", tmp_path / "out", "--every", "2", "--score", "0") == 1
    printed = capsys.readouterr()
    assert "broken.avi cannot be read as a video" in printed.err
    assert "1 of 3 files could not be read" in printed.err
    assert printed.out.count(f"{clip}#") == 3
    assert f"{clip}#4\n" in printed.out
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["7.jpg", "clip.mp4"]
    assert video.about(tmp_path / "out" / "clip.mp4") == (5, 3)  # as long as it was
    (first, *_) = video.frames(tmp_path / "out" / "clip.mp4")
    assert first.shape == (360, 480, 3)  # enlarged, or names could not be read


def test_predict_names_frames_in_json(look, clip, detector, capsys):
    assert look(clip, "--json", "--every", "3") == 0
    rows = json.loads(capsys.readouterr().out)
    assert {(row["image_id"], row["file_name"], row["frame"]) for row in rows} == {
        (f"clip.mp4#{i}", str(clip), i) for i in (0, 3)
    }
    expected = [found.results("", detector.category_ids) for found in detector(list(video.frames(clip, 3)))]
    assert [row["bbox"] for row in rows] == [row["bbox"] for of_frame in expected for row in of_frame]


def test_a_classifier_looks_at_frames(workdir, clip, capsys):
    assert predict.main(["--checkpoint", str(workdir), str(clip), "--json"]) == 0
    printed = capsys.readouterr()
    assert [json.loads(line)["image"] for line in printed.out.splitlines()] == [f"{clip}#{i}" for i in range(5)]
    assert "5 images in " in printed.err


def test_every_is_a_number_of_frames(look, clip):
    with pytest.raises(UserError, match="--every must be at least 1, got 0"):
        look(clip, "--every", "0")
