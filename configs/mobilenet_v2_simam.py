"""SimAM-MobileNetV2 on ImageNet-1k, as published.

    python train.py --config configs/mobilenet_v2_simam.py --workdir DIR
    python train.py --config configs/mobilenet_v2_simam.py:attention=none --workdir DIR    (the baseline; or se, cbam)

Published: top-1 72.36 %, top-5 90.74 % (the reference implementation's README). The recipe is that one's: batch 256 on four
GPUs, so that batch norm sees 64 images at a time. It assumes one or more GPUs or TPUs whose number divides 256,
and `imagenet2012` prepared (`python -m simam_jax.data.prepare`), or `--config.data.source=folder
--config.data.data_dir=TREE --config.data.eval_split=val`.
"""

from ml_collections import ConfigDict

from configs import base


def get_config(argument: str = "") -> ConfigDict:
    config = base.get_config()
    config.model.name = "mobilenet_v2"
    config.num_epochs = 150.0
    config.schedule.name = "cosine"
    config.schedule.learning_rate = 0.05
    config.optimizer.weight_decay = 4e-5
    return base.with_argument(config, argument)
