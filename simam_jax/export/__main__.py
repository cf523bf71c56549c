"""`python -m simam_jax.export`."""

from simam_jax.command_line import run_compiling
from simam_jax.export import main

if __name__ == "__main__":
    run_compiling(main)
