"""The networks: `create_model(name, ...)`, `create_backbone(name, ...)`, `list_models()`."""

from simam_jax.models.classifier import HEAD, Classifier
from simam_jax.models.detector import Detector
from simam_jax.models.network import Network
from simam_jax.models.registry import ATTENTIONS, MODELS, create_backbone, create_model, list_models
from simam_jax.models.variables import init_variables, variable_shapes

__all__ = [
    "ATTENTIONS",
    "HEAD",
    "MODELS",
    "Classifier",
    "Detector",
    "Network",
    "create_backbone",
    "create_model",
    "init_variables",
    "list_models",
    "variable_shapes",
]
