"""Every network of ours as a parameter of a test: one of each family with every attention, the others with SimAM."""

import re

import pytest

from simam_jax.models import ATTENTIONS, list_models

# One network of each family and kind of block.
KINDS = ("resnet18", "resnet50", "resnet50d", "resnext50_32x4d", "mobilenet_v2", "cifar_mobilenet_v2", "cifar_resnet20")
KINDS += ("cifar_resnet20_bottleneck", "cifar_preresnet20", "cifar_preresnet20_bottleneck", "cifar_wideresnet28x10")
COMBINATIONS = [(name, attention) for name in KINDS for attention in ATTENTIONS]
COMBINATIONS += [
    pytest.param(name, "simam", marks=[pytest.mark.slow] if re.search(r"1\d\d", name) else [])  # over 100 layers
    for name in list_models("classification")
    if name not in KINDS
]
