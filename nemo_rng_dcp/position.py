"""The entry of a loader in the checkpoint: a position, one row of numbers per row of the job."""

from __future__ import annotations

from typing import NamedTuple

import torch

from nemo_rng_dcp.errors import RNGStateError

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
        return torch.tensor(self, device="cpu")

    @property
    def place(self) -> tuple[int, ...]:
        """Where in the training the loader is."""
        return self.epoch, self.begun_again, self.batches, self.fetched


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
