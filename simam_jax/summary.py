"""The command that prints what a network costs, stage by stage: `python -m simam_jax.summary --model resnet50`."""

import argparse

from simam_jax import errors
from simam_jax.command_line import add_network_arguments
from simam_jax.models import MODELS, create_model
from simam_jax.models.costs import summarize


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m simam_jax.summary", description="What a network costs, by stage.")
    add_network_arguments(parser, required=True)
    parser.add_argument("--num-classes", type=int, help="default: 1000, or 10 for the CIFAR networks")
    parser.add_argument("--image-size", type=int, help="pixels; default: 224, or 32 for the CIFAR networks")
    args = parser.parse_args(argv)
    model = create_model(
        args.model, num_classes=args.num_classes, attention=args.attention, attention_param=args.attention_param
    )
    image_size = MODELS[args.model].preprocessing.image_size if args.image_size is None else args.image_size
    if image_size < 1:
        raise errors.UserError(f"--image-size must be at least 1, got {image_size}.")
    print(summarize(model, image_size))


if __name__ == "__main__":
    errors.run_cli(main)
