"""The networks by name: `create_model(name, ...)`, `list_models()`."""

from collections.abc import Callable
from functools import partial

import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike

from simam_jax import errors
from simam_jax.layers import he_normal, torch_uniform
from simam_jax.models.blocks import BasicBlock, Bottleneck, PreActBlock, PreActBottleneck
from simam_jax.models.mobilenet_v2 import MobileNetV2
from simam_jax.models.network import Network, init_variables, variable_shapes
from simam_jax.models.preact_resnet import PreActResNet
from simam_jax.models.resnet import ResNet

_ResNeXtBottleneck = partial(Bottleneck, groups=32, group_width=4)
_CifarResNet = partial(ResNet, width=16, stem="3x3", kernel_init=torch_uniform)
_WideResNet = partial(
    PreActResNet,
    block=partial(PreActBlock, wide=True),
    width=160,
    dropout_rate=0.3,
    kernel_init=he_normal,
    head_bias_init=nn.initializers.zeros,
)
# depth: blocks in each of the three stages, of basic and of bottleneck blocks
_CIFAR_DEPTHS = {20: (3, 3), 32: (5, 5), 56: (9, 6), 110: (18, 12), 164: (27, 18)}

MODELS: dict[str, Callable[..., Network]] = {
    "resnet18": partial(ResNet, block=BasicBlock, stage_sizes=(2, 2, 2, 2)),
    "resnet34": partial(ResNet, block=BasicBlock, stage_sizes=(3, 4, 6, 3)),
    "resnet50": partial(ResNet, block=Bottleneck, stage_sizes=(3, 4, 6, 3)),
    "resnet101": partial(ResNet, block=Bottleneck, stage_sizes=(3, 4, 23, 3)),
    "resnet152": partial(ResNet, block=Bottleneck, stage_sizes=(3, 8, 36, 3)),
    "resnet50d": partial(ResNet, block=partial(Bottleneck, pool=True), stage_sizes=(3, 4, 6, 3), stem="deep"),
    "resnext50_32x4d": partial(ResNet, block=_ResNeXtBottleneck, stage_sizes=(3, 4, 6, 3)),
    "mobilenet_v2": MobileNetV2,
    "cifar_mobilenet_v2": partial(MobileNetV2, cifar=True),
    "cifar_wideresnet28x10": partial(_WideResNet, stage_sizes=(4, 4, 4)),
    "cifar_wideresnet40x10": partial(_WideResNet, stage_sizes=(6, 6, 6)),
}
for _depth, (_basic, _bottleneck) in _CIFAR_DEPTHS.items():
    MODELS |= {
        f"cifar_resnet{_depth}": partial(_CifarResNet, block=BasicBlock, stage_sizes=3 * (_basic,)),
        f"cifar_resnet{_depth}_bottleneck": partial(_CifarResNet, block=Bottleneck, stage_sizes=3 * (_bottleneck,)),
        f"cifar_preresnet{_depth}": partial(PreActResNet, block=PreActBlock, stage_sizes=3 * (_basic,)),
        f"cifar_preresnet{_depth}_bottleneck": partial(
            PreActResNet, block=PreActBottleneck, stage_sizes=3 * (_bottleneck,)
        ),
    }

__all__ = ["ATTENTIONS", "MODELS", "create_model", "init_variables", "list_models", "variable_shapes"]

ATTENTIONS = ("none", "simam", "se", "cbam")
DTYPES = ("float32", "bfloat16", "float16", "float64")


def list_models() -> list[str]:
    """The names that `create_model` knows."""
    return list(MODELS)


def create_model(
    name: str,
    *,
    num_classes: int,
    attention: str = "simam",
    attention_param: float | None = None,
    dtype: DTypeLike = jnp.float32,
    bn_group_size: int = 0,
    axis_name: str | None = None,
) -> Network:
    """The network of that name, to be used as `models.network.Network` says.

    Args:
        name: one of `list_models()`.
        num_classes: the number of logits.
        attention: none, simam, se or cbam, placed in the blocks as the original places it.
        attention_param: lambda for simam, the reduction for se and cbam. None: the paper's, which is lambda 0.1 for
            ImageNet's networks and 1e-4 for CIFAR's, and a reduction of 16.
        dtype: of the computation: float32, bfloat16, float16, or float64 (with jax_enable_x64).
        bn_group_size: images per batch-norm statistic in training; 0: all of one device. See `layers.BatchNorm`.
        axis_name: the mesh axis of a surrounding `jax.shard_map`, over which training batches are cut.

    Raises:
        UserError: a name that is in no table, or a number out of range.
    """
    if name not in MODELS:
        raise errors.unknown("model", name, MODELS)
    if attention not in ATTENTIONS:
        raise errors.unknown("attention", attention, ATTENTIONS)
    if num_classes < 1:
        raise errors.UserError(f"num_classes must be at least 1, got {num_classes}.")
    if bn_group_size < 0:
        raise errors.UserError(f"bn_group_size must be 0 (the images of one device) or more, got {bn_group_size}.")
    return MODELS[name](
        num_classes=num_classes,
        attention=attention,
        attention_param=_attention_param(name, attention, attention_param),
        dtype=_dtype(dtype),
        bn_group_size=bn_group_size,
        axis_name=axis_name,
    )


def _attention_param(name: str, attention: str, value: float | None) -> float:
    if attention == "none":
        return 0.0
    if value is None:
        value = 16.0 if attention != "simam" else 1e-4 if name.startswith("cifar_") else 0.1
    if attention == "simam" and not 0 < value < float("inf"):
        raise errors.UserError(f"SimAM's lambda (attention_param) must be positive and finite, got {value}.")
    if attention != "simam" and not (value >= 1 and float(value).is_integer()):
        raise errors.UserError(
            f"The reduction of {attention} (attention_param) must be a whole number >= 1, got {value}."
        )
    return float(value)


def _dtype(value: DTypeLike) -> jnp.dtype:
    name = value if isinstance(value, str) else jnp.dtype(value).name
    if name not in DTYPES:
        raise errors.unknown("dtype", name, DTYPES)
    if name == "float64" and jnp.result_type(float) != jnp.float64:
        raise errors.UserError("dtype float64 needs JAX's 64-bit mode: set JAX_ENABLE_X64=1 in the environment.")
    return jnp.dtype(name)
