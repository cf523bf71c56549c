"""A small SimAM Mask R-CNN on scenes of handwritten digits: the quickest way to see detection work, without a download.

    python train.py --config configs/digit_scenes_mask_rcnn.py --workdir DIR

1,600 scenes of 128x128 pixels for training, 200 for the test, made of scikit-learn's digits and photographs; other digits
and other parts of the photographs for the test. Seven to twelve minutes on two CPU cores; box AP50 of at least 0.85, mask AP50 of
at least 0.80.
"""

from ml_collections import ConfigDict

from configs import base


def get_config(argument: str = "") -> ConfigDict:
    config = base.get_config()
    config.task = "detection"
    config.batch_size = 8
    config.num_epochs = 12.0
    config.log_every_steps = 50
    config.eval_every_epochs = 3.0
    config.visualize_every_epochs = 3.0
    config.eval_batch_size = 16
    config.model.name = "mask_rcnn_tiny_fpn"
    config.model.bn_group_size = 0

    config.data.source = "digit_scenes"
    config.data.train_split = "train"
    config.data.eval_split = "test"
    config.data.min_size = 128
    config.data.max_size = 128
    config.data.flip = False

    config.detection.batch_norm = "trained"
    config.detection.frozen_stages = 0
    config.schedule.name = "cosine"
    config.schedule.learning_rate = 0.05
    config.schedule.warmup_steps = 100
    config.optimizer.weight_decay = 1e-4
    config.optimizer.clip_global_norm = 10.0
    return base.with_argument(config, argument)
