"""The records of a checkpoint, read row by row, and the positions of its loaders."""

from __future__ import annotations

from collections.abc import Collection

from nemo_rng_dcp.cli.reading.checkpoint import Checkpoint
from nemo_rng_dcp.cli.reading.index import Chunk
from nemo_rng_dcp.errors import RNGStateError
from nemo_rng_dcp.keys import path_of
from nemo_rng_dcp.position import POSITION_KEY, Position, positions_in
from nemo_rng_dcp.record import KEY, LENGTH, ROWS, Record


class Table:
    """The records that one ``StatefulRNG`` stored.

    Attributes:
        key: Where the ``StatefulRNG`` was in what was saved: "rng" for "rng.rng_streams", "" at
            the top level.
        length: Numbers of each record.
        count: Rows, by what the checkpoint says. Nothing here is as long as it says.
        placed: The numbers of the rows that it has a place for, in their order.
        missing: How many of the ``count`` rows have none.
    """

    def __init__(self, checkpoint: Checkpoint, key: str) -> None:
        self.key = path_of(key)
        self._checkpoint = checkpoint
        self._places: dict[int, tuple[Chunk, int] | str] = {}
        self._readers: dict[int, set[int | None]] = {}
        (size,) = checkpoint.keys[key].size
        chunks = checkpoint.chunks(key) or {Chunk((0,), (size,)): set()}
        sizes = next(iter(chunks)).sizes
        lengths = (self._length_in(chunk, size) for chunk in chunks)
        self.length = next(filter(None, lengths), max([1, *sizes]))
        self.count = max(1, size // self.length)
        for chunk, readers in chunks.items():
            row, rest = divmod(chunk.offsets[0], self.length) if chunk.offsets else (0, 1)
            whole = len(chunk.offsets) == 1 and chunk.sizes == sizes and not rest
            # More rows than the file has bytes for are only claimed.
            several = whole and sizes[0] > self.length and checkpoint.has(chunk)
            for number in range(sizes[0] // self.length if several else 1):
                place = (chunk, number) if whole else "damaged: it has no chunk of its own"
                self._places[row + number], self._readers[row + number] = place, readers
        self.placed = sorted(self._places)
        self.missing = self.count - sum(row < self.count for row in self.placed)

    def _length_in(self, chunk: Chunk, size: int) -> int:
        """Return the length of the record that a part begins with; 0 if the table has another."""
        try:
            words = self._checkpoint.numbers(chunk)[: ROWS + 1].tolist()
        except (ValueError, OSError):
            return 0
        length, rows = words[LENGTH :: ROWS - LENGTH] if len(words) > ROWS else (0, 0)
        fits = length > ROWS and length * rows == size and chunk.sizes[0] % length == 0
        return int(length) if fits else 0

    def expects(self, row: int) -> bool:
        """Return whether there should be such a row, or is one."""
        return row < self.count or row in self._places

    def read(self, row: int) -> Record | str:
        """Return the record of a row, checked as a load checks it, or the reason why not."""
        place = self._places.get(row, "missing: the checkpoint has no place for it")
        if isinstance(place, str):
            return place
        try:
            chunk, number = place
            own = slice(number * self.length, (number + 1) * self.length)
            record = Record.from_tensor(self._checkpoint.numbers(chunk)[own])
        except RNGStateError as error:
            return f"damaged: {str(error).removeprefix(f'{KEY}: ')}"
        except (ValueError, OSError) as error:
            return f"unreadable: {error}"
        if record.row != row or record.rows != self.count:
            return (
                f"damaged: it says that it is row {record.row} of {record.rows}, and stands in the "
                f"place of row {row} of {self.count}"
            )
        return record

    def hidden_from(self, row: int, ranks: Collection[int]) -> list[int]:
        """Return those of some ranks that do not find a row, though it is there."""
        readers = self._readers.get(row, set())
        return [] if None in readers else [rank for rank in ranks if rank not in readers]


def find_loaders(checkpoint: Checkpoint) -> dict[str, list[Position] | str]:
    """Return the positions of each loader by key, or why they cannot be read."""
    return {
        key.rpartition(".")[0]: _positions(checkpoint, key)
        for key, stored in sorted(checkpoint.keys.items())
        if stored.is_record(key, POSITION_KEY)
    }


def _positions(checkpoint: Checkpoint, key: str) -> list[Position] | str:
    try:
        chunks = sorted(checkpoint.chunks(key), key=lambda chunk: chunk.offsets)
        positions = [p for chunk in chunks for p in positions_in(checkpoint.numbers(chunk))]
        if [position.row for position in positions] != list(range(positions[0].rows)):
            return "rows are missing"
        return positions
    except (RNGStateError, ValueError, OSError, IndexError) as error:
        return str(error)
