"""The README's table of speed, from `benchmarks/results/*.json`: python -m benchmarks.report"""

import json

from benchmarks import measure

TITLES = {
    "train_step": ("Training, images per second over PyTorch's", "python -m benchmarks.versus_torch train_step"),
    "inference": ("Inference, images per second over PyTorch's", "python -m benchmarks.versus_torch inference"),
    "simam_op": ("SimAM alone, over PyTorch's", "python -m benchmarks.simam_op"),
    "memory": ("Memory of a training step beside its state", "python -m benchmarks.memory"),
    "traffic": ("Memory moved on an H100, counted in the compiled program", "python -m benchmarks.traffic"),
    "predictor": ("`Predictor` from files over the bare network", "python -m benchmarks.predictor"),
    "lowerings_operations": ("Our forms of operations over XLA's", "python -m benchmarks.lowerings operations"),
    "lowerings_networks": ("A training step with a form replaced", "python -m benchmarks.lowerings networks"),
    "detection_ops": ("Detection's operations over torchvision's", "python -m benchmarks.detection_ops"),
    "startup": ("From the command to the first update", "python -m benchmarks.startup"),
}


def report() -> str:
    """One Markdown table for each result that there is, with where and when it was measured."""
    parts = []
    for name, (title, command) in TITLES.items():
        path = measure.RESULTS / f"{name}.json"
        if path.is_file():
            result = json.loads(path.read_text())
            settings = ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in result["settings"].items())
            versions = ", ".join(
                f"{key} {result['versions'][key]}" for key in ("jax", "torch") if key in result["versions"]
            )
            parts.append(
                f"**{title}** (`{command}`; {settings}; {result['machine']}, {versions}, {result['date']})\n\n"
                f"{measure.table(result['rows'])}"
            )
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    print(report(), end="")
