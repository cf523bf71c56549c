"""`Predictor`: preprocessing, network and class names in one object. `Predictor.load(path)(images)`."""

import abc
import functools
import itertools
import operator
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from simam_jax import errors, weights
from simam_jax.classification.predictions import Predictions
from simam_jax.detection.apply import compiler_options, detections, padded
from simam_jax.detection.detections import Detections
from simam_jax.detection.masks import Masks
from simam_jax.models import MODELS, Detector, Network
from simam_jax.ops.images import normalize
from simam_jax.ops.parts import apply_in_parts
from simam_jax.preprocessing import ImageLike, Resized, is_one_image

_AHEAD = 2  # batches on their way through the device while the next images are read


class Predictor(abc.ABC):
    """A network with the preprocessing and the class names that it was trained with: a classifier's or a detector's.

        simam_jax.Predictor.load("runs/resnet50")(["cat.jpg", "dog.jpg"]).top(5)
        for found in simam_jax.Predictor.load("runs/mask_rcnn")(["street.jpg"]):
            found.boxes, found.scores, found.names, found.masks

    Attributes:
        model, variables: for `model.apply`.
        preprocessing: from an image to the pixels that the network sees.
        class_names: one for each class.
        category_ids: a detector's numbers for them in COCO's form.
    """

    BATCH_SIZE: ClassVar[int]

    def __new__(cls, model: Network, *_args: Any, **_options: Any) -> Any:
        """Of the class that goes with the model."""
        return object.__new__(DetectorPredictor if isinstance(model, Detector) else ClassifierPredictor)

    def __init__(
        self,
        model: Network,
        variables: Any,
        preprocessing: Any = None,
        class_names: Sequence[str] | None = None,
        *,
        category_ids: Sequence[int] | None = None,
        batch_size: int | None = None,
    ):
        """Args as the attributes.

        `preprocessing` None: what the reference implementation feeds such a network with; `class_names` and `category_ids`
        None: numbers from 0. At most `batch_size` images are computed at once; None: 32, and 2 of a detector's.
        """
        if batch_size is not None and batch_size < 1:
            raise errors.UserError(f"batch_size must be at least 1, got {batch_size}.")
        names = map(str, range(model.num_classes)) if class_names is None else class_names
        self.model, self.variables = model, variables
        self.preprocessing: Any = MODELS[model.architecture].preprocessing if preprocessing is None else preprocessing
        self.class_names, self.batch_size = tuple(names), batch_size or self.BATCH_SIZE
        if len(self.class_names) != model.num_classes:
            raise errors.UserError(f"{len(self.class_names)} class names for {model.num_classes} classes.")
        self.category_ids = tuple(range(model.num_classes)) if category_ids is None else tuple(category_ids)
        if len(self.category_ids) != model.num_classes:
            raise errors.UserError(f"{len(self.category_ids)} category ids for {model.num_classes} classes.")

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        *,
        name: str | None = None,
        num_classes: int | None = None,
        attention: str = "simam",
        attention_param: float | None = None,
        preprocessing: Any = None,
        class_names: Sequence[str] | None = None,
        ema: bool = False,
        key: str | None = None,
        batch_size: int | None = None,
    ) -> "Predictor":
        """The network in a workdir or a checkpoint of train.py, or in a file of PyTorch weights.

        Args:
            path: a workdir (its newest checkpoint), a checkpoint, or a .pth.tar, .pth, .safetensors or .npz.
            name, num_classes, attention, attention_param, key: of a file, as for `load_torch`; a checkpoint knows them.
                A `name` that is not the checkpoint's is an error.
            preprocessing: None: the checkpoint's; for weights without one what the reference implementation feeds that
                network with, which is said.
            class_names: None: those stored with the weights; else ImageNet's for a network of its 1,000, or numbers.
            ema: the exponential moving average of the variables, where the run kept one.
            batch_size: the most images computed at once; None: 32, and 2 of a detector's.

        Raises:
            UserError: nothing that can be read is there, or it is of another model.
        """
        found = weights.load_weights(
            path,
            name=name,
            num_classes=num_classes,
            attention=attention,
            attention_param=attention_param,
            key=key,
            ema=ema,
        )
        if preprocessing is None:
            preprocessing = weights.preprocessing_of(found)
        if class_names is None:
            class_names = weights.class_names_of(found)
        ids = weights.category_ids_of(found, class_names)
        return cls(found.model, found.variables, preprocessing, class_names, category_ids=ids, batch_size=batch_size)

    def __call__(self, images: ImageLike | Sequence[ImageLike]) -> Any:
        """What the network sees in one image or in many, of any sizes.

        Args:
            images: what `Preprocessing` takes (a path, a file, its bytes, a PIL image, an array, a torch tensor), or a
                sequence of these, such as an array (N, H, W, C).

        Returns:
            A classifier's `Predictions`, or a list of a detector's `Detections`, one an image.

        Raises:
            UserError: one of them is no readable image; the message names it.
        """
        results = []
        for _, result in self.stream([images] if is_one_image(images) else images):  # pyright: ignore
            if isinstance(result, errors.UserError):
                raise result
            results.append(result)
        return self._together(results)

    def stream(self, images: Iterable[ImageLike]) -> Iterator[tuple[ImageLike, Any]]:
        """Each image with its result, or with the error that reading it gave; in their order.

        The result is a classifier's probabilities (classes,) or a detector's `Detections`. Images are read by several
        threads while the device computes; only a few batches are in memory at a time.
        """
        waiting: deque[tuple[list[ImageLike], list[Any], Callable[[], Iterator[Any]]]] = deque()

        def finished() -> Iterator[tuple[ImageLike, Any]]:
            sources, read, compute = waiting.popleft()
            results = compute()
            for source, pixels in zip(sources, read, strict=True):
                yield source, pixels if isinstance(pixels, errors.UserError) else next(results)

        with ThreadPoolExecutor() as threads:
            batches = _ahead(threads, self._read, images, self.batch_size)
            for sources, read in batches:
                waiting.append((sources, read, self._start([x for x in read if not isinstance(x, errors.UserError)])))
                if len(waiting) > _AHEAD:
                    yield from finished()
            while waiting:
                yield from finished()

    def _read(self, image: ImageLike) -> Any:
        try:
            return self.preprocessing(image)
        except errors.MissingPackageError:
            raise  # no image can be read
        except errors.UserError as error:
            return error

    @abc.abstractmethod
    def _start(self, read: list[Any]) -> Callable[[], Iterator[Any]]:
        """Starts the network on images that were read; returns what waits for its results, in their order."""

    def _together(self, results: list[Any]) -> Any:
        """The results of a call."""
        return results


