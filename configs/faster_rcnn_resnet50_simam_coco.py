"""Faster R-CNN on SimAM-ResNet-50 and COCO, as the reference implementation trains it: 12 epochs, batch norm fixed.

    python train.py --config configs/faster_rcnn_resnet50_simam_coco.py --workdir DIR --config.data.data_dir=COCO \
        --config.init_from=CLASSIFIER

COCO holds annotations/instances_{train,val}2017.json and the folders train2017 and val2017 (https://cocodataset.org).
CLASSIFIER is a workdir of configs/resnet50_simam.py, or a PyTorch file of that network. Published: 39.2 box AP on val2017
(the reference implementation's README), trained on 4 GPUs with 2 images each. The rates are for 8 images an update and are scaled
with batch_size. Other networks of this kind: ...py:attention=none, ...py:model=faster_rcnn_resnet18_fpn.
"""

from ml_collections import ConfigDict

from configs import base


def get_config(argument: str = "") -> ConfigDict:
    config = base.get_config()
    config.task = "detection"
    config.batch_size = 8
    config.num_epochs = 12.0
    config.eval_every_epochs = 1.0
    config.model.name = "faster_rcnn_resnet50_fpn"
    config.model.bn_group_size = 0

    config.data.source = "coco"
    config.data.train_split = "train2017"
    config.data.eval_split = "val2017"

    config.schedule.name = "step"
    config.schedule.batch_size = 8
    config.schedule.learning_rate = 0.01
    config.schedule.step_epochs = (8.0, 11.0)
    config.schedule.warmup_steps = 500
    config.schedule.warmup_learning_rate = 1e-5
    return base.with_argument(config, argument)
