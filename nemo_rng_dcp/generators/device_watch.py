"""Notices when a rank's accelerator device or its stream was exchanged by other code."""

from __future__ import annotations

import threading

import torch

from nemo_rng_dcp.errors import warn
from nemo_rng_dcp.generators.device import device_in_use
from nemo_rng_dcp.generators.torch_random import initial_seed


class DeviceWatch:
    """What a ``StatefulRNG`` remembers of the device whose stream it stores; moves no stream.

    Nothing here communicates.

    Args:
        device: The device; ``None``: no device's stream is stored, and there is nothing to notice.
    """

    def __init__(self, device: torch.device | None) -> None:
        self._device = device
        # Which device is current belongs to a thread, and in a thread that chose none it is the
        # first one: so only the thread that made the choice is asked.
        self._thread = threading.current_thread()
        self.note_seeds()
        self._first_call = True  # the first state_dict(), before anything was restored

    def note_seeds(self) -> None:
        """Remember what the streams were seeded with: they were just seeded or restored."""
        self._seeds, self._first_call = self._current_seeds(), False

    def warn_if_another_is_current(self) -> None:
        """Warn if this thread chose another device since; the message names both."""
        current = None if self._device is None else device_in_use()
        if current in (self._device, None) or threading.current_thread() is not self._thread:
            return
        warn(
            f"this StatefulRNG stores and restores the stream of {self._device}, but {current} is "
            "the current device now, and its stream is left alone. Choose the rank's device before "
            "StatefulRNG is constructed and keep it, or name it with device=.",
        )

    def warn_if_reseeded(self, row: int) -> None:
        """Warn if other code gave the device another stream; for ``state_dict()``.

        A draw never changes what a generator was seeded with, and ``torch.manual_seed`` seeds the
        CPU's too. Only row 1 warns; row 0 keeps its own stream, which DTensor gives to the others.
        """
        before, now = self._seeds, self._current_seeds()
        first, self._first_call = self._first_call, False
        if first:
            return  # dcp.load asks for a state too, and puts right what it finds
        self._seeds = now
        if row != 1 or before is None or now is None or before[0] != now[0] or before == now:
            return
        warn(
            f"other code gave {self._device} another stream (seed {now[1]}, after {before[1]}) "
            "since StatefulRNG seeded or restored it. torch's DTensor does so: the first random "
            "operation on a DTensor in a process gives every rank the stream of rank 0. Ranks then "
            "draw the same numbers, and a resume is not exact. Let that operation happen at once, "
            "on every rank after StatefulRNG is constructed: `with ScopedRNG(seed=None): "
            "torch.distributed.tensor.rand(1, device_mesh=mesh)`",
        )

    def _current_seeds(self) -> tuple[int, int] | None:
        """Return what torch's global generators were last seeded with: the CPU's, the device's."""
        return None if self._device is None else (torch.initial_seed(), initial_seed(self._device))
