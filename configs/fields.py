"""What a field of a config may hold: a default and a check of type, range, length or choice."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from simam_jax import errors
from simam_jax.paths import local


@dataclass(frozen=True)
class Field:
    """A default (None: there is none), and `problem`, which says what is wrong with a value: "" if nothing is."""

    default: Any
    problem: Callable[[Any], str]


def whole(default: int, least: int, most: float = math.inf) -> Field:
    """A whole number in least..most."""

    def problem(x: Any) -> str:
        return _outside(x, least, most) if type(x) is int else _kind(x, "a whole number")

    return Field(default, problem)


def number(
    default: float, least: float, most: float = math.inf, *, above: bool = False, optional: bool = False
) -> Field:
    """A finite number in least..most; `above`: greater than `least`; `optional`: None is allowed (default None)."""

    def problem(x: Any) -> str:
        if x is None and optional:
            return ""
        if isinstance(x, bool) or not isinstance(x, int | float) or not math.isfinite(x):
            return _kind(x, "a finite number")
        return f"it must be above {least:g}" if above and x <= least else _outside(x, least, most)

    return Field(None if optional else default, problem)


def numbers(default: tuple[float, ...], least: float, *, length: int = 0, above: bool = False) -> Field:
    """Finite numbers, each at least (`above`: greater than) `least`; `length` of them, if that is given."""
    each = number(0.0, least, above=above)

    def problem(xs: Any) -> str:
        if not isinstance(xs, tuple | list):
            return _kind(xs, "numbers in brackets, such as (30.0, 60.0)")
        if length and len(xs) != length:
            return f"it must hold {length} numbers, not {len(xs)}"
        return next(filter(None, map(each.problem, xs)), "")

    return Field(default, problem)


def flag(default: bool) -> Field:
    """True or False."""
    return Field(default, lambda x: "" if isinstance(x, bool) else _kind(x, "True or False"))


def text(default: str) -> Field:
    """Any text."""
    return Field(default, lambda x: "" if isinstance(x, str) else _kind(x, "text"))


def path(default: str) -> Field:
    """A path of this machine's file systems, or a word with a meaning of its own."""

    def problem(x: Any) -> str:
        if not isinstance(x, str):
            return _kind(x, "a path")
        try:
            local(x)
        except errors.UserError as error:
            return str(error).rstrip(".")
        return ""

    return Field(default, problem)


def choice(default: str, *others: str) -> Field:
    """One of some words."""
    known = (default, *others)

    def problem(x: Any) -> str:
        return "" if x in known else str(errors.unknown("choice", x, known)).rstrip(".")

    return Field(default, problem)


def _outside(x: float, least: float, most: float) -> str:
    if least <= x <= most:
        return ""
    return f"it must be at least {least:g}" if most == math.inf else f"it must be in {least:g}..{most:g}"


def _kind(x: Any, wanted: str) -> str:
    return f"it must be {wanted}, not {type(x).__name__}"
