"""The weights of the reference detectors: drawn entry by entry, as tests/golden/detection/README.md says, in our tree."""

import math
import re

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from simam_jax.models import create_model, variable_shapes

FACTORS = {
    "bn3.weight": 0.2, "rpn_cls.weight": 0.2, "rpn_reg.weight": 0.02, "fc_reg.weight": 0.08, "conv_logits.weight": 0.2,
}  # fmt: skip
LEAVES = {"kernel": "weight", "scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}


def key_of(path: tuple[str, ...]) -> str:
    """The reference implementation's name of a variable of ours with SimAM."""
    _, *modules, leaf = path
    if modules[0] in ("bbox_head", "mask_head"):
        modules.insert(0, "roi_head")
    name = ".".join(re.sub(r"_(\d+)$", r".\1", module) for module in modules)
    if "backbone.layer" in name:
        name = name.removesuffix("conv2") + "conv2.0" if name.endswith("conv2") else name
    if "lateral_convs" in name or "fpn_convs" in name or "mask_head.convs" in name:
        name += ".conv"
    return f"{name}.{LEAVES[leaf]}"


def to_torch(path: tuple[str, ...], x: np.ndarray) -> np.ndarray:
    """A variable (or its gradient) in the reference implementation's layout."""
    if "upsample" in path and x.ndim == 4:
        return x.transpose(2, 3, 0, 1)
    if "shared_fcs_0" in path and x.ndim == 2:
        return x.reshape(7, 7, 256, -1).transpose(3, 2, 0, 1).reshape(x.shape[1], -1)
    return {4: lambda: x.transpose(3, 2, 0, 1), 2: lambda: x.T, 1: lambda: x}[x.ndim]()


def from_torch(path: tuple[str, ...], x: np.ndarray) -> np.ndarray:
    """The inverse."""
    if "upsample" in path and x.ndim == 4:
        return x.transpose(2, 3, 0, 1)
    if "shared_fcs_0" in path and x.ndim == 2:
        return x.reshape(-1, 256, 7, 7).transpose(2, 3, 1, 0).reshape(-1, len(x))
    return {4: lambda: x.transpose(2, 3, 1, 0), 2: lambda: x.T, 1: lambda: x}[x.ndim]()


def torch_shape(path: tuple[str, ...], shape: tuple[int, ...]) -> tuple[int, ...]:
    return to_torch(path, np.broadcast_to(np.float32(0), shape)).shape


_PARTS = ("conv1.weight", "bn1", "layer", "lateral", "fpn_convs", "rpn_conv", "rpn_cls", "rpn_reg", "fc_cls", "fc_reg")
_PARTS += ("shared_fcs.0", "shared_fcs.1", "mask_head.convs", "upsample", "conv_logits")
_LAYERS = ("conv1", "bn1", "conv2", "bn2", "conv3", "bn3", "downsample.0", "downsample.1")
_LEAVES = ("weight", "bias", "running_mean", "running_var")


def _order(key: str) -> tuple:
    """Sorts names as the reference implementation's `state_dict` has them."""
    key = key.removeprefix("backbone.")
    if block := re.match(r"layer(\d)\.(\d+)\.(.+)\.(\w+)$", key):
        layer = block[3].removesuffix(".0") if block[3] == "conv2.0" else block[3]
        return 2, int(block[1]), int(block[2]), _LAYERS.index(layer), _LEAVES.index(block[4])
    part = next(i for i, name in enumerate(_PARTS) if name in key)
    number = re.search(r"convs\.(\d)", key)
    return part, int(number[1]) if number else 0, 0, 0, _LEAVES.index(key.rpartition(".")[2])


def golden_model(name: str):
    """A model and its variables: `faster_rcnn_resnet50_fpn` and so on, with SimAM at 0.1."""
    model = create_model(name, attention="simam", attention_param=0.1)
    paths = {path: leaf.shape for path, leaf in flatten_dict(variable_shapes(model)).items()}
    fc_cls = 0.12 if model.masks else 0.035
    variables = {}
    for index, path in enumerate(sorted(paths, key=lambda path: _order(key_of(path)))):
        key, shape = key_of(path), torch_shape(path, paths[path])
        factor = fc_cls if key.endswith("fc_cls.weight") else FACTORS.get(".".join(key.split(".")[-2:]), 1.0)
        rng, factor = np.random.default_rng(1000 + index), np.float32(factor)
        if path[-1] == "var" or path[-1] == "scale":
            x = rng.uniform(0.5, 1.5, shape).astype(np.float32) * factor
        elif path[-1] == "kernel":
            x = rng.standard_normal(shape, dtype=np.float32) * np.float32(math.sqrt(2 / np.prod(shape[1:]))) * factor
        else:
            norm = path[-1] == "mean" or "scale" in {p[-1] for p in paths if p[1:-1] == path[1:-1]}
            x = rng.standard_normal(shape, dtype=np.float32) * np.float32(0.1 if norm else 0.01)
        variables[path] = np.ascontiguousarray(from_torch(path, x))
    return model, unflatten_dict(variables)


def named(tree) -> dict[str, np.ndarray]:
    """Parameters, or their gradients, by the reference implementation's names and in its layout."""
    return {key_of(("params", *path)): to_torch(path, np.asarray(x)) for path, x in flatten_dict(tree).items()}
