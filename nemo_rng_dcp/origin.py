"""The origin table: whose row this is, and what wrote it."""

from __future__ import annotations

import platform
import re
from dataclasses import dataclass, fields
from functools import cache

import numpy as np
import torch

from nemo_rng_dcp.errors import RNGStateError
from nemo_rng_dcp.rows import check_row, digest, int64
from nemo_rng_dcp.version import __version__

ORIGIN = "origin"
"""The table's key."""

LAYOUT_VERSION = 1
"""Version of the tables' layout."""


@dataclass(frozen=True)
class Origin:
    """Who wrote a row. All fields are integers that fit int64.

    Versions are ``major * 10**6 + minor * 10**3 + micro``. The first two fields keep their place
    in every layout to come, so that a row of a newer one can say who is able to read it.

    Attributes:
        layout_version: :data:`LAYOUT_VERSION` of the library that wrote the row.
        library_version: The version of nemo_rng_dcp that wrote it.
        row: The row's own number.
        rows: Rows of the table it was written to.
        world_size: Processes of the job that wrote it.
        seed: The seed given to ``StatefulRNG``, before a row number was added.
        ranked: Whether the row number was added to the seed: 0 or 1.
        resizes: How often the job was resumed with another number of rows before this was written.
        contents: The digest of all the generators' states in this row, see ``rows.seal``.
        python_version, numpy_version, torch_version: What the states were taken from.
    """

    layout_version: int
    library_version: int
    row: int
    rows: int
    world_size: int
    seed: int
    ranked: int
    resizes: int
    contents: int
    python_version: int
    numpy_version: int
    torch_version: int

    @classmethod
    def here(
        cls,
        *,
        row: int,
        rows: int,
        world_size: int,
        seed: int,
        ranked: bool,
        resizes: int,
        contents: int,
    ) -> Origin:
        """Return the origin of a row written now, by this process."""
        return cls(
            LAYOUT_VERSION,
            version_number(__version__),
            row,
            rows,
            world_size,
            seed,
            int(ranked),
            resizes,
            contents,
            version_number(platform.python_version()),
            version_number(np.__version__),
            version_number(torch.__version__),
        )

    def to_row(self) -> torch.Tensor:
        """Return the fields in their order and a check word: int64, shape ``(13,)``."""
        state = int64(*(getattr(self, field.name) for field in fields(self)))
        return torch.cat([state, int64(digest(ORIGIN, self.row, state))])

    @classmethod
    def from_row(cls, row: torch.Tensor) -> Origin:
        """Return what :meth:`to_row` wrote.

        Args:
            row: int64, shape ``(13,)``.

        Raises:
            RNGStateError: Another layout version, or a malformed or altered row.
        """
        check_row(ORIGIN, row)
        *values, check_word = row.tolist()
        # Before the length: a newer layout may be longer, and should be called what it is.
        if values[0] != LAYOUT_VERSION:
            writer = f"nemo_rng_dcp {version_text(values[1])}" if len(values) > 1 else "?"
            raise RNGStateError(
                f"{ORIGIN}: the row has layout version {values[0]}, and nemo_rng_dcp {__version__} "
                f"reads version {LAYOUT_VERSION}. Load it with {writer}, which wrote it, or newer."
            )
        if len(values) != len(fields(cls)) or check_word != digest(ORIGIN, values[2], row[:-1]):
            raise RNGStateError(
                f"{ORIGIN}: a row of length {row.numel()} does not fit its check word: it was "
                "altered after it was written. Load another checkpoint."
            )
        origin = cls(*values)
        if not 0 <= origin.row < origin.rows:
            raise RNGStateError(
                f"{ORIGIN}: a row says that it is row {origin.row} of {origin.rows}. Load another "
                "checkpoint."
            )
        return origin

    def forks(self, row: int, ranked: bool) -> bool:
        """Return whether the streams of this row become new ones when loaded as row ``row``.

        Args:
            row: The row of the process that loads.
            ranked: What the ``StatefulRNG`` there was given.
        """
        return row != self.row and (ranked or bool(self.ranked))

    def resizes_on(self, rows: int) -> int:
        """Return how often the job was resized, a load of this row into ``rows`` rows included."""
        return self.resizes + (self.rows != rows)

    def version_skew(self) -> list[str]:
        """Return what has another version now than when the row was written, readably."""
        versions = [
            ("python", self.python_version, platform.python_version()),
            ("numpy", self.numpy_version, np.__version__),
            ("torch", self.torch_version, torch.__version__),
        ]
        return [
            f"{name} {version_text(then)}, now {version_text(version_number(now))}"
            for name, then, now in versions
            if then != version_number(now)
        ]


@cache
def version_number(text: str) -> int:
    """Return 2013000 for "2.13.0+cpu", 0 for what is no version."""
    match = re.match(r"(\d+)\.(\d+)(?:\.(\d+))?", text)
    if match is None:
        return 0
    major, minor, micro = (int(part or 0) for part in match.groups())
    return major * 10**6 + minor * 10**3 + micro


def version_text(number: int) -> str:
    """Return "2.13.0" for 2013000."""
    return f"{number // 10**6}.{number // 10**3 % 10**3}.{number % 10**3}"
