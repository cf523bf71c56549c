"""The networks by name, with what each was made for: `create_model(name, ...)`, `create_backbone(name, ...)`."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax.numpy as jnp
from jax.typing import DTypeLike

from simam_jax import errors
from simam_jax.attention import KINDS
from simam_jax.initializers import he_normal, torch_uniform, zeros
from simam_jax.layers import Linear
from simam_jax.models.backbone import Backbone
from simam_jax.models.blocks import BasicBlock, Bottleneck, PreActBlock, PreActBottleneck
from simam_jax.models.classifier import Classifier
from simam_jax.models.detector import Detector
from simam_jax.models.mobilenet_v2 import MobileNetLinear, MobileNetV2
from simam_jax.models.network import Network
from simam_jax.models.preact_resnet import PreActResNet
from simam_jax.models.resnet import ResNet
from simam_jax.preprocessing import CIFAR, COCO, IMAGENET, DetectionPreprocessing, Preprocessing


@dataclass(frozen=True)
class Architecture:
    """What stands behind a name.

    Attributes:
        backbone: makes the backbone.
        network: makes the network around it.
        task: what it is for, a name in `simam_jax.tasks`.
        num_classes: of the data set that the reference implementation trains it on; for CIFAR's networks of CIFAR-10.
        preprocessing: what the reference implementation feeds it with.
        e_lambda: SimAM's lambda there.
        classifier: of a detector, the network whose weights its backbone starts from.
    """

    backbone: Callable[..., Backbone]
    network: Callable[..., Network] = Classifier
    task: str = "classification"
    num_classes: int = 1000
    preprocessing: Preprocessing | DetectionPreprocessing = IMAGENET
    e_lambda: float = 0.1
    classifier: str = ""


_Cifar = partial(Architecture, num_classes=10, preprocessing=CIFAR, e_lambda=1e-4)
_ResNeXtBottleneck = partial(Bottleneck, groups=32, group_width=4)
_CifarResNet = partial(ResNet, width=16, stem="3x3", kernel_init=torch_uniform)
_WideResNet = partial(
    PreActResNet, block=partial(PreActBlock, wide=True), width=160, dropout_rate=0.3, kernel_init=he_normal
)
_wide_resnet = replace(_Cifar(_WideResNet), network=partial(Classifier, head=partial(Linear, bias_init=zeros)))
# depth: blocks in each of the three stages, of basic and of bottleneck blocks
_CIFAR_DEPTHS = {20: (3, 3), 32: (5, 5), 56: (9, 6), 110: (18, 12), 164: (27, 18)}

MODELS: dict[str, Architecture] = {
    "resnet18": Architecture(partial(ResNet, block=BasicBlock, stage_sizes=(2, 2, 2, 2))),
    "resnet34": Architecture(partial(ResNet, block=BasicBlock, stage_sizes=(3, 4, 6, 3))),
    "resnet50": Architecture(partial(ResNet, block=Bottleneck, stage_sizes=(3, 4, 6, 3))),
    "resnet101": Architecture(partial(ResNet, block=Bottleneck, stage_sizes=(3, 4, 23, 3))),
    "resnet152": Architecture(partial(ResNet, block=Bottleneck, stage_sizes=(3, 8, 36, 3))),
    "resnet50d": Architecture(
        partial(ResNet, block=partial(Bottleneck, pool=True), stage_sizes=(3, 4, 6, 3), stem="deep")
    ),
    "resnext50_32x4d": Architecture(partial(ResNet, block=_ResNeXtBottleneck, stage_sizes=(3, 4, 6, 3))),
    "mobilenet_v2": Architecture(MobileNetV2, partial(Classifier, head=MobileNetLinear)),
    "cifar_mobilenet_v2": _Cifar(partial(MobileNetV2, cifar=True)),
    "cifar_wideresnet28x10": replace(_wide_resnet, backbone=partial(_WideResNet, stage_sizes=(4, 4, 4))),
    "cifar_wideresnet40x10": replace(_wide_resnet, backbone=partial(_WideResNet, stage_sizes=(6, 6, 6))),
}
for _depth, (_basic, _bottleneck) in _CIFAR_DEPTHS.items():
    MODELS |= {
        f"cifar_resnet{_depth}": _Cifar(partial(_CifarResNet, block=BasicBlock, stage_sizes=3 * (_basic,))),
        f"cifar_resnet{_depth}_bottleneck": _Cifar(
            partial(_CifarResNet, block=Bottleneck, stage_sizes=3 * (_bottleneck,))
        ),
        f"cifar_preresnet{_depth}": _Cifar(partial(PreActResNet, block=PreActBlock, stage_sizes=3 * (_basic,))),
        f"cifar_preresnet{_depth}_bottleneck": _Cifar(
            partial(PreActResNet, block=PreActBottleneck, stage_sizes=3 * (_bottleneck,))
        ),
    }

for _depth in (18, 50, 101):
    _resnet = f"resnet{_depth}"
    _Coco = partial(
        Architecture, MODELS[_resnet].backbone, task="detection", num_classes=80, preprocessing=COCO, classifier=_resnet
    )
    MODELS |= {
        f"faster_rcnn_resnet{_depth}_fpn": _Coco(Detector),
        f"mask_rcnn_resnet{_depth}_fpn": _Coco(partial(Detector, masks=True)),
    }

# For quick tries, tests and the notebook: nothing of the reference implementation's.
_tiny = partial(Detector, width=48, hidden=256, sampled_rois=32)
_Tiny = partial(
    Architecture,
    partial(ResNet, block=BasicBlock, stage_sizes=(1, 1, 1, 1), width=32),
    task="detection",
    num_classes=80,
    preprocessing=COCO,
)
MODELS |= {"faster_rcnn_tiny_fpn": _Tiny(_tiny), "mask_rcnn_tiny_fpn": _Tiny(partial(_tiny, masks=True))}

ATTENTIONS = ("none", *KINDS)
DTYPES = ("float32", "bfloat16", "float16", "float64")


def list_models(task: str | None = None) -> list[str]:
    """The names that `create_model` knows: all, or those for "classification" or "detection"."""
    return [name for name, architecture in MODELS.items() if task in (None, architecture.task)]


def create_model(
    name: str, *, num_classes: int | None = None, min_bbox_size: float | None = None, **settings: Any
) -> Any:
    """The network of that name: a `models.classifier.Classifier` or a `models.detector.Detector`.

    Args:
        name: one of `list_models()`.
        num_classes: the number of classes; of a detector, of objects. None: 1,000 for ImageNet's networks, 10 for CIFAR's,
            80 for detectors.
        min_bbox_size: of a detector, pixels that a proposal must exceed in width and height. None: none is dropped, as in
            mmdetection 2.9; 0 is what later versions do.
        settings: as for `create_backbone`.

    Raises:
        UserError: a name that is in no table, or a number out of range.
    """
    backbone = create_backbone(name, **settings)
    if num_classes is None:
        num_classes = MODELS[name].num_classes
    if num_classes < 1:
        raise errors.UserError(f"num_classes must be at least 1, got {num_classes}.")
    options = {}
    if min_bbox_size is not None:
        if MODELS[name].task != "detection":
            raise errors.UserError(f"min_bbox_size is a detector's, and {name} is none.")
        options["min_bbox_size"] = float(min_bbox_size)
    return MODELS[name].network(architecture=name, backbone=backbone, num_classes=num_classes, **options)


def create_backbone(
    name: str,
    *,
    attention: str = "simam",
    attention_param: float | None = None,
    dtype: DTypeLike = jnp.float32,
    bn_group_size: int = 0,
    axis_name: str | None = None,
    trace_blocks_once: bool = False,
) -> Backbone:
    """The network of that name without its head, to be used as `models.backbone.Backbone` says.

    Args:
        name: one of `list_models()`.
        attention: none, simam, se or cbam, placed in the blocks as the reference implementation places it.
        attention_param: lambda for simam, the reduction for se and cbam. None: the paper's, which is lambda 0.1 for
            ImageNet's networks and 1e-4 for CIFAR's, and a reduction of 16.
        dtype: of the computation: float32, bfloat16, float16, or float64 (with jax_enable_x64).
        bn_group_size: images per batch-norm statistic in training; 0: all of one device. See `layers.BatchNorm`.
        axis_name: the mesh axis of a surrounding `jax.shard_map`, over which training batches are sharded.
        trace_blocks_once: JAX traces equal blocks once, which starts sooner: see `blocks.traced_once`.

    Raises:
        UserError: a name that is in no table, or a number out of range.
    """
    if name not in MODELS:
        raise errors.unknown("model", name, MODELS)
    if attention not in ATTENTIONS:
        raise errors.unknown("attention", attention, ATTENTIONS)
    if bn_group_size < 0:
        raise errors.UserError(f"bn_group_size must be 0 (the images of one device) or more, got {bn_group_size}.")
    return MODELS[name].backbone(
        attention=attention,
        attention_param=_attention_param(MODELS[name], attention, attention_param),
        dtype=_dtype(dtype),
        bn_group_size=bn_group_size,
        axis_name=axis_name,
        trace_blocks_once=trace_blocks_once,
    )


def _attention_param(architecture: Architecture, attention: str, value: float | None) -> float:
    if attention == "none":
        return 0.0
    if value is None:
        value = architecture.e_lambda if attention == "simam" else 16.0
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
