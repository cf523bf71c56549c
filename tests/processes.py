"""Runs of train.py in processes of their own, for the tests that need real ones."""

import io
import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ROOT = Path(__file__).parent.parent
SMALL = {  # 30 updates of a network on 8x8 images: a second of work
    "batch_size": 48,
    "num_steps": 30,
    "log_every_steps": 1,
    "eval_every_epochs": 0.0,
    "checkpoint.every_epochs": 0.1,  # every third update
    "model.bn_group_size": 48,
    "data.image_size": 8,
    "data.crop_padding": 1,
}


class Run:
    """A `python train.py` of a recipe, made small (of digits, if none is named); its output is read as it comes."""

    def __init__(
        self,
        workdir: Path,
        cache: Path,
        *,
        program="train.py",
        recipe="digits_resnet20_simam",
        small=SMALL,
        mode="train",
        devices=1,
        size_limit=0,
        terminal=None,
        **changes,
    ):
        settings = (
            small | {"compilation_cache_dir": str(cache / "compiled"), "data.data_dir": str(cache / "data")} | changes
        )
        flags = [f"--config.{name}={value}" for name, value in settings.items()]
        command = [
            sys.executable,
            program,
            "--config",
            f"configs/{recipe}.py",
            "--workdir",
            str(workdir),
        ]
        limit = ["bash", "-c", f'ulimit -f {size_limit}; exec "$@"', "limited"] if size_limit else []
        in_terminal = [] if terminal is None else ["setsid", "--ctty"]  # util-linux: the terminal is then its own
        self.process = subprocess.Popen(
            [*in_terminal, *limit, *command, "--mode", mode, *flags],
            cwd=ROOT,
            env=os.environ
            | {
                "JAX_PLATFORMS": "cpu",
                "JAX_NUM_CPU_DEVICES": str(devices),
                "PYTHONUNBUFFERED": "1",
                "PYTHONPATH": str(ROOT),
            },
            stdin=terminal,
            stdout=terminal or subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.output = ""
        _started.append(self.process)

    def until(self, pattern: str) -> str:
        """Reads on until a line has the pattern; fails with what came instead."""
        for line in self.process.stdout:
            self.output += line
            if re.search(pattern, line):
                return line
        raise AssertionError(f"{pattern!r} is not in the output:\n{self.output}")

    def end(self, timeout: float = 300) -> int:
        """Waits for the end; the exit code."""
        rest, _ = self.process.communicate(timeout=timeout)
        self.output += rest
        return self.process.returncode

    def kill(self, number: int) -> None:
        self.process.send_signal(number)


_started: list[subprocess.Popen] = []


def kill_all() -> None:
    """Kills the runs that have not ended."""
    for process in _started:
        if process.poll() is None:
            process.kill()
            process.wait()
    _started.clear()


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def losses(workdir: Path) -> dict[int, float]:
    """The training loss after each update, as `metrics.jsonl` has it (the last word where an update was repeated)."""
    import json

    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["train/loss"] for line in lines if "train/loss" in line}


def pictures(workdir: Path, name: str) -> dict[int, np.ndarray]:
    """The images of that name in the event files, uint8 (H, W, 3) by step."""
    events = EventAccumulator(str(workdir), size_guidance={"tensors": 0})
    events.Reload()
    encoded = {event.step: event.tensor_proto.string_val[2] for event in events.Tensors(name)}  # 0, 1: its size
    return {step: np.asarray(Image.open(io.BytesIO(png))) for step, png in encoded.items()}


def wait_for(condition, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)
