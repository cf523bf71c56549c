"""What all networks have in common: a name, a backbone and a number of classes."""

from typing import Any, Self

import jax.numpy as jnp
from flax import linen as nn

from simam_jax.models.backbone import Backbone


class Network(nn.Module, kw_only=True):
    """A network that `create_model` makes: a `Classifier` or a `Detector`."""

    architecture: str  # its name in `models.MODELS`
    backbone: Backbone
    num_classes: int

    @property
    def attention(self) -> str:
        return self.backbone.attention

    @property
    def attention_param(self) -> float:
        return self.backbone.attention_param

    @property
    def dtype(self) -> jnp.dtype:
        return self.backbone.dtype

    @property
    def class_layers(self) -> tuple[tuple[str, ...], ...]:
        """Where the layers whose shapes depend on the number of classes stand among the parameters; the scores' first."""
        raise NotImplementedError

    @property
    def num_scores(self) -> int:
        """How many scores the first of the class layers gives: the classes, and of a detector the background."""
        return self.num_classes

    @nn.nowrap
    def spec(self) -> dict[str, Any]:
        """The arguments of `create_model` that make this network again, as JSON."""
        return {
            "name": self.architecture,
            "num_classes": self.num_classes,
            "attention": self.attention,
            "attention_param": self.attention_param,
            "dtype": self.dtype.name,
        }

    @nn.nowrap
    def with_backbone(self, **changes: Any) -> Self:
        """The same network with changed fields of the backbone, such as `dtype`."""
        return self.clone(backbone=self.backbone.clone(**changes))
