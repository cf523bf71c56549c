"""Images per second of whole networks beside PyTorch, with and without SimAM.

python -m benchmarks.versus_torch train_step [--models resnet50 ...]
python -m benchmarks.versus_torch inference
"""

import argparse
import statistics
from functools import partial

from benchmarks import measure, networks
from simam_jax.errors import run_cli, unknown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("train_step", "inference"))
    parser.add_argument("--models", nargs="+", default=networks.MODELS, help="default: all four")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    training = args.what == "train_step"
    ours = networks.our_training if training else networks.our_inference
    theirs = networks.torch_training if training else networks.torch_inference

    rows = []
    for name in args.models:
        if name not in networks.MODELS:
            raise unknown("model", name, networks.MODELS)
        contestants = {}
        for attention in ("simam", "none"):
            size = name, attention, args.batch_size, args.image_size
            contestants[f"ours {attention}"] = partial(ours, *size)
            contestants[f"eager {attention}"] = partial(theirs, *size, compiled=False)
            contestants[f"compiled {attention}"] = partial(theirs, *size, compiled=True)
        with measure.in_processes(contestants) as timers:
            times = measure.in_turns(timers, args.rounds, settle=True)
        speed = {key: args.batch_size / statistics.median(value) for key, value in times.items()}
        best = max(("eager", "compiled"), key=lambda peer: speed[f"{peer} simam"])
        rows.append(
            {
                "model": name,
                "images/s, SimAM": speed["ours simam"],
                "over PyTorch eager": measure.ratio(times["eager simam"], times["ours simam"]),
                "over PyTorch compiled": measure.ratio(times["compiled simam"], times["ours simam"]),
                "SimAM's share": measure.ratio(times["ours simam"], times["ours none"]),
                "PyTorch's share (its best)": measure.ratio(times[f"{best} simam"], times[f"{best} none"]),
            }
        )
        print(measure.table(rows[-1:]), flush=True)
    measure.write(args.what, rows, batch_size=args.batch_size, image_size=args.image_size, rounds=args.rounds)


if __name__ == "__main__":
    run_cli(main)
