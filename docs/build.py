"""Writes the API reference from the docstrings: python -m docs.build [FOLDER]"""

import pkgutil
import sys
from pathlib import Path

import pdoc

import simam_jax


def build(folder: Path) -> None:
    """A page for every public module, and a search."""
    for name in simam_jax.__all__:
        getattr(simam_jax, name)  # what is loaded on first use has to be there
    found = pkgutil.iter_modules(simam_jax.__path__, "simam_jax.")
    pdoc.render.configure(docformat="google", math=True)
    pdoc.pdoc("simam_jax", *(module.name for module in found), output_directory=folder)


if __name__ == "__main__":
    target = Path(sys.argv[1] if len(sys.argv) > 1 else "docs/api")
    build(target)
    print(f"{target / 'index.html'}")
