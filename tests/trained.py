"""Small networks whose logits tell images apart, as those of a trained network do, and workdirs with them."""

from pathlib import Path

import jax
import numpy as np

import simam_jax
from simam_jax import checkpoints
from simam_jax.models import variable_shapes
from simam_jax.preprocessing import Preprocessing

PREPROCESSING = {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.2)}


def variables_of(model):
    """Drawn so that every statistic, factor and bias counts."""
    rng = np.random.default_rng(1)

    def drawn(path, x):
        kind, noise = path[-1].key, rng.standard_normal(x.shape, np.float32)
        if kind in ("scale", "var"):
            return 0.5 + 0.5 * abs(noise)
        if kind in ("bias", "mean"):
            return 0.1 * noise
        return noise * np.float32(1 / np.prod(x.shape[:-1])) ** 0.5

    return jax.tree_util.tree_map_with_path(drawn, variable_shapes(model))


def write_workdir(folder: Path, name: str, num_classes: int, image_size: int, attention: str = "simam") -> Path:
    spec = {"name": name, "num_classes": num_classes, "attention": attention, "dtype": "float32"}
    spec["attention_param"] = 1e-4 if attention == "simam" else 0.0
    how = {"image_size": image_size, "eval_resize": image_size} | PREPROCESSING
    names = [f"class {i}" for i in range(num_classes)]
    variables = variables_of(simam_jax.create_model(**spec))
    checkpoints.write_weights(
        folder, {"task": "classification", "model": spec}, variables, class_names=names, preprocessing=how
    )
    return folder


def preprocessing(image_size: int) -> Preprocessing:
    return Preprocessing(image_size, image_size, **PREPROCESSING)
