"""Global streams that wait for the end of a scope, which has others in place meanwhile."""

from __future__ import annotations

from typing import Any

import torch


class Parked:
    """What comes back when a scope ends.

    Attributes:
        device: The accelerator device whose stream is among them.
        states: By the name of the global generator, in its own form.
        place: Where the scope was entered, ``file:line``.
    """

    def __init__(self, device: torch.device | None, states: dict[str, Any], place: str) -> None:
        self.device, self.states, self.place = device, states, place

    def names_on(self, device: torch.device | None) -> set[str]:
        """Return the generators among them that a rank with this device has, too."""
        other = () if self.device in (None, device) else (self.device.type,)
        return set(self.states).difference(other)


# The streams are the process's, whichever thread, task or generator function entered the scope.
_open: list[Parked] = []


def park(parked: Parked) -> None:
    """Enter a scope: it is the innermost one now."""
    _open.append(parked)


def unpark(parked: Parked) -> None:
    """Leave a scope, in any order."""
    _open.remove(parked)


def open_scopes() -> tuple[Parked, ...]:
    """Return the scopes that the process is in, the outermost first."""
    return tuple(_open)


def first_inside(scopes: tuple[Parked, ...]) -> Parked | None:
    """Return the outermost open scope that was entered inside these; those that ended are gone."""
    return next((parked for parked in _open if parked not in scopes), None)


def next_inside(parked: Parked) -> Parked | None:
    """Return the scope that was entered after an open one; ``None``: it is the innermost."""
    inside = _open[_open.index(parked) + 1 :]
    return inside[0] if inside else None
