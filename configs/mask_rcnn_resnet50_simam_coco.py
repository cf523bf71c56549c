"""Mask R-CNN on SimAM-ResNet-50 and COCO, as the reference implementation trains it.

    python train.py --config configs/mask_rcnn_resnet50_simam_coco.py --workdir DIR --config.data.data_dir=COCO \
        --config.init_from=CLASSIFIER

As configs/faster_rcnn_resnet50_simam_coco.py, which says what COCO and CLASSIFIER (here of configs/resnet50_simam.py) are.
Published: 39.8 box AP, 36.0 mask AP on val2017 (the reference implementation's README).
"""

from ml_collections import ConfigDict

from configs import base, faster_rcnn_resnet50_simam_coco


def get_config(argument: str = "") -> ConfigDict:
    config = faster_rcnn_resnet50_simam_coco.get_config()
    config.model.name = "mask_rcnn_resnet50_fpn"
    return base.with_argument(config, argument)
