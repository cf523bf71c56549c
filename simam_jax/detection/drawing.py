"""Objects drawn over an image: masks, boxes and names, readable on any background and beside one another."""

import colorsys
import functools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from simam_jax.errors import naming_extras

if TYPE_CHECKING:
    from PIL import Image
    from PIL.ImageFont import FreeTypeFont

Colour = tuple[int, int, int]  # red, green, blue in 0..255
Rectangle = tuple[int, int, int, int]  # x1 y1 x2 y2 in pixels of the picture, the last ones not in it

SHOWN = 480  # pixels: the least length of a picture's longer side, and twice that where objects crowd
_CROWD = 20  # so many objects are none yet
OPACITY = 0.45  # of a mask over the image
LEAST_FONT = 11  # pixels: smaller names cannot be read
_COVERED = 0.25  # of a picture: where names would cover more they become smaller, and at last fewer


class Drawn(NamedTuple):
    """An object to draw.

    Attributes:
        box: x1 y1 x2 y2 in the image's pixels.
        text: what stands at the box.
        colour: of all of it.
        mask: gives (H, W) bool in the image's size when its turn comes; None: there is none.
    """

    box: Sequence[float]
    text: str
    colour: Colour
    mask: Callable[[], np.ndarray] | None = None


def class_colour(label: int) -> Colour:
    """The colour of a class: those of neighbouring labels are far apart."""
    red, green, blue = colorsys.hsv_to_rgb(0.618034 * int(label) % 1, 0.85, 0.95)
    return round(255 * red), round(255 * green), round(255 * blue)


