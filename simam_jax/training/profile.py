"""A profile of some updates, on request, for TensorBoard's profile page."""

from pathlib import Path
from typing import Any

import jax

from simam_jax import errors


class Profiler:
    """Records the updates FIRST to LAST of `"FIRST:LAST"` into `folder`; with an empty request nothing.

    Raises:
        UserError: the request has another form.
    """

    def __init__(self, request: str, folder: Path):
        try:
            self._first, self._last = (int(step) for step in request.split(":")) if request else (0, 0)
        except ValueError:
            raise errors.UserError(f"config.profile_steps={request!r}: give FIRST:LAST, such as 10:15.") from None
        if request and not 1 <= self._first <= self._last:
            raise errors.UserError(
                f"config.profile_steps={request!r}: the updates count from 1, and LAST is not below FIRST."
            )
        self._folder = folder
        self._recording = False

    def before(self, step: int) -> None:
        if step == self._first:
            jax.profiler.start_trace(str(self._folder))
            self._recording = True

    def after(self, step: int, values: Any) -> None:
        if step == self._last and self._recording:
            jax.block_until_ready(values)
            jax.profiler.stop_trace()
            self._recording = False
