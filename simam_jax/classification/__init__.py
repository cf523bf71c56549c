"""Classification of images: one label an image."""

from simam_jax.classification.task import make_task

__all__ = ["make_task"]
