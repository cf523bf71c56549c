"""One image of any kind to the pixels that evaluation sees, with PIL alone: what a trained network is fed with.

PIL is imported when the first image is read. Pixels are taken as they are stored: EXIF rotation is ignored and transparency
is dropped, here as in training, as in torchvision's pipelines, on which published accuracies rest. Detectors see images turned as
the EXIF tag says, as the reference implementation does, and learn from and are scored on what annotations are for: `read_upright`.
"""

import contextlib
import dataclasses
import io
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from simam_jax.errors import UserError, naming_extras
from simam_jax.ops.bilinear import resize_bilinear
from simam_jax.paths import local

if TYPE_CHECKING:
    from PIL import Image

ImageLike = Any  # a path, a file, its bytes, a PIL image, an array, a torch tensor

# Larger ones are refused before they are decoded: a few bytes of a file can claim any size.
MAX_PIXELS = 178_956_970  # PIL's own limit, 0.5 GiB of RGB

ORIENTATION, SIDEWAYS = 0x0112, (5, 6, 7, 8)  # the EXIF tag, and its values that exchange height and width


@dataclasses.dataclass(frozen=True)
class Preprocessing:
    """How a network wants its images; stored with every checkpoint, from `config.data`.

    Attributes:
        image_size: pixels, height and width of what the network sees.
        eval_resize: pixels of the shorter side before the centre crop; 0: the whole image straight to image_size.
        mean, std: per channel, of pixels in 0..1.
    """

    image_size: int
    eval_resize: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def __post_init__(self):
        if self.image_size < 1 or 0 < self.eval_resize < self.image_size:
            raise UserError(
                f"eval_resize={self.eval_resize} must be 0 or at least image_size={self.image_size}, which is 1 or more."
            )

    def __call__(self, image: ImageLike) -> np.ndarray:
        """The image as uint8 (image_size, image_size, 3), not yet normalised: torchvision's Resize and CenterCrop.

        Args:
            image: a path, a file, the bytes of one, a PIL image, or an array (H, W), (H, W, 1), (H, W, 3) or (H, W, 4) of
                uint8 in 0..255; a torch tensor may also be (1, H, W), (3, H, W) or (4, H, W). Of an animation the first
                picture.

        Raises:
            UserError: no readable image; the message names it.
        """
        rgb = read_rgb(image)
        from PIL.Image import Resampling

        # Only the part that is seen is resized: a panorama would not fit in memory at that height.
        size = (self.image_size, self.image_size)
        return np.asarray(rgb.resize(size, Resampling.BILINEAR, box=self.box(*rgb.size)))

    def box(self, width: int, height: int) -> tuple[float, float, float, float]:
        """The part of an image that the network sees: left, top, right, bottom in pixels."""
        if not self.eval_resize:
            return 0.0, 0.0, float(width), float(height)
        shorter = min(width, height)
        (left, right), (top, bottom) = (
            self._span(length, self.eval_resize * length // shorter) for length in (width, height)
        )
        return left, top, right, bottom

    def _span(self, length: int, resized: int) -> tuple[float, float]:
        start = round((resized - self.image_size) / 2)  # Python rounds a half to the even number, as torchvision does
        return start * length / resized, (start + self.image_size) * length / resized


class Resized(NamedTuple):
    """An image as a detector sees it.

    Attributes:
        pixels: uint8 (H, W, 3), RGB, not yet normalised.
        size: height and width of the image as it was read.
    """

    pixels: np.ndarray
    size: tuple[int, int]


@dataclasses.dataclass(frozen=True)
class DetectionPreprocessing:
    """How a detector wants its images: the shorter side `min_size` long, the longer one at most `max_size`, the ratio kept.

    Attributes:
        min_size, max_size: pixels.
        mean, std: per channel, of pixels in 0..1.
        buckets: the most shapes that images are padded to; 1, a square, or an even number, half of them upright.
    """

    min_size: int = 800
    max_size: int = 1333
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    buckets: int = 6

    def __post_init__(self):
        if not 1 <= self.min_size <= self.max_size:
            raise UserError(
                f"min_size={self.min_size} must be at least 1, and max_size={self.max_size} at least min_size."
            )
        if self.buckets < 1 or (self.buckets > 1 and self.buckets % 2):
            raise UserError(
                f"buckets={self.buckets} must be 1, a square for all images, or an even number: half of the shapes are for "
                f"images that are wide, half for those that are tall."
            )

    def __call__(self, image: ImageLike) -> Resized:
        """The image, turned as its EXIF tag says, with the pixels that the reference implementation resizes it to.

        Args:
            image: as for `Preprocessing`.

        Raises:
            UserError: no readable image; the message names it.
        """
        rgb = np.asarray(read_upright(image))
        return Resized(resize_bilinear(rgb, self.resized(*rgb.shape[:2])), rgb.shape[:2])

    def resized(self, height: int, width: int) -> tuple[int, int]:
        """The height and width that an image is resized to."""
        factor = min(self.max_size / max(height, width), self.min_size / min(height, width))
        return max(int(height * factor + 0.5), 1), max(int(width * factor + 0.5), 1)

    def bucket(self, height: int, width: int) -> tuple[int, int]:
        """The height and width that a resized image is padded to: of at most `buckets` shapes, the smallest that holds it.

        The longer sides are 128 pixels apart. Few shapes are few compilations, and more padding. A detector is told where
        its images end, so that its results do not depend on them.
        """
        short, long = (-(-size // SIZE_DIVISOR) * SIZE_DIVISOR for size in (self.min_size, self.max_size))
        if self.buckets == 1:
            return long, long
        apart = range(0, self.buckets // 2 * 4 * SIZE_DIVISOR, 4 * SIZE_DIVISOR)
        longer = sorted(long - less for less in apart if long - less >= short)
        side = next(side for side in longer if side >= max(height, width))
        return (short, side) if height <= width else (side, short)


SIZE_DIVISOR = 32  # pixels: padded sizes are multiples of it
COCO = DetectionPreprocessing()
IMAGENET = Preprocessing(224, 256, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CIFAR = Preprocessing(32, 0, (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))


@contextlib.contextmanager
def naming_the_reason(name: str) -> Iterator[None]:
    """Turns what PIL raises for a damaged file into a `UserError` that names it."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # damaged files make decoders raise anything
        text = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        if text.startswith("cannot identify image file"):
            text = "it is damaged, or of a kind that PIL does not know"
        raise UserError(f"{name} cannot be read as an image: {text}.") from error


def read_rgb(image: ImageLike) -> "Image.Image":
    """The image in PIL's mode RGB.

    Raises:
        UserError: no readable image, or one of more than `MAX_PIXELS`; the message names it.
    """
    with naming_extras():
        from PIL import Image

    if isinstance(image, str | os.PathLike):
        name, source = str(image), local(image)
        if not source.is_file():
            raise UserError(f"{source} is {'a folder, not an image' if source.is_dir() else 'no file'}.")
    elif isinstance(image, bytes):
        name, source = "The image", io.BytesIO(image)
    elif hasattr(image, "read"):
        name, source = str(getattr(image, "name", "The file")), image
    elif isinstance(image, Image.Image):
        name, source = "The image", None
    elif hasattr(image, "shape") or isinstance(image, list | tuple):
        name, source, image = "The array", None, _from_array(_as_array(image))
    else:
        raise UserError(f"{image!r} is no image: give a path, a file, its bytes, a PIL image, an array or a tensor.")
    opened: Any
    with naming_the_reason(name), contextlib.nullcontext(image) if source is None else Image.open(source) as opened:
        width, height = opened.size
        if width * height > MAX_PIXELS:
            raise UserError(f"{name} has {width} x {height} pixels, more than {MAX_PIXELS:,}: make it smaller first.")
        return to_rgb(opened, name)


def read_upright(image: ImageLike, size: tuple[int, int] | None = None) -> "Image.Image":
    """The image in PIL's mode RGB, turned as its EXIF tag says: what OpenCV, and with it the reference implementation, reads.

    Args:
        image: as for `read_rgb`.
        size: height and width that its annotations are for, if there are any. If only the pixels as they are stored have it,
            they stay.
    """
    rgb = read_rgb(image)
    stored, upright = stored_and_upright(rgb)
    if stored == size != upright or rgb.getexif().get(ORIENTATION, 1) == 1:
        return rgb  # PIL would copy it
    from PIL import ImageOps

    return ImageOps.exif_transpose(rgb)


def stored_and_upright(image: "Image.Image") -> tuple[tuple[int, int], tuple[int, int]]:
    """Height and width of an image as it is stored, and as its EXIF tag turns it."""
    height, width = image.height, image.width
    sideways = image.getexif().get(ORIENTATION) in SIDEWAYS
    return (height, width), (width, height) if sideways else (height, width)


def to_rgb(image: "Image.Image", name: str = "The image") -> "Image.Image":
    """The image in PIL's mode RGB; of values of 16 bits the upper 8 are kept.

    Raises:
        UserError: its values are floating, or integers of more than 16 bits: which one is white is not known.
    """
    bits16 = image.mode.startswith("I;16") or image.format in ("PNG", "PPM")  # these two say which value is white
    from PIL import Image

    if image.mode == "F":
        raise UserError(f"{name} has floating-point values: save it with 8 or 16 bits a value.")
    if image.mode.startswith("I"):  # PIL's own conversion would cut off instead of scaling
        values = np.asarray(image)
        if not bits16 or values.min() < 0 or values.max() >= 2**16:
            raise UserError(
                f"{name} has values of {values.min()} to {values.max()} in 32 bits: save it with 8 or 16 bits a value."
            )
        image = Image.fromarray((values >> 8).astype(np.uint8))
    return image.convert("RGB")


def is_one_image(images: Any) -> bool:
    """Whether this is an image and not a sequence of images: what `Preprocessing` takes."""
    if isinstance(images, str | bytes | os.PathLike) or hasattr(images, "read") or hasattr(images, "getbands"):
        return True
    shape = getattr(images, "shape", None)
    if shape is None:
        return not hasattr(images, "__iter__")
    channels_first = hasattr(images, "detach") and len(shape) == 3 and shape[0] in (1, 3, 4)
    return len(shape) in (0, 2) or (len(shape) == 3 and shape[-1] <= 4) or channels_first


def _as_array(image: Any) -> np.ndarray:
    """A NumPy array (H, W, ...) of an array or a torch tensor, which may have its channels first."""
    if not hasattr(image, "detach"):
        return np.asarray(image)
    array = image.detach().cpu().numpy()
    first = array.ndim == 3 and array.shape[0] in (1, 3, 4) and array.shape[-1] not in (1, 3, 4)
    return array.transpose(1, 2, 0) if first else array


def _from_array(array: np.ndarray) -> "Image.Image":
    from PIL import Image

    if array.dtype != np.uint8:
        raise UserError(
            f"An image as an array must be uint8 in 0..255, got {array.dtype}: "
            "for values in 0..1 use (255 * x).round().astype('uint8')."
        )
    if array.ndim == 3 and array.shape[-1] == 1:
        array = array[..., 0]
    if array.size == 0 or not (array.ndim == 2 or (array.ndim == 3 and array.shape[-1] in (3, 4))):
        raise UserError(f"An image as an array must be (H, W), (H, W, 1), (H, W, 3) or (H, W, 4), got {array.shape}.")
    return Image.fromarray(array)
