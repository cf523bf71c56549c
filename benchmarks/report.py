"""The tables of speed, from `benchmarks/results/*/*.json`, into the pages that show them: python -m benchmarks.report"""

import json
import re
from pathlib import Path

from benchmarks import measure

ROOT = Path(__file__).parent.parent
TITLES = {
    "train_step": ("Training, images per second over PyTorch's", "python -m benchmarks.versus_torch train_step"),
    "inference": ("Inference, images per second over PyTorch's", "python -m benchmarks.versus_torch inference"),
    "simam_op": ("SimAM alone, over PyTorch's", "python -m benchmarks.simam_op"),
    "memory": ("Memory of a training step beside its state", "python -m benchmarks.memory"),
    "memory_detector": (
        "Memory of a detector's training step",
        "python -m benchmarks.memory --model faster_rcnn_resnet50_fpn",
    ),
    "traffic": ("Memory moved on an H100, counted in the compiled program", "python -m benchmarks.traffic"),
    "predictor": ("`Predictor` from files over the bare network", "python -m benchmarks.predictor"),
    "predictor_detector": (
        "A detector's `Predictor`",
        "python -m benchmarks.predictor --model mask_rcnn_resnet18_fpn --count 64 --size 256",
    ),
    "lowerings_operations": ("Our forms of operations over XLA's", "python -m benchmarks.lowerings operations"),
    "lowerings_networks": ("A training step with a form replaced", "python -m benchmarks.lowerings networks"),
    "lowerings_detectors": (
        "A detector's training step with a form replaced",
        "python -m benchmarks.lowerings detectors",
    ),
    "detection_ops": ("Detection's operations over torchvision's", "python -m benchmarks.detection_ops"),
    "detectors": ("Detectors over torchvision's", "python -m benchmarks.detectors"),
    "detection_pipeline": ("Detection's input, per CPU-second", "python -m benchmarks.detection_pipeline"),
    "accelerator_simam": ("SimAM alone in bfloat16, over PyTorch's", "python -m benchmarks.accelerator --only simam"),
    "accelerator_resnet50": ("ResNet-50's training in bfloat16", "python -m benchmarks.accelerator --only resnet50"),
    "accelerator_detectors": ("Detectors in bfloat16", "python -m benchmarks.accelerator --only detectors"),
    "scaling_collectives": ("What an update sends, counted in the compiled program", "python -m benchmarks.scaling"),
    "scaling": ("Many devices, on paper", "python -m benchmarks.scaling"),
    "startup": ("From the command to the first update", "python -m benchmarks.startup"),
}


PAGES = {
    "docs/speed.md": (
        "train_step",
        "inference",
        "accelerator_resnet50",
        "accelerator_detectors",
        "predictor",
        "predictor_detector",
        "memory",
        "memory_detector",
        "startup",
        "detectors",
        "detection_pipeline",
        "scaling_collectives",
        "scaling",
    ),
    "simam_jax/ops/README.md": (
        "lowerings_operations",
        "lowerings_networks",
        "lowerings_detectors",
        "simam_op",
        "accelerator_simam",
        "traffic",
        "detection_ops",
    ),
}
BEGIN, END = "<!-- python -m benchmarks.report -->\n", "<!-- end of the report -->\n"


def report(names: tuple[str, ...]) -> str:
    """One Markdown table for each of these results on each machine, with where and when it was measured."""
    parts = []
    for name in names:
        title, command = TITLES[name]
        for path in sorted(measure.RESULTS.glob(f"*/{name}.json")):
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


def updated(text: str, names: tuple[str, ...]) -> str:
    """A page with the tables between its two marks made anew."""
    return re.sub(f"{BEGIN}.*?{END}", lambda _: f"{BEGIN}{report(names)}{END}", text, flags=re.DOTALL)


if __name__ == "__main__":
    for page, results in PAGES.items():
        (ROOT / page).write_text(updated((ROOT / page).read_text(), results))
