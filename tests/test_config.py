"""Every field of the config is checked before anything is built: a value below, above or of the wrong kind is one message."""

import importlib
import math
from pathlib import Path

import pytest

import simam_jax
from configs import base

RECIPES = sorted(p.stem for p in Path("configs").glob("*_*.py") if p.stem != "__init__")
NAMES = [name for name, _ in base.fields()]
TEXTS = {name for name, field in base.fields() if isinstance(field.default, str)}
FLAGS = {name for name, field in base.fields() if isinstance(field.default, bool)}


def with_value(name, value):
    """The default config with a value that the flags may not have been asked about."""
    config = base.get_config()
    section, _, field = name.rpartition(".")
    part = config[section] if section else config
    with config.unlocked(), part.ignore_type():
        part[field] = value
    return config


def refused(name, value):
    with pytest.raises(simam_jax.UserError, match=rf"--config\.{name}=") as error:
        base.check(with_value(name, value))
    assert "configs/base.py" in str(error.value)


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_passes_the_check(recipe):
    base.check(importlib.import_module(f"configs.{recipe}").get_config())


@pytest.mark.parametrize("name", NAMES)
def test_a_value_of_the_wrong_kind_is_refused(name):
    refused(name, {"a": "dictionary"})
    refused(name, 3 if name in TEXTS | FLAGS else "three")


@pytest.mark.parametrize("name", [name for name in NAMES if name not in TEXTS | FLAGS])
def test_a_value_outside_the_range_is_refused(name):
    several = isinstance(base.get_config().to_dict() and dict(base.fields())[name].default, tuple)
    below = (-2.0,) * 3 if several else -2
    refused(name, below)
    if not several and name not in {n for n in NAMES if isinstance(dict(base.fields())[n].default, int)}:
        refused(name, math.nan)
        refused(name, math.inf)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("classification.label_smoothing", 2.0),
        ("ema_decay", 1.5),
        ("data.min_area", 2.0),
        ("data.min_area", 0.0),
        ("data.std", (0.0, 0.0, 0.0)),
        ("data.mean", (0.5, 0.5)),
        ("data.randaugment_magnitude", 31.0),
        ("optimizer.momentum", 1.1),
        ("seed", 2**31),
        ("seed", True),
    ],
)
def test_a_value_above_the_range_or_of_another_length_is_refused(name, value):
    refused(name, value)


@pytest.mark.parametrize(
    "name", [name for name in NAMES if name in ("data.resize", "data.augmentation", "schedule.name")]
)
def test_a_misspelt_choice_names_the_nearest(name):
    right = dict(base.fields())[name].default
    with pytest.raises(simam_jax.UserError, match=f"Did you mean '{right}'"):
        base.check(with_value(name, right[:-1]))


def test_zero_turns_off_what_it_says_it_turns_off():
    for name in ("log_every_steps", "checkpoint.every_epochs", "eval_every_epochs", "max_step_seconds"):
        base.check(with_value(name, 0))
