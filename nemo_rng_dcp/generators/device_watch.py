"""Notices when a rank's accelerator device or its stream was exchanged by other code."""

from __future__ import annotations

import threading
from collections.abc import Mapping

import torch

from nemo_rng_dcp.errors import warn
from nemo_rng_dcp.generators.device import device_in_use
from nemo_rng_dcp.generators.generator_set import States
from nemo_rng_dcp.generators.torch_random import initial_seed

Seeds = list[tuple[int, int]]


class DeviceWatch:
    """What a ``StatefulRNG`` remembers of the device whose stream it stores; moves no stream.

    Nothing here communicates.

    Args:
        device: The device; ``None``: no device's stream is stored, and there is nothing to notice.
        states: By the ranks that this process plays, the states of their generators.
    """

    def __init__(self, device: torch.device | None, states: Mapping[int, States]) -> None:
        self._device = device
        # Which device is current belongs to a thread, and in a thread that chose none it is the
        # first one: so only the thread that made the choice is asked.
        self._thread = threading.current_thread()
        self.note_seeds(states)
        self._first_call = True  # the first state_dict(), before anything was restored

    def note_seeds(self, states: Mapping[int, States]) -> None:
        """Remember what the streams were seeded with: they were just restored."""
        self._seeds, self._first_call = self._seeds_of(states), False

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

    def warn_if_reseeded(self, states: Mapping[int, States], *, speaks: bool) -> None:
        """Warn if other code gave the device another stream; for ``state_dict()``.

        A draw never changes what a generator was seeded with, and ``torch.manual_seed`` seeds the
        CPU's too. One rank ``speaks``, and not row 0's: that keeps its own stream, which DTensor
        gives to the others.
        """
        before, now = self._seeds, self._seeds_of(states)
        first, self._first_call = self._first_call, False
        if first:
            return  # dcp.load asks for a state too, and puts right what it finds
        self._seeds = now
        changed = [
            (device_before, device_now)
            for (cpu_before, device_before), (cpu_now, device_now) in zip(before, now, strict=True)
            if cpu_before == cpu_now and device_before != device_now
        ]
        if not speaks or not changed:
            return
        seed_before, seed_now = changed[0]
        warn(
            f"other code gave {self._device} another stream (seed {seed_now}, after {seed_before}) "
            "since StatefulRNG seeded or restored it. torch's DTensor does so: the first random "
            "operation on a DTensor in a process gives every rank the stream of rank 0. Ranks then "
            "draw the same numbers, and a resume is not exact. Let that operation happen at once, "
            "on every rank after StatefulRNG is constructed: `with ScopedRNG(seed=None): "
            "torch.distributed.tensor.rand(1, device_mesh=mesh)`",
        )

    def _seeds_of(self, states: Mapping[int, States]) -> Seeds:
        """Return what torch's global generators were last seeded with: the CPU's, the device's.

        In the order of the ranks: a process group that comes later numbers the only one anew.
        """
        device = self._device
        if device is None:
            return []
        return [
            (
                initial_seed(torch.device("cpu"), states[rank]["torch"]),
                initial_seed(device, states[rank][device.type]),
            )
            for rank in sorted(states)
        ]
