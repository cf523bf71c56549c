"""Errors of the user's making: one message that names the value and the way out, and no traceback."""

import difflib
import sys
from collections.abc import Callable, Iterable


class UserError(ValueError):
    """A wrong input. The message says what was given, what is accepted and what to do."""


def unknown(kind: str, value: object, known: Iterable[str]) -> UserError:
    """The error for a name that is in no table: names the nearest known one, then all of them (or the first 50)."""
    known = list(known)
    near = difflib.get_close_matches(str(value), known, n=1, cutoff=0.5)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    more = f" and {len(known) - 50} more" if len(known) > 50 else ""
    return UserError(f"Unknown {kind} {value!r}.{hint} Known: {', '.join(known[:50])}{more}.")


def run_cli(main: Callable[[], int | None]) -> None:
    """Runs a command's `main` and exits: 0 or what it returns; 2 with the bare message for a `UserError`."""
    try:
        sys.exit(main() or 0)
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")  # in one piece: other threads may be writing there
        sys.exit(2)
