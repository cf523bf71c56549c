"""Train, evaluate or check what a config describes.

    python train.py --config configs/resnet50_simam.py --workdir DIR [--mode eval|check]

Every field of the config (all of them stand in configs/base.py) can be set here: --config.batch_size=64.
"""

from collections.abc import Sequence
from pathlib import Path

from simam_jax import errors

with errors.as_message():  # what a bare install lacks
    from absl import app, flags, logging
    from ml_collections import config_flags

    from configs import base

CONFIG = config_flags.DEFINE_config_file(
    "config", None, "A recipe: configs/NAME.py, or configs/NAME.py:ARGUMENT=VALUE."
)
WORKDIR = flags.DEFINE_string(
    "workdir", "", "The run's folder: checkpoints, event files, metrics. Continued if it has some."
)
MODE = flags.DEFINE_enum(
    "mode",
    "train",
    ["train", "eval", "check"],
    "train; eval: score the checkpoint; check: compile, show the costs, stop.",
)
flags.mark_flags_as_required(["config"])
flags.register_validator("workdir", bool, "--workdir=DIR is needed.")


def main(argv: Sequence[str]) -> None:
    if argv[1:]:
        raise errors.UserError(f"Unexpected {' '.join(argv[1:])!r}: settings are given as --config.FIELD=VALUE.")
    if not flags.FLAGS["verbosity"].present:  # --verbosity=0 shows what the libraries say
        logging.set_verbosity(logging.WARNING)
    from simam_jax.tasks import make_task
    from simam_jax.training import check, distributed, evaluation, loop

    modes = {"train": loop.train, "eval": evaluation.evaluate_checkpoint, "check": check.check}
    config = CONFIG.value
    base.check(config)
    with distributed.multi_process(config.distributed):
        modes[MODE.value](config, WORKDIR.value, make_task)


def parse(argv: Sequence[str]) -> list[str]:
    """The flags; a misspelt recipe or field is an error that names the nearest one."""
    for flag, value in zip(argv, [*argv[1:], ""], strict=True):
        name, _, rest = flag.partition("=")
        path = Path((rest or value).partition(":")[0])
        if name.lstrip("-") == "config" and not path.is_file():
            raise errors.unknown("--config", str(path), sorted(map(str, path.parent.glob("[!_]*.py"))))
    try:
        return app.parse_flags_with_usage(list(argv))
    except AttributeError as error:  # ml_collections: a field that the locked config does not have
        text = str(error).replace("\\n", ". ").replace("\\", "").replace("'", "")
        raise errors.UserError(f"There is no config field {text} All fields stand in configs/base.py.") from error


if __name__ == "__main__":
    errors.run_cli(lambda: app.run(main, flags_parser=parse))
