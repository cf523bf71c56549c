"""Writes the API reference from the docstrings: python -m docs.build [FOLDER]"""

import sys
from pathlib import Path

import pdoc

import simam_jax

MODULES = (  # what users import; everything else may change
    "simam_jax",
    "simam_jax.preprocessing",
    "simam_jax.classification.predictions",
    "simam_jax.classification.explain",
    "simam_jax.curves",
    "simam_jax.classification.figures",
    "simam_jax.task",
)


def build(folder: Path) -> None:
    """Writes a page for every module in `MODULES`, and a search."""
    for name in simam_jax.__all__:
        getattr(simam_jax, name)  # what is loaded on first use has to be there
    pdoc.render.configure(docformat="google", math=True)
    pdoc.pdoc(*MODULES, output_directory=folder)


if __name__ == "__main__":
    target = Path(sys.argv[1] if len(sys.argv) > 1 else "docs/api")
    build(target)
    print(f"{target / 'index.html'}")
