"""What a row of a table holds: a generator's state, sealed by a check word."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch

from nemo_rng_dcp.errors import RNGStateError


def seal(number: int, states: Mapping[str, torch.Tensor]) -> tuple[int, dict[str, torch.Tensor]]:
    """Return the rows that store the states of one process's generators.

    A check word is the digest of the table's name, the row's number and the state, exclusive-or a
    digest of all those digests. So it fits only a row that is unaltered, in its own table, under
    its own number, and beside the rows that were taken at the same moment.

    Args:
        number: The rows' number in their tables.
        states: By table name, int64, shape ``(n,)`` each.

    Returns:
        The digest of them all, which :func:`unseal` needs, and by table name the state followed
        by its check word, int64, shape ``(n + 1,)``.
    """
    digests = {name: digest(name, number, state) for name, state in states.items()}
    contents = digest("contents", number, int64(*digests.values()))
    rows = {
        name: torch.cat([state, int64(digests[name] ^ contents)]) for name, state in states.items()
    }
    return contents, rows


def unseal(name: str, number: int, contents: int, row: torch.Tensor) -> torch.Tensor:
    """Return the state of a row whose check word fits, as a copy.

    Args:
        name: The table's name.
        number: The number the row had when it was written.
        contents: What :func:`seal` gave when the row was written.
        row: int64, shape ``(n + 1,)``.

    Raises:
        RNGStateError: The dtype is another, or the check word does not fit.
    """
    check_row(name, row)
    if not is_sealed(name, number, contents, row):
        raise RNGStateError(
            f"{name}: row {number} does not fit its check word: it was altered after it was "
            "written, or is another rank's, another generator's or of another moment than the "
            "rest of the row. Load another checkpoint; if ranks share a row, see verify_shared()."
        )
    return row[:-1].clone()


def is_sealed(name: str, number: int, contents: int, row: torch.Tensor) -> bool:
    """Return whether ``row`` is one that :func:`seal` made under these circumstances."""
    return int(row[-1]) == digest(name, number, row[:-1]) ^ contents


def check_row(name: str, row: torch.Tensor) -> None:
    """Raise ``RNGStateError`` unless ``row`` is int64 and holds more than a check word."""
    if row.dtype != torch.int64 or row.numel() < 2:
        raise RNGStateError(
            f"{name}: a row is {row.dtype} of length {row.numel()}, expected torch.int64 of length "
            "2 or more. No StatefulRNG wrote that."
        )


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
    content = torch.cat([state, int64(resizes)])
    return digest(f"fork of {name}", number, content) % 2**64


def int64(*values: int) -> torch.Tensor:
    """Return integers as int64, on the CPU whatever the default device is."""
    return torch.tensor(values, dtype=torch.int64, device="cpu")


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
