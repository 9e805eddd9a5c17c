"""The records of a checkpoint, read row by row."""

from __future__ import annotations

from collections.abc import Collection

import torch

from nemo_rng_dcp.cli.reading.checkpoint import Checkpoint
from nemo_rng_dcp.cli.reading.index import Chunk
from nemo_rng_dcp.errors import RNGStateError
from nemo_rng_dcp.keys import path_of
from nemo_rng_dcp.record import KEY, Record
from nemo_rng_dcp.table import records_in


def find_tables(checkpoint: Checkpoint) -> list[Table]:
    """Return the tables of a checkpoint, in the order of their keys."""
    return [Table(checkpoint, key) for key in checkpoint.records]


class Table:
    """The records that one ``StatefulRNG`` stored.

    Attributes:
        key: Where the ``StatefulRNG`` was in what was saved: "rng" for "rng.rng_streams", "" at
            the top level.
        count: Rows, by what the checkpoint says. Nothing here is as long as it says.
        placed: The numbers of the rows that it has a place for, in their order.
        missing: How many of the ``count`` rows have none.
    """

    def __init__(self, checkpoint: Checkpoint, key: str) -> None:
        self.key = path_of(key)
        self._checkpoint = checkpoint
        self._places: dict[int, Chunk | torch.Tensor | str] = {}
        self._readers: dict[int, set[int | None]] = {}
        (size,) = checkpoint.keys[key].size
        chunks = checkpoint.chunks(key)
        first = next(iter(chunks), Chunk((0,), (size,)))
        if len(chunks) <= 1 and first.sizes == (size,):
            # One row, or a whole table that one process wrote.
            self._places.update(enumerate(self._records(first)))
            self._readers = dict.fromkeys(self._places, chunks.get(first, set()))
            self.count = len(self._places)
        else:
            length = max([1, *first.sizes])
            self.count = max(1, size // length)
            for chunk, readers in chunks.items():
                row, rest = divmod(chunk.offsets[0], length) if len(chunk.offsets) == 1 else (0, 1)
                whole = chunk.sizes == (length,) and not rest
                self._places[row] = chunk if whole else "damaged: it has no chunk of its own"
                self._readers[row] = readers
        self.placed = sorted(self._places)
        self.missing = self.count - sum(row < self.count for row in self.placed)

    def expects(self, row: int) -> bool:
        """Return whether there should be such a row, or is one."""
        return row < self.count or row in self._places

    def read(self, row: int) -> Record | str:
        """Return the record of a row, checked as a load checks it, or the reason why not."""
        place = self._places.get(row, "missing: the checkpoint has no place for it")
        if isinstance(place, str):
            return place
        try:
            numbers = self._checkpoint.numbers(place) if isinstance(place, Chunk) else place
            record = Record.from_tensor(numbers)
        except RNGStateError as error:
            return f"damaged: {str(error).removeprefix(f'{KEY}: ')}"
        except (ValueError, OSError) as error:
            return f"unreadable: {error}"
        if record.row != row or record.rows != self.count:
            return (
                f"damaged: it says that it is row {record.row} of {record.rows}, and stands in the "
                f"place of row {row} of {self.count}"
            )
        names = [*record.streams, *(name for name, _ in record.mesh or []), record.hash_seed]
        if not all(name.isprintable() for name in names):
            return "damaged: a text in it is not printable"
        return record

    def hidden_from(self, row: int, ranks: Collection[int]) -> list[int]:
        """Return those of some ranks that do not find a row, though it is there."""
        readers = self._readers.get(row, set())
        return [] if None in readers else [rank for rank in ranks if rank not in readers]

    def _records(self, chunk: Chunk) -> list[torch.Tensor] | list[str]:
        try:
            return records_in(self._checkpoint.numbers(chunk))
        except (ValueError, OSError, RNGStateError) as error:
            return [f"unreadable: {error}"]