def draw_objects(pixels: np.ndarray, objects: Sequence[Drawn], longest: int | None = None) -> "Image.Image":
    """The image with objects over it, the first ones on top.

    Lines and letters grow with the picture. A name stands at its box where it covers no other name; where there are too
    many, those of the last objects are left out.

    Args:
        pixels: uint8 (H, W, 3), the image itself.
        objects: what is drawn.
        longest: pixels of the picture's longer side; None: as the image, but at least what shows so many objects.
    """
    with naming_extras():
        from PIL import Image, ImageDraw

    height, width = pixels.shape[:2]
    least = SHOWN if len(objects) <= _CROWD else 2 * SHOWN
    scale = (longest or max(width, height, least)) / max(width, height)
    size = max(round(scale * width), 1), max(round(scale * height), 1)
    canvas = np.array(Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC) if scale != 1 else pixels)
    texts = [each.text for each in objects]
    font = _font(_font_size(texts, size))
    line = max(1, round(font.size / 7))
    masks = ((resized(each.mask(), size), each.colour) for each in reversed(objects) if each.mask is not None)
    _lay_over(canvas, masks, line)
    image = Image.fromarray(canvas)
    pen = ImageDraw.Draw(image)
    boxes = [_pixels_of(each.box, scale, size) for each in objects]
    for box, each in zip(reversed(boxes), reversed(objects), strict=True):
        x1, y1, x2, y2 = box
        edge = max(1, line // 3)
        around = x1 - edge, y1 - edge, x2 - 1 + edge, y2 - 1 + edge
        pen.rectangle(around, outline=_against(each.colour), width=line + 2 * edge)
        pen.rectangle((x1, y1, x2 - 1, y2 - 1), outline=each.colour, width=line)
    places = place_labels(boxes, [_label_size(font, text) if text else None for text in texts], size)
    for place, each in zip(places, objects, strict=True):
        if place is not None:
            x1, y1, x2, y2 = place
            pen.rectangle((x1, y1, x2 - 1, y2 - 1), fill=each.colour, outline=_against(each.colour))
            middle = (x1 + x2) / 2, (y1 + y2) / 2
            pen.text(middle, each.text, fill=_against(each.colour), font=font, anchor="mm")
    return image


def place_labels(
    boxes: Sequence[Rectangle], sizes: Sequence[tuple[int, int] | None], picture: tuple[int, int]
) -> list[Rectangle | None]:
    """For each box the place of its name: at one of its edges, within the picture, over no name that came before.

    Together they cover no more than a quarter of the picture.

    Args:
        boxes: in the picture.
        sizes: width and height of the names; None: it has none.
        picture: its width and height.

    Returns:
        The places, None where there is none left.
    """
    taken, left = np.zeros((0, 4), int), _COVERED * math.prod(picture)
    places: list[Rectangle | None] = []
    for box, size in zip(boxes, sizes, strict=True):
        place = None
        if size is not None and math.prod(size) <= left:
            places_of = _candidates(box, size, picture)
            a, b = places_of[:, None], taken[None]
            free = ~((a[..., :2] < b[..., 2:]) & (b[..., :2] < a[..., 2:])).all(-1).any(-1)
            if free.any():
                x1, y1, x2, y2 = places_of[free.argmax()].tolist()
                place = x1, y1, x2, y2
                taken, left = np.concatenate((taken, [place])), left - math.prod(size)
        places.append(place)
    return places


def _candidates(box: Rectangle, size: tuple[int, int], picture: tuple[int, int]) -> np.ndarray:
    """(n, 4) int places of a name at a box, the best first: above it, within it, below it, beside it."""
    (x1, y1, x2, y2), (width, height) = box, size
    along = np.linspace(x1, max(x2 - width, x1), 5)
    down = np.linspace(y1, max(y2 - height, y1), 5)
    corners = [(x, y) for y in (y1 - height, y1, y2, y2 - height) for x in along]
    corners += [(x, y) for x in (x2, x1 - width) for y in down]
    corners += [(x, y) for y in (y1 - height, y2) for x in (x2 - width, x1 - width / 2, x2 - width / 2)]
    left_top = np.array(corners).round().astype(int)
    left_top = np.maximum(np.minimum(left_top, np.subtract(picture, size)), 0)
    return np.concatenate((left_top, left_top + size), 1)


def _pixels_of(box: Sequence[float], scale: float, size: tuple[int, int]) -> Rectangle:
    """At least one pixel of the picture."""
    x1, y1, x2, y2 = (scale * float(x) for x in box)
    left, top = (min(max(math.floor(low), 0), side - 1) for low, side in zip((x1, y1), size, strict=True))
    right, bottom = (min(max(math.ceil(high), 0), side) for high, side in zip((x2, y2), size, strict=True))
    return left, top, max(right, left + 1), max(bottom, top + 1)


def _lay_over(canvas: np.ndarray, masks: Iterable[tuple[np.ndarray, Colour]], line: int) -> None:
    """Lays masks over the image, the last on top: a pixel has the colour of one mask, whose rim is opaque."""
    image = canvas.copy()
    for mask, colour in masks:
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        if not len(rows):
            continue
        window = np.s_[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        inside = mask[window]
        rim = inside & ~_eroded(inside, max(1, line // 2))
        for channel, value in enumerate(colour):
            blended = ((1 - OPACITY) * np.arange(256) + OPACITY * value).round().astype(np.uint8)
            np.copyto(canvas[window][..., channel], blended[image[window][..., channel]], where=inside)
            np.copyto(canvas[window][..., channel], np.uint8(value), where=rim)


def _eroded(mask: np.ndarray, width: int) -> np.ndarray:
    """The mask without a rim of `width` pixels."""
    padded = np.pad(mask, width)
    for axis in (0, 1):
        length = padded.shape[axis] - 2 * width
        parts = (padded[(slice(None),) * axis + (slice(i, i + length),)] for i in range(2 * width + 1))
        padded = functools.reduce(np.logical_and, parts)
    return padded


def resized(mask: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """The mask in a picture of that width and height."""
    if mask.shape == size[::-1]:
        return mask
    rows, columns = (
        np.minimum(((np.arange(new) + 0.5) * old / new).astype(int), old - 1)
        for old, new in zip(mask.shape, size[::-1], strict=True)
    )
    return mask[rows[:, None], columns]


def _font_size(texts: Sequence[str], size: tuple[int, int]) -> int:
    """Pixels: by the size of the picture, less where there is much to say."""
    wanted = max(LEAST_FONT, round(math.sqrt(size[0] * size[1]) / 45))
    areas = (math.prod(_label_size(_font(wanted), text)) for text in texts if text)
    crowded = sum(areas) / (_COVERED * size[0] * size[1])
    return max(LEAST_FONT, round(wanted / math.sqrt(max(crowded, 1))))


@functools.lru_cache(maxsize=64)
def _font(size: int) -> "FreeTypeFont":
    """DejaVu Sans, which comes with matplotlib: PIL's own font has English letters alone."""
    with naming_extras():
        import matplotlib
        from PIL import ImageFont

    return ImageFont.truetype(f"{matplotlib.get_data_path()}/fonts/ttf/DejaVuSans.ttf", size)


def _label_size(font: "FreeTypeFont", text: str) -> tuple[int, int]:
    """Width and height of a name with the space around it."""
    return math.ceil(font.getlength(text) + 0.6 * font.size), math.ceil(1.35 * font.size)


def _against(colour: Colour) -> Colour:
    """Black or white: what can be told from the colour."""
    red, green, blue = colour
    return (0, 0, 0) if 0.299 * red + 0.587 * green + 0.114 * blue > 130 else (255, 255, 255)
