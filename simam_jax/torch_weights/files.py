"""Files of weights, read without ever running code from them, and written: .pth, .pth.tar, .safetensors, .npz."""

import io
import json
import logging
import os
import re
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np

from simam_jax import errors
from simam_jax.paths import local
from simam_jax.torch_weights.names import COUNTER, State

logger = logging.getLogger(__name__)
ENDINGS = (".pth.tar", ".pth", ".safetensors", ".npz")
ABOUT = "simam_jax"  # under this name a file of ours says what its weights are for
KEYS = ("state_dict", "model", "net", "model_state_dict", "weights")  # where training scripts put the weights
EMA_KEYS = ("state_dict_ema", "model_ema", "ema")  # and their exponential moving average
NO_WEIGHTS = (COUNTER, "total_ops", "total_params", "n_averaged")  # counters of batch norm, FLOP tools and averages
PREFIXES = ("module.", "_orig_mod.", "model.", "net.", "backbone.")  # of DataParallel, torch.compile and wrappers
_SLACK = 2**27  # bytes that an .npz may unpack to beyond four times its size


class Contents(NamedTuple):
    """What a file holds: the weights by PyTorch's names, and what it says of them: of others' files, at most class names."""

    state: State
    about: Mapping[str, Any]


def read_state(path: str | os.PathLike[str], *, key: str | None = None, ema: bool = False) -> Contents:
    """The weights in a file. What stands beside them is left out with a notice.

    Args:
        path: a .safetensors, an .npz, or what `torch.save` wrote.
        key: where in the file the weights are, if there are several places.
        ema: take the exponential moving average.

    Raises:
        UserError: no such file, damaged, not a file of weights, or a library that reads it is not installed.
    """
    path = local(path)
    if not path.is_file():
        raise errors.UserError(f"There is no file {path}.")
    _refuse_what_was_downloaded_wrongly(path)
    reader = {".safetensors": _read_safetensors, ".npz": _read_npz}.get(path.suffix.lower(), _read_torch)
    try:
        with errors.naming_extras():
            contents, about = reader(path)
        entries = _choose(contents, path, key, ema)
    except errors.UserError:
        raise
    except Exception as error:  # each format fails in its own ways on a damaged or foreign file
        raise errors.UserError(
            f"{path} cannot be read as a file of weights: {_reason(error)} "
            "Is it complete, and a .pth, .pth.tar, .safetensors or .npz with nothing but tensors?"
        ) from error
    return Contents(_cleaned(entries, path), about)


