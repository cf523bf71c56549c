"""Every field of a run, with its unit and meaning: the paper's ImageNet recipe, for ResNet-50.

A recipe imports this and overrides; it adds no field. On the command line any field is `--config.FIELD=VALUE`
(`--config.model.attention=se`). Epochs may be fractions. 0, "" and None mean "off" or "the default", as said.
"""

from ml_collections import ConfigDict, config_dict

from simam_jax import errors


def with_argument(config: ConfigDict, argument: str) -> ConfigDict:
    """`config` changed by what follows a recipe's name: `NAME.py:attention=se` or `NAME.py:model=resnet152`.

    Raises:
        UserError: an argument that is neither `model` nor `attention`.
    """
    fields = {"model": "name", "attention": "attention"}
    for part in filter(None, argument.split(",")):
        key, _, value = part.partition("=")
        if key not in fields or not value:
            raise errors.unknown("argument after the config's name", part, [f"{name}=..." for name in fields])
        config.model[fields[key]] = value
    return config


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.seed = 0  # fixes the initial weights, the order of the data, the augmentation and dropout
    config.batch_size = 256  # images per update, over all devices of all hosts
    config.num_epochs = 100.0  # length of the run, in passes over the training set
    config.num_steps = 0  # length of the run in updates instead; 0: num_epochs decides
    config.eval_batch_size = 0  # images per evaluation batch, over all devices; 0: batch_size
    config.eval_every_epochs = 1.0  # how often the whole evaluation set is run (and always at the end)
    config.log_every_steps = 100  # how often metrics are written
    config.visualize_every_epochs = 0.0  # how often SimAM's weights over four images go to TensorBoard; 0: never
    config.init_from = ""  # start from these weights: a workdir, a checkpoint, or a PyTorch .pth/.pth.tar
    config.init_skip_head = False  # with init_from: leave out the classifier (another number of classes)
    config.profile_steps = ""  # "FIRST:LAST" updates to write a profile of, for TensorBoard
    config.max_step_seconds = 1800.0  # a step (with its data) that takes longer ends the run; 0: never
    config.compilation_cache_dir = "auto"  # compiled programs: "auto" the user's cache folder, "" nowhere

    model = config.model = ConfigDict()
    model.name = "resnet50"  # one of simam_jax.list_models()
    model.attention = "simam"  # none, simam, se, cbam
    model.attention_param = config_dict.placeholder(float)  # simam: lambda; se, cbam: reduction; None: the default
    model.dtype = "float32"  # computation: float32, bfloat16, float16, float64; parameters stay float32 (or float64)
    model.bn_group_size = 64  # images per batch-norm statistic; 0: those of one device; batch_size: all

    data = config.data = ConfigDict()
    data.source = "tfds"  # tfds, folder, digits, synthetic
    data.name = "imagenet2012:5.*.*"  # TFDS name and version; folder, digits, synthetic: not used
    data.data_dir = ""  # tfds, digits: where prepared data lie ("": TFDS's default); folder: the tree's root
    data.train_split = "train"  # TFDS split, or the folder below data_dir
    data.eval_split = "validation"
    data.image_size = 224  # pixels, height and width of what the network sees
    data.augmentation = "random_resized_crop"  # random_resized_crop, pad_crop, none
    data.min_area = 0.08  # random_resized_crop: smallest crop, as a fraction of the image's area
    data.crop_padding = 4  # pad_crop: pixels added on each side before the crop
    data.flip = True  # mirror half of the training images
    data.eval_resize = 256  # pixels: the shorter side before the centre crop; 0: resize straight to image_size
    data.resize = "exact"  # training images: exact (PIL's antialiased pixels) or fast
    data.mean = (0.485, 0.456, 0.406)  # per channel, of pixels in 0..1
    data.std = (0.229, 0.224, 0.225)
    data.randaugment_layers = 0  # operations per image; 0: off
    data.randaugment_magnitude = 9.0  # 0..30
    data.random_erasing = 0.0  # probability per image
    data.prefetch = 2  # batches made ahead on the host, and as many on the device
    data.max_unreadable = 0.001  # fraction of unreadable training files above which the run stops

    schedule = config.schedule = ConfigDict()
    schedule.name = "step"  # step, cosine
    schedule.learning_rate = 0.1  # the peak
    schedule.step_epochs = (30.0, 60.0, 90.0)  # step: when the rate is multiplied by step_factor
    schedule.step_factor = 0.1
    schedule.final_learning_rate = 0.0  # cosine: where it ends
    schedule.warmup_epochs = 0.0  # length of the warm-up; 0: none
    schedule.warmup_learning_rate = 0.0  # where the warm-up starts
    schedule.warmup_constant = False  # stay at warmup_learning_rate, then jump, instead of a straight line

    optimizer = config.optimizer = ConfigDict()  # SGD as PyTorch's
    optimizer.momentum = 0.9
    optimizer.nesterov = False
    optimizer.weight_decay = 1e-4  # coupled: added to the gradient before the momentum
    optimizer.decay_bn_and_bias = True  # False: only kernels (two or more dimensions) decay
    optimizer.clip_global_norm = 0.0  # gradients are scaled down to this norm; 0: off
    optimizer.grad_accum_steps = 1  # micro-batches per update; batch norm sees each micro-batch alone

    config.label_smoothing = 0.0  # 0..1
    config.mixup_alpha = 0.0  # Beta(alpha, alpha); 0: off
    config.cutmix_alpha = 0.0  # with both on, each pair of images draws one of the two
    config.ema_decay = 0.0  # per update, of all parameters and statistics; 0: off

    checkpoint = config.checkpoint = ConfigDict()
    checkpoint.every_epochs = 1.0
    checkpoint.keep_last = 3  # the newest ones
    checkpoint.keep_best = 1  # those with the best eval top-1

    distributed = config.distributed = ConfigDict()  # all empty: one process, or what JAX detects (see README)
    distributed.coordinator_address = ""  # HOST:PORT of process 0
    distributed.num_processes = 0
    distributed.process_id = -1
    distributed.auto = False  # let JAX find the three above: SLURM, Open MPI, GKE, Cloud TPU

    return config.lock()
