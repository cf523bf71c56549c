"""Every field of a run, with its unit, its meaning and what it may hold: the paper's ImageNet recipe, for ResNet-50.

A recipe imports this and overrides; it adds no field. On the command line any field is `--config.FIELD=VALUE`
(`--config.model.attention=se`). Epochs may be fractions. 0, "" and None mean "off" or "the default", as said.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from ml_collections import ConfigDict, config_dict

from configs.fields import Field, choice, flag, number, numbers, path, text, whole
from simam_jax import errors

FIELDS: dict[str, Any] = {
    "task": text("classification"),  # one of simam_jax.tasks.TASKS; its section below has the same name
    "seed": whole(
        0, least=0, most=2**31 - 1
    ),  # fixes the initial weights, the order of the data, augmentation, dropout
    "batch_size": whole(256, least=1),  # images per update, over all devices of all hosts
    "num_epochs": number(100.0, least=0),  # length of the run, in passes over the training set
    "num_steps": whole(0, least=0),  # length of the run in updates instead; 0: num_epochs decides
    "eval_batch_size": whole(0, least=0),  # images per evaluation batch, over all devices; 0: batch_size
    "eval_every_epochs": number(1.0, least=0),  # how often the whole evaluation set is run (and always at the end)
    "log_every_steps": whole(100, least=0),  # how often metrics are written; 0: only with evaluations and checkpoints
    "visualize_every_epochs": number(0.0, least=0),  # how often the task's pictures go to TensorBoard; 0: never
    "init_from": path(""),  # start from these weights: a workdir, a checkpoint, or a PyTorch .pth/.pth.tar
    "init_skip_head": flag(False),  # with init_from: leave out the head (another number of classes)
    "profile_steps": text(""),  # "FIRST:LAST" updates to write a profile of, for TensorBoard
    "max_step_seconds": number(1800.0, least=0),  # a step (with its data) that takes longer ends the run; 0: never
    "compilation_cache_dir": path("auto"),  # compiled programs: "auto" see compilation_cache.py, "" nowhere
    "ema_decay": number(0.0, least=0, most=1),  # per update, of all parameters and statistics; 0: off
    "model": {
        "name": text("resnet50"),  # one of simam_jax.list_models()
        "attention": text("simam"),  # none, simam, se, cbam
        "attention_param": number(0.0, least=0, optional=True),  # simam: lambda; se, cbam: reduction; None: the default
        "dtype": text(
            "float32"
        ),  # computation: float32, bfloat16, float16, float64; parameters stay float32 (or float64)
        "bn_group_size": whole(64, least=0),  # images per batch-norm statistic; 0: those of one device; batch_size: all
    },
    "data": {
        "source": text("tfds"),  # tfds, folder, digits, synthetic; detection: coco, tfds, digit_scenes
        "name": text("imagenet2012:5.*.*"),  # TFDS name and version; folder, digits, synthetic: not used
        "data_dir": path(""),  # tfds, digits: where prepared data lie ("": TFDS's default); folder: the tree's root
        "train_split": text("train"),  # TFDS split, or the folder below data_dir
        "eval_split": text("validation"),
        "train_annotations": path(""),  # coco: a json; "": data_dir/annotations/instances_TRAIN_SPLIT.json
        "train_images": path(""),  # coco: the folder of its images; "": data_dir/TRAIN_SPLIT
        "eval_annotations": path(""),  # the same for evaluation
        "eval_images": path(""),
        "match_classes": choice(
            "by_name", "by_order"
        ),  # eval, resume, init_from: how the data's classes and the weights' meet
        "image_size": whole(224, least=1),  # classification: pixels, height and width of what the network sees
        "min_size": whole(800, least=1),  # detection: pixels, the shorter side of what the network sees
        "max_size": whole(1333, least=1),  # detection: the longer side is at most this
        "buckets": whole(6, least=1),  # detection: the most shapes that images are padded to; 1: a square; else even
        "augmentation": choice("random_resized_crop", "pad_crop", "none"),
        "min_area": number(
            0.08, least=0, most=1, above=True
        ),  # random_resized_crop: smallest crop, fraction of the area
        "crop_padding": whole(4, least=0),  # pad_crop: pixels added on each side before the crop
        "flip": flag(True),  # mirror half of the training images
        "eval_resize": whole(
            256, least=0
        ),  # pixels: the shorter side before the centre crop; 0: straight to image_size
        "resize": choice("exact", "fast"),  # training images: exact (PIL's antialiased pixels) or fast
        "mean": numbers((0.485, 0.456, 0.406), least=0, length=3),  # per channel, of pixels in 0..1
        "std": numbers((0.229, 0.224, 0.225), least=0, length=3, above=True),
        "randaugment_layers": whole(0, least=0),  # operations per image; 0: off
        "randaugment_magnitude": number(9.0, least=0, most=30),
        "random_erasing": number(0.0, least=0, most=1),  # probability per image
        "prefetch": whole(2, least=1),  # batches made ahead on the host, and as many on the device
        "max_unreadable": number(
            0.001, least=0, most=1
        ),  # fraction of unreadable training files above which the run stops
    },
    "schedule": {
        "name": choice("step", "cosine"),
        "learning_rate": number(0.1, least=0),  # the peak
        "batch_size": whole(
            0, least=0
        ),  # images an update that the rates are for: they are scaled with batch_size; 0: not
        "step_epochs": numbers((30.0, 60.0, 90.0), least=0),  # step: when the rate is multiplied by step_factor
        "step_factor": number(0.1, least=0),
        "final_learning_rate": number(0.0, least=0),  # cosine: where it ends
        "warmup_epochs": number(0.0, least=0),  # length of the warm-up; 0: none
        "warmup_steps": whole(0, least=0),  # its length in updates instead; 0: warmup_epochs decides
        "warmup_learning_rate": number(0.0, least=0),  # where the warm-up starts
        "warmup_constant": flag(False),  # stay at warmup_learning_rate, then jump, instead of a straight line
    },
    "optimizer": {  # SGD as PyTorch's
        "momentum": number(0.9, least=0, most=1),
        "nesterov": flag(False),
        "weight_decay": number(1e-4, least=0),  # coupled: added to the gradient before the momentum
        "decay_bn_and_bias": flag(True),  # False: only kernels (two or more dimensions) decay
        "clip_global_norm": number(0.0, least=0),  # gradients are scaled down to this norm; 0: off
        "grad_accum_steps": whole(1, least=1),  # micro-batches per update; batch norm sees each micro-batch alone
    },
    "classification": {
        "label_smoothing": number(0.0, least=0, most=1),
        "mixup_alpha": number(0.0, least=0),  # Beta(alpha, alpha); 0: off
        "cutmix_alpha": number(0.0, least=0),  # with both on, each pair of images draws one of the two
    },
    "detection": {
        "batch_norm": choice(
            "frozen", "trained"
        ),  # frozen: running statistics, never updated; scale and bias are trained
        "frozen_stages": whole(1, least=0, most=4),  # of the backbone, with its stem; 0: all is trained
        "images_per_group": whole(1, least=1),  # neighbours whose extent is shared in training (the original: 2)
        "scale_jitter": numbers((1.0, 1.0), least=0, length=2, above=True),  # of training images' sides, then a crop
    },
    "checkpoint": {
        "every_epochs": number(1.0, least=0),  # 0: only at the end
        "keep_last": whole(3, least=1),  # the newest ones
        "keep_best": whole(
            1, least=0
        ),  # those with the best score (classification: top-1; detection: AP, of masks if there are any), where an evaluation fell on them
    },
    "distributed": {  # all empty: one process, or what JAX detects (see docs/train.md)
        "coordinator_address": text(""),  # HOST:PORT of process 0
        "num_processes": whole(0, least=0),
        "process_id": whole(-1, least=-1),
        "auto": flag(False),  # let JAX find the three above: SLURM, Open MPI, GKE, Cloud TPU
    },
}


def get_config() -> ConfigDict:
    return ConfigDict(_defaults(FIELDS)).lock()


def check(config: ConfigDict) -> None:
    """Raises `UserError` for the first field whose value is of the wrong kind or out of its range."""
    for name, field in fields():
        value: Any = config
        for part in name.split("."):
            value = value[part]
        if problem := field.problem(value):
            raise errors.UserError(f"--config.{name}={value}: {problem}. All fields stand in configs/base.py.")


def with_argument(config: ConfigDict, argument: str) -> ConfigDict:
    """`config` changed by what follows a recipe's name: `NAME.py:attention=se` or `NAME.py:model=resnet152`.

    Raises:
        UserError: an argument that is neither `model` nor `attention`.
    """
    known = {"model": "name", "attention": "attention"}
    for part in filter(None, argument.split(",")):
        key, _, value = part.partition("=")
        if key not in known or not value:
            raise errors.unknown("argument after the config's name", part, [f"{name}=..." for name in known])
        config.model[known[key]] = value
    return config


def _defaults(section: Mapping[str, Any]) -> dict[str, Any]:
    def default(field: Any) -> Any:
        if not isinstance(field, Field):
            return _defaults(field)
        # A field without a default is one of floats: a placeholder, made anew because configs share what they hold.
        return config_dict.placeholder(float) if field.default is None else field.default

    return {name: default(field) for name, field in section.items()}


def fields(section: Mapping[str, Any] = FIELDS, prefix: str = "") -> Iterator[tuple[str, Field]]:
    """All fields by their full names, such as `model.attention`."""
    for name, field in section.items():
        if isinstance(field, Field):
            yield prefix + name, field
        else:
            yield from fields(field, f"{prefix}{name}.")
