"""Imports only run downwards: the tree is the architecture."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "simam_jax"

# From the bottom to the top. What stands on one line may not import from a later one; a package stands for all its files.
LAYERS = (
    ("errors", "initializers"),
    ("progress", "task", "paths"),
    ("curves", "compilation_cache"),
    ("ops",),
    ("layers", "preprocessing", "stored_arrays", "fingerprints", "video"),
    ("attention", "rcnn"),
    ("models", "checkpoints"),
    ("torch_weights",),
    ("weights", "data"),
    ("figures",),
    ("classification", "detection"),
    ("tasks", "training"),
    ("inference",),
    ("command_line", "to_onnx"),
    ("convert", "summary", "predict", "visualize", "export", "demo"),
)
HEIGHT = {name: height for height, names in enumerate(LAYERS) for name in names}
LIBRARIES = {"data": {"tensorflow", "tensorflow_datasets"}, "export": {"tensorflow"}}  # who may import TensorFlow


def imports(file: Path) -> set[str]:
    """The modules that a file imports, inside functions too, by their full names."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{file} has a relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def part(module: str) -> str:
    """`ops` for simam_jax.ops.simam."""
    return module.split(".")[1]


FILES = [path for path in sorted(PACKAGE.rglob("*.py")) if path != PACKAGE / "__init__.py"]


@pytest.mark.parametrize("file", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_only_run_downwards(file):
    own = file.relative_to(PACKAGE).parts[0].removesuffix(".py")
    assert own in HEIGHT, f"{own} has no place in LAYERS"
    used = {part(name) for name in imports(file) if name.startswith("simam_jax.")} - {own}
    climbing = {other for other in used if HEIGHT.get(other, len(LAYERS)) >= HEIGHT[own]}
    # Neighbours on one line are strangers to each other.
    assert not climbing, f"{own} imports {climbing}, which stand at its height or above"


@pytest.mark.parametrize("file", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_only_the_data_and_the_saved_model_exporter_import_tensorflow(file):
    own = file.relative_to(PACKAGE).parts[0].removesuffix(".py")
    used = {name.split(".")[0] for name in imports(file)} & {"tensorflow", "tensorflow_datasets"}
    assert used <= LIBRARIES.get(own, set())


def test_training_knows_no_task():
    words = ("top1", "top-1", "cross_entropy", "num_classes", "label")
    for file in (PACKAGE / "training").glob("*.py"):
        text = file.read_text()
        assert not [word for word in words if word in text], file
