"""The command that prints what a network costs, stage by stage: `python -m simam_jax.summary --model resnet50`."""

import argparse

from simam_jax import errors
from simam_jax.command_line import add_network_arguments
from simam_jax.models import create_model
from simam_jax.models.costs import summarize


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m simam_jax.summary", description="What a network costs, by stage.")
    add_network_arguments(parser, required=True)
    parser.add_argument("--num-classes", type=int, help="default: 1000, or 10 for the CIFAR networks")
    parser.add_argument("--image-size", type=int, help="pixels; default: 224, or 32 for the CIFAR networks")
    args = parser.parse_args(argv)
    cifar = args.model.startswith("cifar_")
    image_size = args.image_size if args.image_size is not None else (32 if cifar else 224)
    if image_size < 1:
        raise errors.UserError(f"--image-size must be at least 1, got {image_size}.")
    model = create_model(
        args.model,
        num_classes=args.num_classes if args.num_classes is not None else (10 if cifar else 1000),
        attention=args.attention,
        attention_param=args.attention_param,
    )
    print(summarize(model, image_size))


if __name__ == "__main__":
    errors.run_cli(main)
