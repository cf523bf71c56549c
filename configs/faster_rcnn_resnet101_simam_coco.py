"""Faster R-CNN on SimAM-ResNet-101 and COCO, as the reference implementation trains it.

    python train.py --config configs/faster_rcnn_resnet101_simam_coco.py --workdir DIR --config.data.data_dir=COCO \
        --config.init_from=CLASSIFIER

As configs/faster_rcnn_resnet50_simam_coco.py, which says what COCO and CLASSIFIER (here of configs/resnet101_simam.py) are.
Published: 41.2 box AP on val2017 (the reference implementation's README).
"""

from ml_collections import ConfigDict

from configs import base, faster_rcnn_resnet50_simam_coco


def get_config(argument: str = "") -> ConfigDict:
    config = faster_rcnn_resnet50_simam_coco.get_config()
    config.model.name = "faster_rcnn_resnet101_fpn"
    return base.with_argument(config, argument)
