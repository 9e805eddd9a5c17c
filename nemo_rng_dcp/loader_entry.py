"""What a job makes of the entry of a loader: its key, and whether a load can go on there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from nemo_rng_dcp.errors import RNGStateError, warn
from nemo_rng_dcp.position import POSITION_KEY, UNKNOWN, Position, positions_in
from nemo_rng_dcp.record import KEY
from nemo_rng_dcp.table import Rows, local, source_row
from nemo_rng_dcp.unread import is_found_again, mark


def position_key(rows: Rows) -> str:
    """Return the key of a loader's table; that of a grid without rank 0 has a name of its own."""
    return POSITION_KEY + rows.key.removeprefix(KEY)


def loaded_positions(table: torch.Tensor, rows: list[int]) -> list[Position]:
    """Return the positions in a table that are loaded into these rows of the job.

    Args:
        table: What DCP read, the rows of this process or all of them.
        rows: The rows of this process.

    Raises:
        RNGStateError: It holds no positions, or those of other rows.
    """
    found = positions_in(local(table))
    by_row = {position.row: position for position in found}
    wanted = [source_row(row, found[0].rows) for row in rows]
    if not by_row.keys() >= set(wanted):
        raise RNGStateError(
            f"{POSITION_KEY}: rows {rows} were given the positions of rows {sorted(by_row)}, "
            f"expected {wanted}. Save on all ranks with dcp.save, and load with dcp.load."
        )
    return [by_row[row] for row in wanted]


def marked_position(position: Position) -> Position:
    """Return a position from which it can be told later whether a load has read into it."""
    return position._replace(saved_at=-mark())


def is_unread(position: Position) -> bool:
    """Return whether a load has read nothing into it; once only, as ``was_read`` for a record."""
    return position.saved_at < 0 and is_found_again(-position.saved_at)


def check_that_it_goes_on(saved: Sequence[Position], now: Sequence[Position]) -> None:
    """Check that the next batches of loaders are those behind the saved positions, row by row.

    Warns:
        RNGStateWarning: They are, and another number of workers makes them.

    Raises:
        RNGStateError: They would be other samples.
    """
    at = saved[0]
    anew = "load without the loader and call set_epoch(), which begins an epoch anew."
    for other in saved:
        if other.place != at.place:
            raise RNGStateError(
                f"row {at.row} was saved behind batch {at.fetched} of epoch {at.epoch}, and row "
                f"{other.row} behind batch {other.fetched} of epoch {other.epoch}: this process "
                "plays both, and goes on at one place. Loaders of all rows need one length: give "
                f"batches_per_epoch=. Resume on as many processes as it was saved on, or {anew}"
            )
    if not at.fetched:
        return
    for then, here in zip(saved, now, strict=True):
        for field, name in _COMPARED.items():
            was, is_now = getattr(then, field), getattr(here, field)
            if was != is_now:
                raise RNGStateError(
                    f"the loader was saved behind batch {at.fetched} of epoch {at.epoch} with "
                    f"{name} {_known(was)}, and now it is {_known(is_now)}: its next batch would "
                    f"be other samples. Resume with what it was saved with, or {anew}"
                )
    if at.workers != now[0].workers:
        warn(
            f"the loader was saved in the middle of an epoch with {at.workers} workers and goes on "
            f"with {now[0].workers}: the order is the same, but what they draw for a sample "
            "differs."
        )


_COMPARED = {
    "rows": "number of rows",
    "batch_size": "batch size",
    "samples": "dataset's size",
    "loader_length": "length",
}


def figures_of(loader: Any) -> dict[str, int]:
    """Return what a loader tells of itself, by the names of :class:`Position`."""
    return {
        "loader_length": _told(lambda: len(loader)),
        "samples": _told(lambda: len(loader.dataset)),
        "batch_size": _told(lambda: loader.batch_size),
        "workers": _told(lambda: loader.num_workers),
    }


def _told(figure: Callable[[], Any]) -> int:
    try:
        return int(figure())
    except Exception:  # a save must not fail because a dataset's length is unknown
        return UNKNOWN


def _known(number: int) -> str:
    return "none" if number == UNKNOWN else str(number)
