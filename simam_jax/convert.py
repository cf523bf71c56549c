"""Weights of the original PyTorch networks, both ways: `load_torch` and `python -m simam_jax.convert`.

The names correspond by rule. Our `_` is PyTorch's `.`, a kernel is a weight in another layout, and a few modules are
called or counted differently: see `_module_name`, which is the whole table.
"""

import argparse
import logging
import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.typing import DTypeLike

from simam_jax import errors
from simam_jax.models import create_model, init_variables, variable_shapes

VariablePath = tuple[str, ...]
State = dict[str, np.ndarray]  # a state_dict: PyTorch's names, layouts and shapes

HEAD = "fc"  # the classifier, in every network
_LEAVES = {"kernel": "weight", "scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}
_COUNTER = "num_batches_tracked"  # PyTorch's count of updates, in every batch norm; of no effect with a momentum


def torch_names(paths: Iterable[VariablePath], name: str, attention: str) -> dict[VariablePath, str]:
    """The original's name of each variable, by its path in our tree.

    Args:
        paths: of all variables, as ("params", "layer1_0", "conv2", "kernel").
        name: the network's, as in `list_models()`.
        attention: none, simam, se, cbam.
    """
    paths = list(paths)
    last = 3 if any("bn3" in path for path in paths) else 2  # the layers of a block
    rename = _module_name(name, attention, last)
    return {path: f"{rename('.'.join(path[1:-1]).replace('_', '.'))}.{_LEAVES[path[-1]]}" for path in paths}


def _module_name(name: str, attention: str, last: int) -> Callable[[str], str]:
    """How the original calls the module that we call `layer1.0.conv2`, say."""
    if name == "mobilenet_v2":
        return lambda module: _mobilenet_name(module, attention)
    rules = []
    # The original puts the attention and the layer before it into a sequence: `bn2` becomes `bn2.0`, then `bn2.1`.
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


def from_torch(
    state: State,
    name: str,
    *,
    num_classes: int | None = None,
    attention: str = "simam",
    attention_param: float | None = None,
    dtype: DTypeLike = jnp.float32,
    skip_head: bool = False,
    source: str = "The state_dict",
) -> tuple[nn.Module, dict[str, Any]]:
    """A network with the weights of a state_dict.

    Args:
        state: arrays by the original's names, with or without `module.` before all of them.
        name, attention, attention_param, dtype: as for `create_model`.
        num_classes: None: as many as the state_dict has.
        skip_head: leave the classifier as freshly drawn, for another number of classes.
        source: what an error calls the state_dict.

    Returns:
        The linen module and `{"params": ..., "batch_stats": ...}`.

    Raises:
        UserError: entries are missing, unexpected or of the wrong shape: all of them are listed.
    """
    if skip_head and num_classes is None:
        raise errors.UserError("skip_head draws a new classifier: say for how many classes, with num_classes.")
    if state and all(key.startswith("module.") for key in state):
        state = {key.removeprefix("module."): value for key, value in state.items()}
    state = {key: value for key, value in state.items() if not key.endswith(_COUNTER)}

    if num_classes is None:
        (head_bias,) = torch_names([("params", HEAD, "bias")], name, attention).values()
        num_classes = max(state[head_bias].size, 1) if head_bias in state else 1
    model = create_model(
        name, num_classes=num_classes, attention=attention, attention_param=attention_param, dtype=dtype
    )
    expected: dict[VariablePath, Any] = flatten_dict(variable_shapes(model))
    keys = torch_names(expected, name, attention)
    head = {path: key for path, key in keys.items() if path[1] == HEAD}
    if skip_head:
        state = {key: value for key, value in state.items() if key not in head.values()}
        keys = {path: key for path, key in keys.items() if path not in head}

    shapes = {key: _torch_shape(expected[path].shape) for path, key in keys.items()}
    problems = [f"  missing: {key} {shapes[key]}" for key in shapes if key not in state]
    problems += [f"  unexpected: {key} {state[key].shape}" for key in state if key not in shapes]
    problems += [
        f"  wrong shape: {key} is {state[key].shape}, must be {shape}"
        for key, shape in shapes.items()
        if key in state and state[key].shape != shape
    ]
    if problems:
        hint = "Check the model, the attention and its parameter"
        if not skip_head and any(key in line for line in problems for key in head.values()):
            hint += "; for another number of classes, skip the head"
        raise errors.UserError(
            "\n".join([f"{source} does not fit {name} with attention {attention}:", *problems, f"{hint}."])
        )

    arrays = {path: _from_torch_layout(state[key]).astype(expected[path].dtype) for path, key in keys.items()}
    variables: dict[VariablePath, Any] = jax.tree.map(jnp.asarray, arrays)
    if skip_head:
        drawn = init_variables(model, jax.random.key(0))["params"][HEAD]
        variables |= {path: drawn[path[-1]] for path in head}
    return model, unflatten_dict(variables)


def to_torch(variables: dict[str, Any], name: str, *, attention: str = "simam", prefix: str = "") -> State:
    """The state_dict that the original loads strictly; the inverse of `from_torch`, bit for bit.

    Args:
        variables: of `create_model(name, attention=attention, ...)`.
        name, attention: as for `create_model`.
        prefix: before every name; "module." for the original's ImageNet script, which wraps its networks.
    """
    flat: dict[VariablePath, Any] = flatten_dict(variables)
    state = {}
    for path, key in torch_names(flat, name, attention).items():
        state[prefix + key] = _to_torch_layout(np.asarray(flat[path]))
        if path[-1] == "mean":
            state[prefix + key.replace("running_mean", _COUNTER)] = np.zeros((), np.int64)
    return state


def _torch_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    return (shape[-1], shape[-2], *shape[:-2]) if len(shape) > 1 else shape


def _from_torch_layout(x: np.ndarray) -> np.ndarray:
    """(O, I, K, K) -> (K, K, I, O); (O, I) -> (I, O)."""
    return x.transpose((2, 3, 1, 0) if x.ndim == 4 else None)


def _to_torch_layout(x: np.ndarray) -> np.ndarray:
    return np.array(x.transpose((3, 2, 0, 1) if x.ndim == 4 else None), order="C")  # a copy: JAX's arrays are read-only


def load_torch(
    path: str | Path,
    name: str,
    *,
    num_classes: int | None = None,
    attention: str = "simam",
    attention_param: float | None = None,
    dtype: DTypeLike = jnp.float32,
    skip_head: bool = False,
) -> tuple[nn.Module, dict[str, Any]]:
    """A network with the weights of a file of the original.

        model, variables = load_torch("resnet50_simam.pth.tar", "resnet50", attention="simam", attention_param=0.1)

    Args:
        path: .safetensors, .npz, or what `torch.save` wrote: a state_dict, or a dict with one under "state_dict".
        The others as for `from_torch`.

    Returns:
        The linen module and `{"params": ..., "batch_stats": ...}`.

    Raises:
        UserError: no such file, not a file of weights, or weights of another network.
    """
    return from_torch(
        read_state(path),
        name,
        num_classes=num_classes,
        attention=attention,
        attention_param=attention_param,
        dtype=dtype,
        skip_head=skip_head,
        source=str(path),
    )


def read_state(path: str | Path) -> State:
    """The state_dict in a file, without ever running code from it. What stands beside it is left out with a notice.

    Raises:
        UserError: no such file, damaged, not a file of weights, or a library that reads it is not installed.
    """
    path = Path(path)
    if not path.is_file():
        raise errors.UserError(f"There is no file {path}.")
    try:
        state = _READERS.get(path.suffix, _read_torch)(path)
    except ImportError as error:
        raise errors.UserError(f"Reading {path} needs {error.name}: pip install 'simam-jax[torch]'.") from error
    except Exception as error:  # each format fails in its own ways on a damaged or foreign file
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise errors.UserError(
            f"{path} cannot be read as a file of weights: {reason} "
            "Is it complete, and a .pth, .pth.tar, .safetensors or .npz with nothing but tensors?"
        ) from error
    return state


def _read_torch(path: Path) -> State:
    import torch

    # NumPy's scalars are harmless, and training scripts leave them beside the weights (an accuracy, say).
    scalar = np.float64().__reduce__()[0]
    harmless: list[Any] = [(scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")]
    harmless += [np.dtype, *{type(np.dtype(code)) for code in np.typecodes["AllFloat"] + np.typecodes["AllInteger"]}]
    with torch.serialization.safe_globals(harmless):
        contents = torch.load(path, map_location="cpu", weights_only=True)
    if isinstance(contents, dict) and isinstance(contents.get("state_dict"), dict):
        beside = sorted(set(contents) - {"state_dict"})
        if beside:
            logging.warning("%s: only the weights are read, not %s.", path, ", ".join(beside))
        contents = contents["state_dict"]
    if not isinstance(contents, dict) or not all(isinstance(value, torch.Tensor) for value in contents.values()):
        raise ValueError("it holds no state_dict.")
    # NumPy knows no bfloat16.
    return {key: (x.float() if x.dtype == torch.bfloat16 else x).numpy() for key, x in contents.items()}


def _read_safetensors(path: Path) -> State:
    from safetensors.numpy import load_file

    return load_file(path)


def _read_npz(path: Path) -> State:
    with np.load(path, allow_pickle=False) as file:
        return dict(file)


def _write_torch(state: State, path: Path) -> None:
    import torch

    torch.save({"state_dict": {key: torch.from_numpy(value) for key, value in state.items()}}, path)


def _write_safetensors(state: State, path: Path) -> None:
    from safetensors.numpy import save_file

    save_file(state, path)


def _write_npz(state: State, path: Path) -> None:
    with open(path, "wb") as file:
        np.savez(file, **cast(dict[str, Any], state))


_READERS = {".safetensors": _read_safetensors, ".npz": _read_npz}
_WRITERS = {".safetensors": _write_safetensors, ".npz": _write_npz, ".pth": _write_torch, ".tar": _write_torch}


def write_state(state: State, path: str | Path) -> None:
    """Writes a state_dict as .safetensors, .npz, or for the original as .pth or .pth.tar (under "state_dict").

    Raises:
        UserError: the file exists, its ending says no format, or a library that writes it is not installed.
    """
    path = Path(path)
    if path.exists():
        raise errors.UserError(f"{path} exists already: nothing was written. Name another file.")
    if path.suffix not in _WRITERS:
        raise errors.unknown("ending", path.suffix, (".pth.tar", ".pth", ".safetensors", ".npz"))
    partial = path.with_name(path.name + ".part")
    try:
        _WRITERS[path.suffix](state, partial)
        os.replace(partial, path)
    except ImportError as error:
        raise errors.UserError(f"Writing {path} needs {error.name}: pip install 'simam-jax[torch]'.") from error
    except OSError as error:
        raise errors.UserError(f"{path} cannot be written: {error}.") from error
    finally:
        partial.unlink(missing_ok=True)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m simam_jax.convert",
        description="Turns a PyTorch checkpoint of the original into a workdir, or back with --to-torch.",
    )
    parser.add_argument(
        "source", help=".pth.tar, .pth, .safetensors or .npz; with --to-torch a workdir or a checkpoint in it"
    )
    parser.add_argument("dest", help="a new workdir; with --to-torch a new .pth.tar, .pth, .safetensors or .npz")
    parser.add_argument("--to-torch", action="store_true", help="write a state_dict that the original loads strictly")
    parser.add_argument(
        "--module-prefix",
        action="store_true",
        help="with --to-torch: `module.` before every name, as the original's ImageNet script has it",
    )
    parser.add_argument("--model", help="the network's name, such as resnet50 (not with --to-torch: the workdir knows)")
    parser.add_argument("--attention", default="simam", help="none, simam (default), se or cbam")
    parser.add_argument(
        "--attention-param", type=float, help="lambda of simam, reduction of se and cbam; default: the paper's"
    )
    parser.add_argument("--num-classes", type=int, help="default: as the file has it")
    parser.add_argument("--skip-head", action="store_true", help="draw a new classifier, for --num-classes classes")
    args = parser.parse_args(argv)
    if args.to_torch:
        _workdir_to_torch(args)
    else:
        _torch_to_workdir(args)
    print(f"Wrote {args.dest}")


def _torch_to_workdir(args: argparse.Namespace) -> None:
    from simam_jax import checkpoints

    if args.model is None:
        raise errors.UserError("Say which network the file is of, with --model (such as --model resnet50).")
    dest = Path(args.dest)
    if dest.exists() and not (dest.is_dir() and not any(dest.iterdir())):
        raise errors.UserError(f"{dest} exists already: nothing was written. Name a new folder.")
    model, variables = load_torch(
        args.source,
        args.model,
        num_classes=args.num_classes,
        attention=args.attention,
        attention_param=args.attention_param,
        skip_head=args.skip_head,
    )
    spec = model.spec()  # pyright: ignore
    checkpoints.write_weights(dest, {"task": "classification", "model": spec}, variables)


def _workdir_to_torch(args: argparse.Namespace) -> None:
    from simam_jax import checkpoints, weights

    spec = checkpoints.read_meta(args.source)["model"]
    _, variables = weights.load(args.source)
    prefix = "module." if args.module_prefix else ""
    write_state(to_torch(variables, spec["name"], attention=spec["attention"], prefix=prefix), args.dest)


if __name__ == "__main__":
    errors.run_cli(main)
