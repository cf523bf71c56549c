"""SimAM-ResNet-20 on CIFAR-10, as the reference implementation trains it; the other CIFAR networks by argument.

    python train.py --config configs/cifar10_resnet20_simam.py --workdir DIR
    python train.py --config configs/cifar10_resnet20_simam.py:model=cifar_preresnet56,attention=none --workdir DIR

The recipe is that one's: one GPU, batch 128, so that batch norm sees all 128 images. Its README publishes
no accuracies for CIFAR. For networks of 110 layers and more it warms up with a rate of 0.01 in the
first epoch: `--config.schedule.warmup_epochs=1`. The data: `python -m simam_jax.data.prepare cifar10`.
"""

from ml_collections import ConfigDict

from configs import base


def get_config(argument: str = "") -> ConfigDict:
    config = base.get_config()
    config.batch_size = 128
    config.num_epochs = 164.0
    config.model.name = "cifar_resnet20"
    config.model.bn_group_size = 128

    config.data.name = "cifar10"
    config.data.eval_split = "test"
    config.data.image_size = 32
    config.data.eval_resize = 0
    config.data.augmentation = "pad_crop"
    config.data.mean = (0.4914, 0.4822, 0.4465)
    config.data.std = (0.2023, 0.1994, 0.2010)

    config.schedule.step_epochs = (81.0, 122.0)
    config.schedule.warmup_learning_rate = 0.01
    config.schedule.warmup_constant = True
    config.optimizer.weight_decay = 5e-4
    return base.with_argument(config, argument)
