"""PyTorch checkpoints into workdirs, and back: `python -m simam_jax.convert`."""

import argparse
import dataclasses

from simam_jax import checkpoints, errors
from simam_jax.command_line import add_network_arguments, read_class_names
from simam_jax.models import MODELS
from simam_jax.paths import local
from simam_jax.torch_weights.files import write_state
from simam_jax.torch_weights.names import to_torch
from simam_jax.weights import ABOUT_WEIGHTS, Weights, load_torch, load_weights, preprocessing_of


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m simam_jax.convert",
        description="Turns a file of PyTorch weights into a workdir, or back with --to-torch.",
    )
    parser.add_argument(
        "source", help=".pth.tar, .pth, .safetensors or .npz; with --to-torch a workdir or a checkpoint in it"
    )
    parser.add_argument("dest", help="a new workdir; with --to-torch a new .pth.tar, .pth, .safetensors or .npz")
    parser.add_argument(
        "--to-torch", action="store_true", help="write a state_dict that the reference implementation loads strictly"
    )
    parser.add_argument(
        "--module-prefix",
        action="store_true",
        help="with --to-torch: `module.` before every name, as the reference implementation's ImageNet script has it",
    )
    add_network_arguments(parser, of="of a file: ")
    parser.add_argument("--num-classes", type=int, help="default: as the file has it")
    parser.add_argument("--skip-head", action="store_true", help="draw a new classifier, for --num-classes classes")
    parser.add_argument("--key", help="under which key of the file the weights are, where there are several")
    parser.add_argument("--ema", action="store_true", help="the exponential moving average of the weights")
    parser.add_argument(
        "--mean", type=float, nargs=3, help="per channel, of pixels in 0..1; default: the network's own"
    )
    parser.add_argument("--std", type=float, nargs=3, help="the same")
    parser.add_argument("--image-size", type=int, help="pixels that the network sees in height and width")
    parser.add_argument("--eval-resize", type=int, help="pixels of the shorter side before the centre crop; 0: no crop")
    parser.add_argument("--class-names", help="a text file with one name a line")
    args = parser.parse_args(argv)
    if args.to_torch:
        _workdir_to_torch(args)
    else:
        _torch_to_workdir(args)
    print(f"Wrote {args.dest}")


def _torch_to_workdir(args: argparse.Namespace) -> None:
    dest = local(args.dest)
    if dest.exists() and not (dest.is_dir() and not any(dest.iterdir())):
        raise errors.UserError(f"{dest} exists already: nothing was written. Name a new folder.")
    if args.skip_head:
        found = _with_a_new_head(args)
    else:
        settings = {name: getattr(args, name) for name in ("num_classes", "attention", "attention_param", "key", "ema")}
        found = load_weights(args.source, name=args.model, **settings)
    given = {name: getattr(args, name) for name in ("mean", "std", "image_size", "eval_resize")}
    given = {name: value for name, value in given.items() if value is not None}
    stored = preprocessing_of(found)
    if unknown := [name for name in given if not hasattr(stored, name)]:
        raise errors.UserError(f"--{unknown[0].replace('_', '-')} is not of the preprocessing of {args.model}.")
    spec = dict(found.spec) | {"preprocessing": dataclasses.asdict(dataclasses.replace(stored, **given))}
    if args.class_names:
        spec["class_names"] = read_class_names(args.class_names, found.model.num_classes)
    checkpoints.write_weights(dest, spec, found.variables)


def _with_a_new_head(args: argparse.Namespace) -> Weights:
    if args.model is None:
        raise errors.UserError("Say which network the file is of, with --model (such as --model resnet50).")
    settings = {name: getattr(args, name) for name in ("num_classes", "attention", "attention_param", "key", "ema")}
    model, variables = load_torch(args.source, args.model, skip_head=True, **settings)
    return Weights(model, variables, {"task": MODELS[args.model].task, "model": model.spec()})


def _workdir_to_torch(args: argparse.Namespace) -> None:
    found = load_weights(args.source, ema=args.ema)
    about = {name: found.spec[name] for name in ABOUT_WEIGHTS if name in found.spec}
    prefix = "module." if args.module_prefix else ""
    state = to_torch(found.variables, found.model.architecture, attention=found.model.attention, prefix=prefix)
    write_state(state, args.dest, about)


if __name__ == "__main__":
    errors.run_cli(main)
