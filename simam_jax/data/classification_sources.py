"""The sources of classifiers' data, by name in `config.data.source`, and what each opens: records."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ml_collections import ConfigDict

from simam_jax.errors import UserError, unknown

if TYPE_CHECKING:
    from simam_jax.data.tensorflow_cpu import tf


@dataclass(frozen=True)
class Records:
    """Random access to the examples of one split.

    Reading is TensorFlow ops alone. A Python function inside tf.data would hold the interpreter's lock on every core, and
    deadlocks a process that ends while an endless stream is open.

    Attributes:
        num_examples: how many there are.
        class_names: of the labels, where there are any.
        read: from an index (int64 scalar) to the example's fields, such as `image`, encoded bytes, and `label`, int32.
        name: from an index to what a message calls the example.
    """

    num_examples: int
    class_names: tuple[str, ...]
    read: "Callable[[tf.Tensor], dict[str, tf.Tensor]]"
    name: Callable[[int], str]


SOURCES = ("tfds", "folder", "digits", "synthetic")


def open_records(config: ConfigDict, split: str) -> Records:
    """Opens a split of the source that `config` (the section config.data) names.

    Raises:
        UserError: an unknown source or split, no examples, or what the reader of the source says.
    """
    if config.source not in SOURCES:
        raise unknown("config.data.source", config.source, SOURCES)
    from simam_jax.data import folder, synthetic, tfds

    readers = {
        "tfds": tfds.open_prepared,
        "folder": folder.open_tree,
        "digits": tfds.open_digits,
        "synthetic": synthetic.open_noise,
    }
    records = readers[config.source](config, split)
    if not records.num_examples:
        raise UserError(f"The split {split!r} of {config.source} {config.name} has no examples.")
    return records
