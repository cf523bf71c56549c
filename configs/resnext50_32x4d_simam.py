"""SimAM-ResNeXt-50 (32x4d) on ImageNet-1k, as published.

    python train.py --config configs/resnext50_32x4d_simam.py --workdir DIR
    python train.py --config configs/resnext50_32x4d_simam.py:attention=none --workdir DIR    (or se, cbam)

Published: top-1 78.00 %, top-5 93.93 % (the reference implementation's README). The recipe is that one's: batch 256 on four
GPUs, so that batch norm sees 64 images at a time. It assumes one or more GPUs or TPUs whose number divides 256,
and `imagenet2012` prepared (`python -m simam_jax.data.prepare`), or `--config.data.source=folder
--config.data.data_dir=TREE --config.data.eval_split=val`.
"""

from ml_collections import ConfigDict

from configs import base


def get_config(argument: str = "") -> ConfigDict:
    config = base.get_config()
    config.model.name = "resnext50_32x4d"
    return base.with_argument(config, argument)
