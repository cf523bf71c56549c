"""SimAM-ResNet-20 on real handwritten digits: the quickest way to see everything work, without a download.

    python train.py --config configs/digits_resnet20_simam.py --workdir DIR

The 1,797 images of 8x8 pixels that scikit-learn ships (UCI, Optical Recognition of Handwritten Digits), 360 of
them for the test. A few minutes on two CPU cores; at least 98 % of the test images.
"""

from ml_collections import ConfigDict

from configs import base


def get_config(argument: str = "") -> ConfigDict:
    config = base.get_config()
    config.batch_size = 64
    config.num_epochs = 12.0
    config.log_every_steps = 20
    config.model.name = "cifar_resnet20"
    config.model.bn_group_size = 64

    config.data.source = "digits"
    config.data.eval_split = "test"
    config.data.image_size = 32
    config.data.eval_resize = 0
    config.data.augmentation = "pad_crop"
    config.data.crop_padding = 4
    config.data.flip = False
    config.data.mean = (0.305, 0.305, 0.305)
    config.data.std = (0.327, 0.327, 0.327)

    config.schedule.name = "cosine"
    config.schedule.learning_rate = 0.1
    config.schedule.warmup_epochs = 2.0
    config.optimizer.weight_decay = 5e-4
    return base.with_argument(config, argument)
