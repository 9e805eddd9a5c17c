"""A checkpoint: its keys, where their parts are, and the numbers in a part."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import suppress

import torch

from nemo_rng_dcp.cli.reading.folder import Folder
from nemo_rng_dcp.cli.reading.index import Chunk, Index, Stored
from nemo_rng_dcp.cli.reading.tensors import ARCHIVE_BYTES, from_archive, from_raw

_WRITER = re.compile(r"__(\d{1,9})_\d+\.|shard-(\d{1,9})-")


class Checkpoint:
    """A checkpoint in a folder. Time and memory grow with the bytes that are there.

    Args:
        folder: The folder.
        indexes: What it says of itself, by the rank that reads it; ``None`` is the one that all
            ranks read.

    Attributes:
        where: The folder's path or URL.
        keys: What is stored, by key.
        files: The names of all files that hold parts of it.
        records: The keys of records, in order.
        each_rank_reads_its_own: Whether it was saved with ``use_collectives=False``: a rank finds
            only what was saved by the rank of its number.
    """

    def __init__(self, folder: Folder, indexes: Mapping[int | None, Index]) -> None:
        self.where = folder.where
        self._folder, self._indexes = folder, indexes
        self.each_rank_reads_its_own = None not in indexes
        self.keys: dict[str, Stored] = {}
        for index in reversed([*indexes.values()]):  # of several the lowest rank's
            self.keys.update(index.keys)
        self.files = {file for index in indexes.values() for file in index.files}
        self.records = [key for key in sorted(self.keys) if self.keys[key].is_record(key)]
        self._known: set[Chunk] = set()
        self._last: tuple[Chunk, torch.Tensor] | None = None
        self._bytes: Counter[str] = Counter()

    def __str__(self) -> str:
        return self.where

    def chunks(self, key: str) -> dict[Chunk, set[int | None]]:
        """Return the parts of what is stored under a key, and the ranks that find each.

        It is to be called once for each key. Of parts in one place the lowest rank's is given.

        Raises:
            RNGStateError: What the checkpoint says of them is malformed.
        """
        placed: dict[tuple[int, ...], Chunk] = {}
        readers: dict[Chunk, set[int | None]] = {}
        for rank, index in self._indexes.items():
            if key in index.keys:
                for chunk in index.chunks(key):
                    readers.setdefault(placed.setdefault(chunk.offsets, chunk), set()).add(rank)
        return readers

    def numbers(self, chunk: Chunk) -> torch.Tensor:
        """Return the int64 numbers of a part of one dimension, shape ``chunk.sizes``.

        Raises:
            ValueError: They are not there, or are something else.
            OSError: The file cannot be read.
        """
        if self._last and self._last[0] == chunk:
            return self._last[1]
        (count,) = chunk.sizes
        name = self._place(chunk)
        beside = 0 if chunk.is_raw else ARCHIVE_BYTES
        if not 8 * count <= chunk.length <= 8 * count + beside:
            raise ValueError(f"{name} has {chunk.length} bytes for {count} numbers of 8 bytes")
        content = self._folder.read(name, chunk.start, chunk.length)
        try:
            numbers = from_raw(content) if chunk.is_raw else from_archive(content, count)
        except ValueError as error:
            raise ValueError(f"{name}, byte {chunk.start}: {error}") from error
        self._last = chunk, numbers
        return numbers

    def has(self, chunk: Chunk) -> bool:
        """Return whether all bytes of a part are there."""
        with suppress(ValueError):
            return bool(self._place(chunk))
        return False

    def content(self, chunk: Chunk) -> bytes:
        """Return the bytes of a part, all of them in memory.

        Raises:
            ValueError: They are not there.
            OSError: The file cannot be read.
        """
        return self._folder.read(self._place(chunk), chunk.start, chunk.length)

    def _place(self, chunk: Chunk) -> str:
        """Return the file that a part is in, after making sure that the whole part is."""
        name = chunk.file
        # No other file of this machine is opened, whatever a checkpoint says: these were listed.
        if name not in self._folder.sizes:
            raise ValueError(f"{name or 'its file (without a name)'} is missing")
        present, end = self._folder.sizes[name], chunk.start + chunk.length
        if end > present:
            raise ValueError(f"{name} is truncated: {present} bytes, expected {end} or more")
        if chunk not in self._known:
            self._bytes[name] += chunk.length
            if self._bytes[name] > present:
                raise ValueError(f"refused: {name} has fewer bytes than the parts that are in it")
            self._known.add(chunk)
        return name


def ranks_that_wrote(files: Iterable[str]) -> set[int]:
    """Return the ranks that wrote a checkpoint's files, by the names DCP gives them."""
    matches = (match for file in files if (match := _WRITER.match(file)))
    return {int(match[1]) if match[1] else int(match[2]) - 1 for match in matches}