def _reason(error: Exception) -> str:
    """The first line of the error, without terminal codes and without torch's advice to turn its safety off."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(error))
    if refused := re.search(r"(?:Unsupported global: GLOBAL|Unsupported class) ([\w.]+)", text):
        return (
            f"it holds an object of {refused[1]}, and to read that would run code of the file. Save the weights alone."
        )
    if "weights_only" in text:  # what else torch's reader of plain data says, of files of noise too
        return "it is no plain data that torch.save wrote."
    return (text.strip() or type(error).__name__).splitlines()[0]


def _refuse_what_was_downloaded_wrongly(path: Path) -> None:
    with path.open("rb") as file:
        start = file.read(512).lstrip().lower()
    if start.startswith((b"<!doctype html", b"<html")):
        raise errors.UserError(f"{path} is an HTML page and no file of weights: download the file itself.")
    if start.startswith(b"version https://git-lfs"):
        raise errors.UserError(f"{path} is a Git LFS pointer and no file of weights: run `git lfs pull`.")


# ---- which entries are the weights


def _choose(contents: Any, path: Path, key: str | None, ema: bool) -> Mapping[str, Any]:
    """The dictionary of weights in what a file held."""
    if not isinstance(contents, Mapping):
        raise ValueError("it holds no state_dict.")
    held = [name for name in contents if isinstance(contents[name], Mapping) and _is_state(contents[name])]
    if key is not None:
        if key not in held:
            raise errors.unknown(f"key of weights in {path}", key, map(str, held or ["none: the weights are bare"]))
        return _noticed(contents, key, path)
    wanted = [name for name in (EMA_KEYS if ema else KEYS) if name in held]
    if ema and not wanted:
        raise errors.UserError(
            f"{path} holds no average of the weights ({', '.join(EMA_KEYS)}), only {_list(contents)}."
        )
    if len(wanted) > 1:
        raise errors.UserError(f"{path} holds weights under {_list(wanted)}: choose one with --key (key=).")
    if wanted:
        return _noticed(contents, wanted[0], path)
    if _is_state(contents):
        return contents
    if len(held) == 1 and not any(name in EMA_KEYS for name in held):
        return _noticed(contents, held[0], path)
    where = f"it holds weights under {_list(held)}: choose one with --key (key=)" if held else "it holds no state_dict"
    raise ValueError(f"{where}.")


def _noticed(contents: Mapping[str, Any], key: str, path: Path) -> Mapping[str, Any]:
    beside = [name for name in contents if name not in (key, ABOUT)]
    if beside:
        logger.warning("%s: only the weights under %r are read, not %s.", path, key, _list(beside))
    return contents[key]


def _is_state(entries: Mapping[Any, Any]) -> bool:
    """Whether most of the entries are arrays with names."""
    arrays = [name for name, x in entries.items() if isinstance(name, str) and hasattr(x, "shape")]
    return 2 * len(arrays) > len(entries)


def _list(names: Iterable[Any]) -> str:
    return ", ".join(sorted(map(str, names)))


def _cleaned(entries: Mapping[str, Any], path: Path) -> State:
    """The weights among the entries, without the prefixes of wrappers; what is left out or stripped is said once."""
    state = {name: _array(x) for name, x in entries.items() if isinstance(name, str) and hasattr(x, "shape")}
    weights = {name: x for name, x in state.items() if not name.endswith(NO_WEIGHTS)}
    notices = []
    counters = sum(name.endswith(COUNTER) for name in state)
    if others := len(entries) - len(weights) - counters:
        notices.append(
            "left out " + ("1 entry that is no weight" if others == 1 else f"{others} entries that are no weights")
        )
    stripped = ""
    while weights and (prefix := next((p for p in PREFIXES if _encloses(p, weights)), "")):
        stripped += prefix
        weights = {name.removeprefix(prefix): x for name, x in weights.items()}
    if stripped:
        notices.append(f"stripped {stripped!r} from the names")
    if notices:
        logger.warning("%s: %s.", path, ", ".join(notices))
    return weights


def _encloses(prefix: str, weights: State) -> bool:
    """Whether all weights stand under a wrapper's prefix, up to a few foreign ones beside them."""
    return 10 * sum(name.startswith(prefix) for name in weights) >= 9 * len(weights)


def _array(x: Any) -> np.ndarray:
    if isinstance(x, np.ndarray | np.generic):
        return np.asarray(x)
    import torch

    # NumPy knows no bfloat16.
    return (x.detach().float() if x.dtype == torch.bfloat16 else x.detach()).cpu().numpy()


# ---- reading


