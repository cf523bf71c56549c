"""Real images without a download: scikit-learn's handwritten digits as a TFDS data set."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

NUM_TEST_PER_CLASS = 36


def load_split() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The digits, uint8 (1797, 8, 8, 1), white on black; their labels; and which are for the test, bool."""
    from sklearn.datasets import load_digits

    pixels, labels = map(np.asarray, load_digits(return_X_y=True))
    # Evenly over the whole collection: its writers come one after the other.
    test = np.zeros(len(labels), bool)
    for digit in range(10):
        own = np.flatnonzero(labels == digit)
        test[own[np.linspace(0, len(own) - 1, NUM_TEST_PER_CLASS).round().astype(int)]] = True
    return np.minimum(pixels.reshape(-1, 8, 8, 1) * 16, 255).astype(np.uint8), labels, test  # 0..16 in scikit-learn


class Digits(tfds.core.GeneratorBasedBuilder):
    """1,797 handwritten digits of 8x8 pixels (UCI, Alpaydin and Kaynak 1998), a fixed stratified train/test split."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> tfds.core.DatasetInfo:
        return self.dataset_info_from_configs(
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(8, 8, 1), encoding_format="png"),
                    "label": tfds.features.ClassLabel(num_classes=10),
                }
            ),
            supervised_keys=("image", "label"),
            homepage="https://scikit-learn.org/stable/modules/generated/sklearn.datasets.load_digits.html",
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Any]:  # noqa: ARG002
        images, labels, test = load_split()
        return {
            name: self._generate_examples(images, labels, np.flatnonzero(chosen))
            for name, chosen in (("train", ~test), ("test", test))
        }

    def _generate_examples(
        self, images: np.ndarray, labels: np.ndarray, indices: np.ndarray
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        for index in indices.tolist():
            yield index, {"image": images[index], "label": int(labels[index])}
