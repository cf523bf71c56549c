"""The notebooks run from top to bottom, as they stand, and are stored without what they printed."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted(path.name for path in (ROOT / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_outputs_are_not_stored(name):
    notebook = nbformat.read(ROOT / "notebooks" / name, as_version=4)
    nbformat.validate(notebook)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [(cell.outputs, cell.execution_count) for cell in cells] == [([], None)] * len(cells)


@pytest.fixture
def executed(tmp_path, monkeypatch):
    """Runs a notebook in a checkout of its own; what it printed, and its pictures."""
    for part in ("configs", "simam_jax", "train.py"):
        (tmp_path / part).symlink_to(ROOT / part)
    (tmp_path / "notebooks").mkdir()
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "data"))

    def run(name):
        notebook = nbformat.read(ROOT / "notebooks" / name, as_version=4)
        client = NotebookClient(notebook, timeout=900, resources={"metadata": {"path": str(tmp_path / "notebooks")}})
        client.execute()
        outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
        text = "".join(output.text for output in outputs if output.output_type == "stream" and output.name == "stdout")
        return text, [output.data["image/png"] for output in outputs if "image/png" in output.get("data", {})]

    return run


@pytest.mark.slow  # a minute of training, on a free machine
def test_quickstart(executed):
    text, pictures = executed("quickstart.ipynb")
    assert "Finished. eval top-1" in text
    assert text.count("\na ") == 8  # digits, each with its two likeliest classes
    assert len(pictures) == 3


@pytest.mark.slow
def test_from_pytorch(executed):
    text, _ = executed("from_pytorch.ipynb")
    assert float(text.partition("largest difference ")[2].split()[0]) < 1e-4  # float32, logits of a few units
    assert "Finished. eval top-1" in text
    assert "linear.weight': (10, 64)" in text


@pytest.mark.slow  # three minutes of training, on a free machine
def test_detection(executed):
    text, pictures = executed("detection.ipynb")
    assert text.count("Finished. eval box AP") == 2
    assert float(text.partition("bbox AP ")[2].partition(",")[0]) > 5
    assert "Training can start." in text
    assert len(pictures) == 4