def _read_torch(path: Path) -> tuple[Any, Mapping[str, Any]]:
    import argparse

    import torch

    # Harmless, and left beside the weights by training scripts: an accuracy of NumPy's, the arguments.
    scalar = np.float64().__reduce__()[0]
    array = np.zeros(0).__reduce__()[0]
    harmless: list[Any] = [(scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")]
    harmless += [(array, f"numpy.{core}.multiarray._reconstruct") for core in ("core", "_core")]
    harmless += [np.dtype, np.ndarray, argparse.Namespace, dict, list, int, float]
    harmless += [(_plain_dictionary, "collections.defaultdict")]  # torch fills no other kind of dictionary
    harmless += {type(np.dtype(code)) for code in np.typecodes["AllFloat"] + np.typecodes["AllInteger"]}
    with torch.serialization.safe_globals(harmless):
        contents = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(contents, dict):
        return contents, {}
    if isinstance(about := contents.get(ABOUT), str):
        return contents, json.loads(about)
    return contents, _class_names_of_mmdetection(contents.get("meta"))


def _class_names_of_mmdetection(meta: Any) -> dict[str, Any]:
    """The class names that mmdetection leaves beside its weights."""
    names = meta.get("CLASSES") if isinstance(meta, Mapping) else None
    if isinstance(names, list | tuple) and names and all(isinstance(name, str) for name in names):
        return {"class_names": list(names)}
    return {}


def _plain_dictionary(*_default: Any) -> dict[Any, Any]:
    return {}


def _read_safetensors(path: Path) -> tuple[State, Mapping[str, Any]]:
    from safetensors import safe_open
    from safetensors.numpy import load_file

    with safe_open(path, framework="numpy") as file:
        about = (file.metadata() or {}).get(ABOUT, "{}")
    return load_file(path), json.loads(about)


def _read_npz(path: Path) -> tuple[State, Mapping[str, Any]]:
    _check_npz(path)
    with np.load(path, allow_pickle=False) as file:
        state = dict(file)
    about = state.pop(ABOUT, None)
    return state, json.loads(about.tobytes()) if about is not None else {}


def _check_npz(path: Path) -> None:
    """Raises where a member is no array of numbers, or they unpack to far more than the file holds, before any is read."""
    total, most = 0, 4 * path.stat().st_size + _SLACK
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            with archive.open(member) as file:
                version = np.lib.format.read_magic(cast(Any, file))
                header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
                shape, _, dtype = header[version](cast(Any, file))
            if dtype.kind not in "fiub":
                raise ValueError(f"its member {member.filename} holds {dtype}, no numbers.")
            total += max(member.file_size, int(np.prod(shape, dtype=np.int64)) * dtype.itemsize)
            if total > most:
                raise ValueError(f"it unpacks to more than {most / 2**20:.0f} MiB, far more than it holds.")


# ---- writing


def write_state(state: State, path: str | Path, about: Mapping[str, Any] | None = None) -> None:
    """Writes a state_dict as .safetensors, .npz, or for PyTorch as .pth or .pth.tar (under "state_dict").

    Args:
        state: the weights.
        path: a new file.
        about: JSON that stands beside the weights, for us to read back; the reference implementation ignores it.

    Raises:
        UserError: the file exists, its ending says no format, or a library that writes it is not installed.
    """
    path = local(path)
    writers = {".safetensors": _write_safetensors, ".npz": _write_npz, ".pth": _write_torch, ".tar": _write_torch}
    if path.exists():
        raise errors.UserError(f"{path} exists already: nothing was written. Name another file.")
    if path.suffix.lower() not in writers:
        raise errors.unknown("ending", path.suffix, ENDINGS)
    partial = path.with_name(path.name + ".part")
    try:
        with errors.naming_extras():
            writers[path.suffix.lower()](state, partial, json.dumps(about) if about else "")
        os.replace(partial, path)
    except OSError as error:
        raise errors.UserError(f"{path} cannot be written: {error}.") from error
    finally:
        partial.unlink(missing_ok=True)


def _write_torch(state: State, path: Path, about: str) -> None:
    import torch

    contents: dict[str, Any] = {"state_dict": {key: torch.from_numpy(value) for key, value in state.items()}}
    torch.save(contents | ({ABOUT: about} if about else {}), path)


def _write_safetensors(state: State, path: Path, about: str) -> None:
    from safetensors.numpy import save_file

    save_file(state, path, metadata={ABOUT: about} if about else None)


def _write_npz(state: State, path: Path, about: str) -> None:
    members: dict[str, Any] = dict(state)
    if about:
        members[ABOUT] = np.frombuffer(about.encode(), np.uint8)
    buffer = io.BytesIO()
    np.savez(buffer, **members)
    path.write_bytes(buffer.getbuffer())
