"""SimAM-ResNet-50 on ImageNet-1k with the ingredients of today's recipes.

    python train.py --config configs/resnet50_simam_modern.py --workdir DIR

Cosine schedule with warm-up, label smoothing, mixup and CutMix, RandAugment, random erasing, EMA, bfloat16, no
weight decay on batch norm and biases. The numbers follow torchvision's second training recipe for ResNet-50
(2021: batch 1024, rate 0.5, 5 epochs of warm-up, smoothing 0.1, mixup 0.2, CutMix 1.0, erasing 0.1, decay
2e-5), with RandAugment in the place of TrivialAugment and half of its 600 epochs. There is no published
accuracy with SimAM. It assumes 8 accelerators.
"""

from ml_collections import ConfigDict

from configs import base


def get_config(argument: str = "") -> ConfigDict:
    config = base.get_config()
    config.batch_size = 1024
    config.num_epochs = 300.0
    config.model.dtype = "bfloat16"
    config.model.bn_group_size = 128

    config.data.resize = "fast"
    config.data.randaugment_layers = 2
    config.data.randaugment_magnitude = 9.0
    config.data.random_erasing = 0.1
    config.classification.label_smoothing = 0.1
    config.classification.mixup_alpha = 0.2
    config.classification.cutmix_alpha = 1.0
    config.ema_decay = 0.9999

    config.schedule.name = "cosine"
    config.schedule.learning_rate = 0.5
    config.schedule.warmup_epochs = 5.0
    config.optimizer.weight_decay = 2e-5
    config.optimizer.decay_bn_and_bias = False
    return base.with_argument(config, argument)
