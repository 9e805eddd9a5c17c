"""The records of a checkpoint: found by their name, read row by row."""

from __future__ import annotations

import torch

from nemo_rng_dcp.cli.checkpoint import Checkpoint
from nemo_rng_dcp.cli.metadata import Chunk
from nemo_rng_dcp.errors import RNGStateError
from nemo_rng_dcp.record import KEY, Record, records_in


def find_tables(checkpoint: Checkpoint) -> list[Table]:
    """Return the tables of a checkpoint, in the order of their keys, at whatever depth they are."""
    return [
        Table(checkpoint, key)
        for key, stored in sorted(checkpoint.keys.items())
        if key.rpartition(".")[2] == KEY and stored.dtype == "int64" and len(stored.size) == 1
    ]


def require_tables(checkpoint: Checkpoint) -> list[Table]:
    """Return the tables of a checkpoint.

    Raises:
        RNGStateError: It has none.
    """
    tables = find_tables(checkpoint)
    if not tables:
        raise RNGStateError(f"{checkpoint.where}: no StatefulRNG's record in it; see inspect")
    return tables


class Table:
    """The records that one ``StatefulRNG`` stored.

    Attributes:
        entry: The dotted path of the ``StatefulRNG``, "" at the top level of the checkpoint.
        count: Rows, by what the checkpoint says. Nothing here is as long as it says.
        placed: The numbers of the rows that it has a place for, in their order.
    """

    def __init__(self, checkpoint: Checkpoint, key: str) -> None:
        self.entry = key.rpartition(".")[0]
        self._checkpoint = checkpoint
        self._places: dict[int, Chunk | torch.Tensor | str] = {}
        (size,) = checkpoint.keys[key].size
        chunks = checkpoint.chunks(key)
        if len(chunks) == 1 and chunks[0].sizes == (size,):
            # One row, or a whole table that one process wrote.
            self._places.update(enumerate(self._records(chunks[0])))
            self.count = len(self._places)
        else:
            length = max(1, *chunks[0].sizes) if chunks else 1
            self.count = max(1, size // length)
            for chunk in chunks:
                row, rest = divmod(chunk.offsets[0], length) if len(chunk.offsets) == 1 else (0, 1)
                whole = chunk.sizes == (length,) and not rest
                self._places[row] = chunk if whole else "damaged: it has no chunk of its own"
        self.placed = sorted(self._places)

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
        names = [*record.streams, *(name for name, _ in record.mesh or [])]
        if not all(name.isprintable() for name in names):
            return "damaged: a name in it is not printable"
        return record

    def _records(self, chunk: Chunk) -> list[torch.Tensor] | list[str]:
        try:
            return records_in(self._checkpoint.numbers(chunk))
        except (ValueError, OSError, RNGStateError) as error:
            return [f"unreadable: {error}"]
