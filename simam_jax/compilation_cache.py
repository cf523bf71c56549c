"""Compiled programs kept on disk, so that the next process that needs them does not compile again."""

import os
from pathlib import Path

import jax

from simam_jax.paths import local


def use_compilation_cache(directory: str = "auto") -> None:
    """Keeps the programs that this process compiles in `directory`, and takes from there what others compiled.

    Args:
        directory: "" for none; "auto" for what JAX_COMPILATION_CACHE_DIR names, else a folder in the user's own cache,
            because who can write there can run code.
    """
    if directory == "auto":
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        directory = os.environ.get("JAX_COMPILATION_CACHE_DIR") or str(Path(base) / "simam_jax" / "compiled")
    if directory:
        jax.config.update("jax_compilation_cache_dir", str(local(directory)))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)