class ClassifierPredictor(Predictor):
    """A `Predictor` of classes."""

    BATCH_SIZE = 32

    def _start(self, read: list[np.ndarray]) -> Callable[[], Iterator[np.ndarray]]:
        if not read:
            return lambda: iter(())
        probabilities = self.probabilities(np.stack(read))
        return lambda: iter(np.asarray(probabilities))

    def _together(self, results: list[np.ndarray]) -> Predictions:
        rows = np.stack(results) if results else np.zeros((0, len(self.class_names)), "f4")
        return Predictions(rows, self.class_names)

    def probabilities(self, pixels: np.ndarray) -> jax.Array:
        """(N, classes) float32 on the device, without waiting for it.

        Args:
            pixels: uint8 (N, image_size, image_size, 3), of `preprocessing`.
        """
        # Filled up to a power of two, so that few sizes are ever compiled.
        count = len(pixels)
        size = 1 << (count - 1).bit_length()
        padded = np.concatenate([pixels, np.zeros((size - count, *pixels.shape[1:]), np.uint8)])
        return self._apply(self.variables, padded)[:count]

    @functools.cached_property
    def _apply(self):
        @jax.jit
        def apply(variables: Any, pixels: jax.Array) -> jax.Array:
            return jax.nn.softmax(self.logits(variables, pixels))

        return apply

    def logits(self, variables: Any, pixels: jax.Array) -> jax.Array:
        """A pure function from uint8 (N, image_size, image_size, 3) to (N, classes), for `jax.jit` and its like."""
        return apply_in_parts(functools.partial(self.model.apply, variables), self.normalized(pixels))  # pyright: ignore[reportReturnType]

    def normalized(self, pixels: ArrayLike) -> jax.Array:
        """uint8 (N, image_size, image_size, 3) to float32, as `model.apply` takes images."""
        preprocessing = self.preprocessing
        return normalize(jnp.asarray(pixels), preprocessing.mean, preprocessing.std)


class DetectorPredictor(Predictor):
    """A `Predictor` of objects. Images are padded to a few shapes; their results do not depend on it."""

    BATCH_SIZE = 2

    def _start(self, read: list[Resized]) -> Callable[[], Iterator[Detections]]:
        found: list[Any] = [None] * len(read)
        buckets: dict[tuple[int, int], list[int]] = {}
        for i, image in enumerate(read):
            buckets.setdefault(self.preprocessing.bucket(*image.pixels.shape[:2]), []).append(i)
        for bucket, members in buckets.items():
            together = self._detect([read[i] for i in members], bucket)
            for row, i in enumerate(members):
                found[i] = jax.tree.map(operator.itemgetter(row), together)
        return lambda: map(self._result, read, found)

    def _detect(self, read: list[Resized], bucket: tuple[int, int]) -> Any:
        """What the model gives for images padded to one shape, on the device."""
        count = 1 << (len(read) - 1).bit_length()  # filled up, so that few counts are ever compiled
        return self._jitted(self.variables, *padded(read, bucket, count))

    @functools.cached_property
    def _jitted(self):
        return jax.jit(self.detections, compiler_options=compiler_options())

    def detections(self, variables: Any, pixels: jax.Array, sizes: jax.Array, scale: jax.Array) -> Any:
        """A pure function from padded images to what `model.apply` returns, for `jax.jit` and its like.

        Args:
            pixels: uint8 (N, H, W, 3).
            sizes: (N, 2) int32, height and width of each image without padding.
            scale: (N, 4) float32: see `models.detector.Detector`.
        """
        return detections(self.model, self.preprocessing, variables, pixels, sizes, scale)  # pyright: ignore[reportArgumentType]

    def _result(self, image: Resized, found: Any) -> Detections:
        count = int(found.count)
        boxes, scores, labels = (np.asarray(x)[:count] for x in (found.boxes, found.scores, found.labels))
        masks = None if found.masks is None else Masks(np.asarray(found.masks)[:count], boxes, image.size)
        return Detections(boxes, scores, labels, masks, self.class_names)


def _ahead(
    threads: ThreadPoolExecutor, read: Any, images: Iterable[ImageLike], size: int
) -> Iterator[tuple[list[ImageLike], list[Any]]]:
    """Batches of images and of what `read` makes of them, the next ones already being read."""
    pending: deque[list[tuple[ImageLike, Any]]] = deque()
    stream = iter(images)
    while True:
        while len(pending) <= _AHEAD and (batch := list(itertools.islice(stream, size))):
            pending.append([(image, threads.submit(read, image)) for image in batch])
        if not pending:
            return
        done = pending.popleft()
        yield [image for image, _ in done], [future.result() for _, future in done]
