"""The entry of a loader in the checkpoint: a position, one row of numbers per row of the job."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from nemo_rng_dcp.errors import RNGStateError
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

    @property
    def is_within_a_pass(self) -> bool:
        return self.fetched > 0


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


def mismatch(saved: Position, now: Position) -> str | None:
    """Return why batch k of this loader would not be the saved one's, if so."""
    names = {
        "rows": "number of rows",
        "batch_size": "batch size",
        "samples": "dataset's size",
        "loader_length": "length",
    }
    for field, name in names.items():
        then, here = getattr(saved, field), getattr(now, field)
        if then != here:
            return f"{name} {_known(then)}, and now it is {_known(here)}"
    return None


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
