"""Where the loaders of a checkpoint are, by what ``ResumableLoader`` stored."""

from __future__ import annotations

from nemo_rng_dcp.cli.reading.checkpoint import Checkpoint
from nemo_rng_dcp.errors import RNGStateError
from nemo_rng_dcp.position import POSITION_KEY, Position, positions_in


def find_loaders(checkpoint: Checkpoint) -> dict[str, list[Position] | str]:
    """Return the positions of each loader by key, or why they cannot be read."""
    return {
        key.rpartition(".")[0]: _read(checkpoint, key)
        for key, stored in sorted(checkpoint.keys.items())
        if stored.is_record(key, POSITION_KEY)
    }


def _read(checkpoint: Checkpoint, key: str) -> list[Position] | str:
    try:
        chunks = sorted(checkpoint.chunks(key), key=lambda chunk: chunk.offsets)
        positions = [p for chunk in chunks for p in positions_in(checkpoint.numbers(chunk))]
        if [position.row for position in positions] != list(range(positions[0].rows)):
            return "rows are missing"
        return positions
    except (RNGStateError, ValueError, OSError, IndexError) as error:
        return str(error)
