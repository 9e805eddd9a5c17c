"""What a checkpoint says it holds, and where; its words are checked before they are used."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch

from nemo_rng_dcp.cli.reading.pickles import typed
from nemo_rng_dcp.errors import RNGStateError
from nemo_rng_dcp.keys import KEY, is_record

_DIMENSIONS = 64  # torch's own limit
_NAME_LENGTH = 4096


@dataclass(frozen=True)
class Stored:
    """What a checkpoint says it holds under one key.

    Attributes:
        dtype: A tensor's dtype, such as ``"int64"``; ``None`` for bytes, which are a pickle.
        size: A tensor's shape.
    """

    dtype: str | None
    size: tuple[int, ...]

    def is_record(self, key: str, name: str = KEY) -> bool:
        """Return whether a load takes it for records; see ``keys.is_record``."""
        return is_record(key, getattr(torch, self.dtype or "", None), self.size, name)

    def __str__(self) -> str:
        return "a pickle" if self.dtype is None else f"{self.dtype} {list(self.size)}"


class Chunk(NamedTuple):
    """A part of a stored tensor and where its bytes are.

    Attributes:
        offsets: Where the part begins in the tensor.
        sizes: Its shape.
        file: The file's name in the checkpoint's folder; empty where the checkpoint names none.
        start: The file's byte at which the part begins.
        length: Bytes of the part.
        is_raw: Whether these are the numbers alone, and not what ``torch.save`` writes.
    """

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str = ""
    start: int = 0
    length: int = 0
    is_raw: bool = False


class Index(Protocol):
    """What is stored, and where the parts of it are.

    Attributes:
        keys: What is stored, by key.
        files: The names of all files that hold parts of it.
    """

    keys: dict[str, Stored]
    files: set[str]

    def chunks(self, key: str) -> list[Chunk]:
        """Return the parts of what is stored under a key; bytes are one part without offsets.

        It is to be called once for each key.

        Raises:
            RNGStateError: What the checkpoint says of them is malformed.
        """


@contextmanager
def malformed_if_wrong(name: str) -> Iterator[None]:
    """Say that a file is malformed, whatever its wrong words run into.

    Raises:
        RNGStateError: It is.
    """
    try:
        yield
    except KeyError as error:
        raise RNGStateError(f"{name} is malformed: it has no {error}") from error
    except (TypeError, ValueError, RecursionError) as error:
        raise RNGStateError(f"{name} is malformed: {error}") from error


def short(value: Any) -> str:
    """Return a name.

    Raises:
        TypeError: It is no text.
        ValueError: It is longer than any path.
    """
    text: str = typed(value, str)
    if len(text) > _NAME_LENGTH:
        raise ValueError(f"found a name of {len(text)} characters")
    return text


def integers(values: Any) -> tuple[int, ...]:
    """Return a size or a place in a file: not negative, and each fits int64.

    Raises:
        TypeError: It is no tuple or list.
        ValueError: It is something else.
    """
    if len(typed(values, list if isinstance(values, list) else tuple)) > _DIMENSIONS:
        raise ValueError(f"found {len(values)} dimensions")
    for value in values:
        if type(value) is not int or not 0 <= value < 2**63:
            found = value if type(value) is int and abs(value) < 2**64 else type(value).__name__
            raise ValueError(f"found {found}, expected integers from 0 to 2**63 - 1")
    return tuple(values)
