"""`python -m simam_jax.export`."""

from simam_jax import errors
from simam_jax.export import main

if __name__ == "__main__":
    errors.run_cli(main)
