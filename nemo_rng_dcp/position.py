"""The entry of a loader in the checkpoint: a position, one row of numbers per row of the job."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from nemo_rng_dcp.errors import RNGStateError, warn
from nemo_rng_dcp.record import KEY
from nemo_rng_dcp.table import Rows, local, source_row
from nemo_rng_dcp.unread import is_found_again, mark

POSITION_KEY = "loader_position"
"""The key of the entry in what ``ResumableLoader.state_dict()`` returns."""

POSITION_LAYOUT = 1

UNKNOWN = -1
"""Stands for what a loader does not tell, such as the length of a stream."""


class Position(NamedTuple):
    """Where a loader of one row is. All are int64 in the checkpoint, in this order.

    It begins as a record does, so a table of positions is read as one of records.

    Attributes:
        layout: Of these numbers; 1.
        version: Of the library that wrote them.
        length: How many numbers they are.
        row: The row that the loader belongs to.
        rows: Rows of the job.
        saved_at: When ``state_dict()`` was called, in nanoseconds since 1970; negative in one that
            ``dcp.load`` is given to read into.
        seed: Of the loader, from which the streams of each pass are made.
        order: What the order is made from where samplers have generators of their own.
        epoch: Completed passes.
        begun_again: How often this pass was begun anew.
        batches: Handed out in this pass.
        fetched: ``batches``, and those for which the loader raised instead.
        indices: A check of what the sampler gave for them.
        loader_length: ``len(loader)``.
        samples: In the dataset.
        batch_size: Samples of a batch.
        workers: Worker processes.
    """

    layout: int
    version: int
    length: int
    row: int
    rows: int
    saved_at: int
    seed: int
    order: int
    epoch: int
    begun_again: int
    batches: int
    fetched: int
    indices: int
    loader_length: int
    samples: int
    batch_size: int
    workers: int

    def to_tensor(self) -> torch.Tensor:
        """Return the numbers as a row of a table."""
        return torch.tensor(self, dtype=torch.int64, device="cpu")

    def marked(self) -> Position:
        """Return a position from which it can be told later whether a load has read into it."""
        return self._replace(saved_at=-mark())

    @property
    def is_unread(self) -> bool:
        """Whether a load has read nothing into it; once only, as ``was_read`` for a record."""
        return self.saved_at < 0 and is_found_again(-self.saved_at)

    @property
    def place(self) -> tuple[int, ...]:
        """Where in the training the loader is."""
        return self.epoch, self.begun_again, self.batches, self.fetched


def position_key(rows: Rows) -> str:
    """Return the key of a loader's table; that of a grid without rank 0 has a name of its own."""
    return POSITION_KEY + rows.key.removeprefix(KEY)


def positions_in(numbers: torch.Tensor) -> list[Position]:
    """Return the positions that stand one after the other in a tensor.

    Raises:
        RNGStateError: It holds something else.
    """
    width = len(Position._fields)
    if numbers.dtype != torch.int64 or numbers.numel() == 0 or numbers.numel() % width:
        raise RNGStateError(
            f"{POSITION_KEY}: found {numbers.dtype} {tuple(numbers.shape)}, expected torch.int64 "
            f"(rows * {width},). No ResumableLoader of this version wrote that."
        )
    positions = [Position(*row) for row in numbers.view(-1, width).tolist()]
    for position in positions:
        if position.layout != POSITION_LAYOUT or not 0 <= position.row < position.rows:
            raise RNGStateError(
                f"{POSITION_KEY}: found layout {position.layout}, row {position.row} of "
                f"{position.rows}, expected layout {POSITION_LAYOUT}. A newer nemo_rng_dcp wrote "
                "it, or it was altered."
            )
    return positions


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
