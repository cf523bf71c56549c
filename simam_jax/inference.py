"""A trained network as one looks at images with it: `Predictor.load(path)(images)`."""

import functools
import itertools
import os
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.typing import ArrayLike

from simam_jax import errors, weights
from simam_jax.classification.predictions import Predictions
from simam_jax.ops.images import normalize
from simam_jax.ops.parts import apply_in_parts
from simam_jax.preprocessing import ImageLike, Preprocessing, is_one_image

_AHEAD = 2  # batches on their way through the device while the next images are read


class Predictor:
    """A network with the preprocessing and the class names that it was trained with.

        predictor = simam_jax.Predictor.load("runs/resnet50")
        predictor(["cat.jpg", "dog.jpg"]).top(5)

    Attributes:
        model, variables: for `model.apply(variables, normalised_images)`.
        preprocessing: from an image to the pixels that the network sees.
        class_names: one for each logit.
    """

    def __init__(
        self,
        model: nn.Module,
        variables: Any,
        preprocessing: Preprocessing,
        class_names: Sequence[str] | None = None,
        *,
        batch_size: int = 32,
    ):
        """Args as the attributes; `class_names` None: numbers. At most `batch_size` images are computed at once."""
        if batch_size < 1:
            raise errors.UserError(f"batch_size must be at least 1, got {batch_size}.")
        num_classes: int = model.num_classes  # pyright: ignore[reportAttributeAccessIssue]
        names = map(str, range(num_classes)) if class_names is None else class_names
        self.model, self.variables, self.preprocessing = model, variables, preprocessing
        self.class_names, self.batch_size = tuple(names), batch_size
        if len(self.class_names) != num_classes:
            raise errors.UserError(f"{len(self.class_names)} class names for {num_classes} classes.")

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        *,
        name: str | None = None,
        num_classes: int | None = None,
        attention: str = "simam",
        attention_param: float | None = None,
        preprocessing: Preprocessing | None = None,
        class_names: Sequence[str] | None = None,
        ema: bool = False,
        key: str | None = None,
        batch_size: int = 32,
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
            batch_size: the most images computed at once.

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
        return cls(found.model, found.variables, preprocessing, class_names, batch_size=batch_size)

    def __call__(self, images: ImageLike | Sequence[ImageLike]) -> Predictions:
        """The probabilities of one image or of many, of any sizes.

        Args:
            images: what `Preprocessing` takes (a path, a file, its bytes, a PIL image, an array, a torch tensor), or a
                sequence of these, such as an array (N, H, W, C).

        Raises:
            UserError: one of them is no readable image; the message names it.
        """
        rows = []
        for _, result in self.stream([images] if is_one_image(images) else images):  # pyright: ignore
            if isinstance(result, errors.UserError):
                raise result
            rows.append(result)
        return Predictions(np.stack(rows) if rows else np.zeros((0, len(self.class_names)), "f4"), self.class_names)

    def stream(self, images: Iterable[ImageLike]) -> Iterator[tuple[ImageLike, np.ndarray | errors.UserError]]:
        """Each image with its probabilities (classes,), or with the error that reading it gave; in their order.

        Images are read by several threads while the device computes; only a few batches are in memory at a time.
        """
        waiting: deque[tuple[list[ImageLike], list[np.ndarray | errors.UserError], jax.Array | None]] = deque()

        def finished() -> Iterator[tuple[ImageLike, np.ndarray | errors.UserError]]:
            sources, read, probabilities = waiting.popleft()
            rows = iter(np.asarray(probabilities) if probabilities is not None else ())
            for source, pixels in zip(sources, read, strict=True):
                yield source, pixels if isinstance(pixels, errors.UserError) else next(rows)

        with ThreadPoolExecutor() as threads:
            batches = _ahead(threads, self._read, images, self.batch_size)
            for sources, read in batches:
                pixels = [image for image in read if isinstance(image, np.ndarray)]
                waiting.append((sources, read, self.probabilities(np.stack(pixels)) if pixels else None))
                if len(waiting) > _AHEAD:
                    yield from finished()
            while waiting:
                yield from finished()

    def _read(self, image: ImageLike) -> np.ndarray | errors.UserError:
        try:
            return self.preprocessing(image)
        except errors.UserError as error:
            return error

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
        how = self.preprocessing
        return normalize(jnp.asarray(pixels), how.mean, how.std)


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
