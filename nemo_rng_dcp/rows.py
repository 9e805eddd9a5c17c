"""What a row of a table holds: a generator's state, sealed by a check word, and the origin row."""

from __future__ import annotations

import hashlib
import platform
import re
from dataclasses import astuple, dataclass, fields

import numpy as np
import torch

from nemo_rng_dcp.errors import RNGStateError

LAYOUT_VERSION = 1
"""Version of the tables' layout, the first element of every origin row."""

ORIGIN = "origin"
"""Key of the table that says whose row this is and what wrote it."""


def seal(name: str, number: int, state: torch.Tensor) -> torch.Tensor:
    """Return the row that stores ``state``: the state and its check word.

    Args:
        name: The table's name.
        number: The row's number in the table.
        state: int64, shape ``(n,)``.

    Returns:
        int64, shape ``(n + 1,)``.
    """
    return torch.cat([state, torch.tensor([digest(name, number, state)])])


def unseal(name: str, number: int, row: torch.Tensor) -> torch.Tensor:
    """Return the state of a row whose check word holds, as a copy.

    Args:
        name: The table's name.
        number: The number the row had when it was written.
        row: int64, shape ``(n + 1,)``.

    Raises:
        RNGStateError: The dtype is another, or the check word does not fit: a bit was flipped, or
            the row is another rank's or another generator's.
    """
    if row.dtype != torch.int64 or row.numel() < 2:
        raise RNGStateError(
            f"{name}: row {number} is {row.dtype} of length {row.numel()}, "
            "expected torch.int64 of length 2 or more"
        )
    state = row[:-1].clone()
    if not is_sealed(name, number, row):
        raise RNGStateError(
            f"{name}: row {number} does not fit its check word, so it was altered after it was "
            "written, or belongs to another rank or another generator. Load another checkpoint."
        )
    return state


def is_sealed(name: str, number: int, row: torch.Tensor) -> bool:
    """Return whether ``row`` is one that :func:`seal` made for this table name and row number."""
    well_formed = row.dtype == torch.int64 and row.numel() >= 2
    return well_formed and int(row[-1]) == digest(name, number, row[:-1])


def fork_seed(name: str, number: int, resizes: int, state: torch.Tensor) -> int:
    """Return the seed of a new stream that is made from another row's.

    It depends on the state it is made from, so it moves on with the job, and on ``resizes``, so a
    job that grows twice from one unmoved state does not replay what it drew in between.

    Args:
        name: The table's name.
        number: The new row's number.
        resizes: How often the job was resumed with another number of rows, this time included.
        state: The other row's state, int64, shape ``(n,)``.

    Returns:
        An integer from 0 to 2**64 - 1.
    """
    content = torch.cat([state, torch.tensor([resizes])])
    return digest(f"fork of {name}", number, content) % 2**64


def fingerprint(state: torch.Tensor) -> str:
    """Return 12 hexadecimal digits that tell a state from every other one."""
    return hashlib.blake2b(state.numpy().tobytes(), digest_size=6).hexdigest()


def digest(name: str, number: int, state: torch.Tensor) -> int:
    """Return a 64-bit BLAKE2b digest of a table's name, a row's number and its state.

    Returns:
        A signed integer that fits int64.
    """
    content = f"{name}\0{number}\0".encode() + state.numpy().tobytes()
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little", signed=True)


@dataclass(frozen=True)
class Origin:
    """Who wrote a row; the state of the ``origin`` table. All fields are integers >= 0.

    Attributes:
        layout_version: :data:`LAYOUT_VERSION` of the library that wrote it.
        row: The row's own number.
        rows: Rows of the table it was written to.
        world_size: Processes of the job that wrote it.
        seed: The seed given to ``StatefulRNG``, before a rank was added.
        ranked: Whether the row number was added to the seed: 0 or 1.
        resizes: How often the job was resumed with another number of rows before this was written.
        python_version, numpy_version, torch_version: As ``major * 10**6 + minor * 10**3 + micro``.
    """

    layout_version: int
    row: int
    rows: int
    world_size: int
    seed: int
    ranked: int
    resizes: int
    python_version: int
    numpy_version: int
    torch_version: int

    @classmethod
    def here(
        cls, *, row: int, rows: int, world_size: int, seed: int, ranked: bool, resizes: int
    ) -> Origin:
        """Return the origin of a row written now, by this process."""
        return cls(
            LAYOUT_VERSION,
            row,
            rows,
            world_size,
            seed,
            int(ranked),
            resizes,
            _version(platform.python_version()),
            _version(np.__version__),
            _version(torch.__version__),
        )

    def to_tensor(self) -> torch.Tensor:
        """Return the fields in their order, int64, shape ``(10,)``."""
        return torch.tensor(astuple(self), dtype=torch.int64)

    @classmethod
    def unseal(cls, row: torch.Tensor) -> Origin:
        """Return the origin that a row of the ``origin`` table holds, whatever its number.

        Args:
            row: int64, shape ``(11,)``.

        Raises:
            RNGStateError: Another layout version, or a malformed or altered row.
        """
        if row.dtype != torch.int64 or row.numel() < 2:
            raise RNGStateError(
                f"{ORIGIN}: a row is {row.dtype} of length {row.numel()}, "
                f"expected torch.int64 of length {len(fields(cls)) + 1}"
            )
        values = row.tolist()
        # The version comes first: a newer layout may well be longer, and should be called that.
        if values[0] != LAYOUT_VERSION or row.numel() != len(fields(cls)) + 1:
            raise RNGStateError(
                f"{ORIGIN}: a row has layout version {values[0]} and length {row.numel()}, "
                f"expected version {LAYOUT_VERSION} and length {len(fields(cls)) + 1}. Load the "
                "checkpoint with the version of nemo_rng_dcp that wrote it, or a newer one."
            )
        unseal(ORIGIN, values[1], row)
        origin = cls(*values[:-1])
        if not 0 <= origin.row < origin.rows:
            raise RNGStateError(
                f"{ORIGIN}: a row says that it is row {origin.row} of {origin.rows}"
            )
        return origin


def _version(text: str) -> int:
    """Return 2013000 for "2.13.0+cpu": what a person can read off an int64."""
    match = re.match(r"(\d+)\.(\d+)(?:\.(\d+))?", text)
    if match is None:
        return 0
    major, minor, micro = (int(part or 0) for part in match.groups())
    return major * 10**6 + minor * 10**3 + micro
