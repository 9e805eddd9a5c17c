"""Whether a load has read anything into the record that it was given.

``dcp.load`` asks its entries for tensors, reads into them and gives them back. A record that is
handed out for that is marked (``Record.unread``). Whoever copies it, and whatever draws meanwhile:
if the mark is there afterwards, nothing was read. The record is whole, so a program that keeps and
saves it loses nothing.
"""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from itertools import count
from types import FrameType

from torch.distributed.checkpoint import state_dict_loader, state_dict_saver

from nemo_rng_dcp.record import Record

_marks: set[int] = set()
"""Those that this process has given out and not found again."""


def load_is_asking() -> bool:
    """Return whether the caller runs because ``dcp.load`` asks for tensors to read into.

    That is the first part of ``load``. What an entry asks for while it is given its state, or what
    a save inside of an entry asks for, is the streams.
    """
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        module, name = frame.f_globals.get("__name__"), frame.f_code.co_name
        if module == state_dict_loader.__name__:
            return name == "load"
        if module == state_dict_saver.__name__ or name == "load_state_dict":
            return False
        frame = frame.f_back
    return False


def mark() -> int:
    """Return a moment, in nanoseconds since 1970, that no other mark of this process has."""
    moment = next(moment for moment in count(time.time_ns()) if moment not in _marks)
    _marks.add(moment)
    return moment


def is_found_again(moment: int) -> bool:
    """Return whether a moment is that of a mark of this process; no from then on."""
    if moment not in _marks:
        return False
    _marks.remove(moment)
    return True


def marked(record: Record) -> Record:
    """Return a record with a mark."""
    return replace(record, unread=True, taken_at=mark())


def was_read(record: Record) -> bool:
    """Return whether a load has read the record that it gives back; no once for each mark.

    A record with a mark that was saved all the same is one of another process, or the caller knows
    already: it is restored as the record that it is.
    """
    return not (record.unread and is_found_again(record.taken_at))
