"""The command that prints what a network costs, stage by stage: `python -m simam_jax.summary --model resnet50`."""

import argparse

from simam_jax import errors
from simam_jax.command_line import add_network_arguments
from simam_jax.models import MODELS, create_model
from simam_jax.models.costs import summarize
from simam_jax.preprocessing import DetectionPreprocessing


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m simam_jax.summary", description="What a network costs, by stage.")
    add_network_arguments(parser, required=True)
    parser.add_argument("--num-classes", type=int, help="default: 1000, or 10 for the CIFAR networks, 80 for detectors")
    parser.add_argument(
        "--image-size", type=int, help="pixels; default: 224, 32 for the CIFAR networks, 800 x 1344 for detectors"
    )
    args = parser.parse_args(argv)
    model = create_model(
        args.model, num_classes=args.num_classes, attention=args.attention, attention_param=args.attention_param
    )
    how = MODELS[args.model].preprocessing
    if args.image_size is None:
        size = how.bucket(how.min_size, how.max_size) if isinstance(how, DetectionPreprocessing) else (how.image_size,)
    elif args.image_size < 1:
        raise errors.UserError(f"--image-size must be at least 1, got {args.image_size}.")
    else:
        size = (args.image_size,)
    print(summarize(model, *size))


if __name__ == "__main__":
    errors.run_cli(main)
