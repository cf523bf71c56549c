"""SimAM-ResNet-20 on CIFAR-100, as the reference implementation trains it; the other CIFAR networks by argument.

    python train.py --config configs/cifar100_resnet20_simam.py --workdir DIR
    python train.py --config configs/cifar100_resnet20_simam.py:model=cifar_preresnet56,attention=none --workdir DIR

The recipe is that one's: one GPU, batch 128, so that batch norm sees all 128 images. Its README publishes
no accuracies for CIFAR. For networks of 110 layers and more it warms up with a rate of 0.01 in the
first epoch: `--config.schedule.warmup_epochs=1`. The data: `python -m simam_jax.data.prepare cifar100`.
"""

from ml_collections import ConfigDict

from configs import cifar10_resnet20_simam


def get_config(argument: str = "") -> ConfigDict:
    config = cifar10_resnet20_simam.get_config(argument)
    config.data.name = "cifar100"
    return config
