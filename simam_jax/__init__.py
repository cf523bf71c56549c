"""SimAM, the parameter-free attention module for ConvNets (Yang et al., ICML 2021), in JAX and Flax."""

import importlib
from typing import TYPE_CHECKING

from simam_jax import errors as _errors
from simam_jax.attention import CBAM, SimAM, SqueezeExcite, simam, simam_weights
from simam_jax.errors import UserError
from simam_jax.models import create_model, init_variables, list_models
from simam_jax.preprocessing import DetectionPreprocessing, Preprocessing

if TYPE_CHECKING:
    from simam_jax.inference import Predictor
    from simam_jax.weights import load, load_torch

__version__ = "0.1.0"
__all__ = [
    "CBAM",
    "DetectionPreprocessing",
    "Predictor",
    "Preprocessing",
    "SimAM",
    "SqueezeExcite",
    "UserError",
    "create_model",
    "init_variables",
    "list_models",
    "load",
    "load_torch",
    "simam",
    "simam_weights",
]

# Loaded on first use, because a bare install lacks some of what they import.
_LAZY = {
    "Predictor": "simam_jax.inference",
    "load": "simam_jax.weights",
    "load_torch": "simam_jax.weights",
}


def __getattr__(name: str):
    if name not in _LAZY:
        raise AttributeError(f"module 'simam_jax' has no attribute {name!r}")
    with _errors.naming_extras():
        value = globals()[name] = getattr(importlib.import_module(_LAZY[name]), name)
    return value


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
