"""Video files, read and written frame by frame with OpenCV: none is in memory whole."""

import contextlib
import logging
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from simam_jax.errors import UserError, naming_extras

if TYPE_CHECKING:
    from cv2 import VideoCapture

logger = logging.getLogger(__name__)
ENDINGS = (".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg", ".wmv")
_RATE = 25.0  # frames a second, of a video that does not say


class About(NamedTuple):
    """What a video says of itself: its frames a second, and how many they are (0: it does not say)."""

    rate: float
    count: int


def is_video(path: Path) -> bool:
    """Whether the file's ending is a video's."""
    return path.suffix.lower() in ENDINGS


def about(path: Path) -> About:
    """What a video says of itself.

    Raises:
        UserError: it cannot be read.
    """
    with _opened(path) as video:
        return _about(video)


def frames(path: Path, every: int = 1) -> Iterator[np.ndarray]:
    """Every so many frames of a video from the first on, uint8 (H, W, 3), RGB. An end before the one it names is said.

    Raises:
        UserError: it cannot be read, or has no frames.
    """
    with _opened(path) as video:
        import cv2

        place, count = 0, _about(video).count
        while video.grab():
            if place % every == 0:
                read, frame = video.retrieve()
                if not read:
                    break
                yield cv2.cvtColor(frame, cv2.COLOR_BGR2RGB)
            place += 1
    if not place:
        raise UserError(f"{path} has no frames that can be read.")
    if place + 1 < count:  # some count one too many
        logger.warning("%s ends after %d of the %d frames that it names.", path, place, count)


@contextlib.contextmanager
def written(path: Path, rate: float) -> Iterator[Callable[[np.ndarray], None]]:
    """Writes an .mp4, whole or not at all: what is given takes its frames, uint8 (H, W, 3), RGB, all of one size.

    The format has even sides: the last row or column of an odd one is left out.

    Args:
        path: the file. An older one stays until the new one is complete.
        rate: frames a second.

    Raises:
        UserError: it cannot be written, or a frame has another size than the first.
    """
    with naming_extras():
        import cv2

    partial = path.with_name(f"{path.stem}.part{path.suffix}")
    video, size = cv2.VideoWriter(), (0, 0)
    with _naming(path):
        path.parent.mkdir(parents=True, exist_ok=True)

    def add(frame: np.ndarray) -> None:
        nonlocal size
        frame = frame[: frame.shape[0] // 2 * 2, : frame.shape[1] // 2 * 2]
        if not video.isOpened():
            size = frame.shape[:2]
            if not video.open(str(partial), cv2.VideoWriter.fourcc(*"mp4v"), rate, size[::-1]):
                raise UserError(f"{path} cannot be written.")
        if frame.shape[:2] != size:
            raise UserError(f"{path} has frames of {size} (height, width), and the next one is {frame.shape[:2]}.")
        video.write(cv2.cvtColor(frame, cv2.COLOR_RGB2BGR))

    try:
        yield add
        video.release()
        with _naming(path):
            if size[0]:
                partial.replace(path)
    finally:
        video.release()
        partial.unlink(missing_ok=True)


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error}.") from error


@contextlib.contextmanager
def _opened(path: Path) -> Iterator["VideoCapture"]:
    with naming_extras():
        import cv2

    video = cv2.VideoCapture(str(path))
    try:
        if not video.isOpened():
            raise UserError(f"{path} cannot be read as a video: it is damaged, or of a kind that OpenCV does not know.")
        yield video
    finally:
        video.release()


def _about(video: "VideoCapture") -> About:
    import cv2

    rate, count = video.get(cv2.CAP_PROP_FPS), video.get(cv2.CAP_PROP_FRAME_COUNT)
    return About(rate if math.isfinite(rate) and rate > 0 else _RATE, max(int(count), 0) if math.isfinite(count) else 0)
