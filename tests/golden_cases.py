"""The cases in tests/golden: what the reference implementation was asked, and the weights and images it was asked with."""

import json
from pathlib import Path

import numpy as np

GOLDEN = Path(__file__).parent / "golden"
NAMES = sorted(path.stem for path in GOLDEN.glob("*.json"))


def model_name(case: dict) -> str:
    """Our name of the case's network."""
    if case["dataset"] == "imagenet":
        return case["arch"]
    arch = case["arch"].replace("mobilenetv2", "mobilenet_v2")
    return f"cifar_{arch}{'_bottleneck' if case['block'].endswith('bottlenect') else ''}"


def read_case(name: str) -> tuple[dict, dict]:
    with np.load(GOLDEN / f"{name}.npz") as arrays:
        return json.loads((GOLDEN / f"{name}.json").read_text()), dict(arrays)


def golden_state(entries: list) -> dict[str, np.ndarray]:
    """The weights of a case: entry i of its state_dict is drawn from default_rng(1000 + i)."""
    state = {}
    for i, (key, shape) in enumerate(entries):
        rng = np.random.default_rng(1000 + i)
        if len(shape) > 1:
            value = rng.standard_normal(shape, dtype=np.float32) * np.float32(np.sqrt(1.0 / np.prod(shape[1:])))
        elif key.endswith("running_var") or (key.endswith("weight")):
            value = rng.uniform(0.5, 1.5, shape)
        else:
            value = 0.1 * rng.standard_normal(shape)
        state[key] = value.astype(np.float32)
    return state


def nhwc(x: np.ndarray) -> np.ndarray:
    return x.transpose(0, 2, 3, 1)


def golden_images(case: dict, seed: int = 7) -> tuple[np.ndarray, np.random.Generator]:
    rng = np.random.default_rng(seed)
    size = case["image_size"]
    return nhwc(rng.standard_normal((case["batch"], 3, size, size), dtype=np.float32)), rng
