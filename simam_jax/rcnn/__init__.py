"""The parts of an R-CNN as pure functions: anchors, proposals, assignment, sampling, masks and losses, in static shapes.

Faster R-CNN (Ren et al., 2015) and Mask R-CNN (He et al., 2017) with FPN; `simam_jax.models` has the networks.
"""
