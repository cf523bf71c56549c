"""A classifier: a backbone and a head."""

from collections.abc import Callable

import jax
from flax import linen as nn

from simam_jax.layers import Linear
from simam_jax.models.backbone import as_images
from simam_jax.models.network import Network
from simam_jax.ops.pooling import global_average

HEAD = "fc"  # the name of the head among the parameters


class Classifier(Network, kw_only=True):
    """A classifier of images: `model.apply(variables, x, train=False, features=False)`.

    x is (N, H, W, 3), floating and normalised. The logits are (N, num_classes), float32 (float64 if `dtype` is).
    With `features` the result is (logits, {"layer1": (N, H1, W1, C1), ...}), the output of each stage in `dtype`.
    With `train`, batch norm uses the batch's statistics and "batch_stats" must be mutable; networks with dropout
    also need `rngs={"dropout": key}`.

    The backbone's variables stand beside the head's, without a level of their own, as in PyTorch's networks.
    """

    head: Callable[..., nn.Module] = Linear

    @property
    def class_layers(self) -> tuple[tuple[str, ...], ...]:
        return ((HEAD,),)

    def setup(self):
        nn.share_scope(self, self.backbone)
        self.fc = self.head(self.num_classes)

    def __call__(
        self, x: jax.Array, train: bool = False, features: bool = False
    ) -> jax.Array | tuple[jax.Array, dict[str, jax.Array]]:
        pooled, stages = self.backbone(as_images(x, self.backbone.dtype), train)
        logits = self.fc(global_average(pooled))
        return (logits, stages) if features else logits
