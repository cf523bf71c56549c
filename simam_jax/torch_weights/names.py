"""How variables are called and laid out in PyTorch: our tree and the reference implementation's state_dict, both ways.

The names correspond by rule. Our `_` is PyTorch's `.`, a kernel is a weight in another layout, and a few modules are
called or counted differently: see `_module_name` and, for detectors, `_detector_name`, which are the whole table.
"""

import re
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict

from simam_jax.models import MODELS

VariablePath = tuple[str, ...]
State = dict[str, np.ndarray]  # a state_dict: PyTorch's names, layouts and shapes

COUNTER = "num_batches_tracked"  # PyTorch's count of updates, in every batch norm; of no effect with a momentum
_ROI = (7, 7)  # places of a roi's map that a detector's box head looks at
_LEAVES = {"kernel": "weight", "scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}


def torch_names(paths: Iterable[VariablePath], name: str, attention: str) -> dict[VariablePath, str]:
    """The reference implementation's name of each variable, by its path in our tree.

    Args:
        paths: of all variables, as ("params", "layer1_0", "conv2", "kernel").
        name: the network's, as in `list_models()`.
        attention: none, simam, se, cbam.
    """
    paths = list(paths)
    last = 3 if any("bn3" in path for path in paths) else 2  # the layers of a block
    rename = _module_name(name, attention, last)

    def module(modules: VariablePath) -> str:
        if MODELS[name].task == "classification":
            return rename(".".join(modules).replace("_", "."))
        if modules[0] == "backbone":
            return "backbone." + rename(".".join(modules[1:]).replace("_", "."))
        return _detector_name(modules)

    return {path: f"{module(path[1:-1])}.{_LEAVES[path[-1]]}" for path in paths}


def _detector_name(modules: VariablePath) -> str:
    """How mmdetection calls a part of a detector behind the backbone."""
    name = ".".join(re.sub(r"_(\d+)$", r".\1", module) for module in modules)
    if modules[0] in ("bbox_head", "mask_head"):
        name = f"roi_head.{name}"
    return f"{name}.conv" if "convs." in name else name


def _module_name(name: str, attention: str, last: int) -> Callable[[str], str]:
    """How the reference implementation calls the module that we call `layer1.0.conv2`, say."""
    if name == "mobilenet_v2":
        return lambda module: _mobilenet_name(module, attention)
    rules = []
    # The reference implementation puts the attention and the layer before it into a sequence: `bn2` becomes `bn2.0`, then `bn2.1`.
    if attention == "simam":
        rules += [(r"\.conv2$", ".conv2.0")]
    elif attention != "none":
        host = f"{'conv' if name.startswith(('cifar_preresnet', 'cifar_wideresnet')) else 'bn'}{last}"
        rules += [(rf"\.{host}$", f".{host}.0"), (r"\.attention\b", f".{host}.1")]
    if name.startswith("cifar_wideresnet"):
        rules += [(r"^layer(\d)", r"block\1.layer"), (r"downsample\.0", "convShortcut"), (r"^bn$", "bn1")]
    elif name.startswith("cifar_"):
        rules += [(r"^fc$", "linear"), (r"\bdownsample\b", "shortcut")]

    def rename(module: str) -> str:
        for pattern, replacement in rules:
            module = re.sub(pattern, replacement, module)
        return module

    return rename


def _mobilenet_name(module: str, attention: str) -> str:
    """The same for ImageNet's mobilenet_v2, which has numbers where the others have names."""
    block = re.fullmatch(r"layers\.(\d+)\.(\w+)(.*)", module)
    if not block:
        stem_and_head = {
            "conv1": "features.0.0",
            "bn1": "features.0.1",
            "conv2": "features.18.0",
            "bn2": "features.18.1",
        }
        return (stem_and_head | {"fc": "classifier.0"})[module]
    index, layer, inside = int(block[1]), block[2], block[3]
    first, *second = {
        "conv1": (0, 0),
        "bn1": (0, 1),
        "conv2": (1, 0),
        "bn2": (1, 2 if attention == "simam" else 1),
        "conv3": (2,),
        "bn3": (3,),
        "attention": (4,),
    }[layer]
    first -= index == 0  # the first block has no expansion
    return ".".join(map(str, ("features", index + 1, "conv", first, *second))) + inside


def to_torch(variables: dict[str, Any], name: str, *, attention: str = "simam", prefix: str = "") -> State:
    """The state_dict that the reference implementation loads strictly; the inverse of `from_torch`, bit for bit.

    Args:
        variables: of `create_model(name, attention=attention, ...)`.
        name, attention: as for `create_model`.
        prefix: before every name; "module." for its ImageNet script, which wraps its networks.
    """
    flat: dict[VariablePath, Any] = flatten_dict(variables)
    state = {}
    for path, key in torch_names(flat, name, attention).items():
        state[prefix + key] = to_torch_layout(path, np.asarray(flat[path]))
        if path[-1] == "mean":
            state[prefix + key.replace("running_mean", COUNTER)] = np.zeros((), np.int64)
    return state


def torch_shape(path: VariablePath, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of our array in PyTorch: (O, I, K, K) for (K, K, I, O), (O, I) for (I, O)."""
    return to_torch_layout(path, np.broadcast_to(np.int8(0), shape)).shape


def from_torch_layout(path: VariablePath, x: np.ndarray) -> np.ndarray:
    """(O, I, K, K) -> (K, K, I, O); (O, I) -> (I, O)."""
    if "upsample" in path and x.ndim == 4:  # transposed convolutions have their inputs first
        return x.transpose(2, 3, 0, 1)
    if "shared_fcs_0" in path and x.ndim == 2:  # looks at a flattened map: (C, H, W) there, (H, W, C) here
        return x.reshape(len(x), -1, *_ROI).transpose(2, 3, 1, 0).reshape(-1, len(x))
    return x.transpose((2, 3, 1, 0) if x.ndim == 4 else None)


def to_torch_layout(path: VariablePath, x: np.ndarray) -> np.ndarray:
    """The inverse of `from_torch_layout`."""
    if "upsample" in path and x.ndim == 4:
        y = x.transpose(2, 3, 0, 1)
    elif "shared_fcs_0" in path and x.ndim == 2:
        y = x.reshape(*_ROI, -1, x.shape[1]).transpose(3, 2, 0, 1).reshape(x.shape[1], -1)
    else:
        y = x.transpose((3, 2, 0, 1) if x.ndim == 4 else None)
    return np.array(y, order="C")  # a copy: JAX's arrays are read-only
