"""A checkpoint: its keys, where their parts are, and the numbers in a part."""

from __future__ import annotations

from collections import Counter

import torch

from nemo_rng_dcp.cli.metadata import METADATA_FILE, Chunk, Metadata, Stored
from nemo_rng_dcp.cli.numbers import ARCHIVE_BYTES, from_archive
from nemo_rng_dcp.cli.storage import Folder, open_folder
from nemo_rng_dcp.errors import RNGStateError


class Checkpoint:
    """A checkpoint in a folder. Time and memory grow with the bytes that are there.

    Args:
        folder: The folder.

    Attributes:
        where: The folder's path or URL.
        keys: What is stored, by key.
        files: The names of all files that hold parts of it.

    Raises:
        RNGStateError: It is none, or what it says of itself is damaged.
        OSError: It cannot be read.
    """

    def __init__(self, folder: Folder) -> None:
        self.where = folder.where
        self._folder = folder
        if METADATA_FILE not in folder.sizes:
            inside = [*folder.sizes, *folder.folders]
            found = f"only {', '.join(inside[:3])}{', ...' * (len(inside) > 3)}"
            raise RNGStateError(
                f"{folder.where}: no {METADATA_FILE} in it, {found if inside else 'nothing'}. It "
                "is no DCP checkpoint, or its save did not finish."
            )
        self._metadata = Metadata(folder.read(METADATA_FILE, 0, folder.sizes[METADATA_FILE]))
        self.keys: dict[str, Stored] = self._metadata.keys
        self.files: set[str] = self._metadata.files
        self._read: Counter[str] = Counter()

    @classmethod
    def open(cls, where: str) -> Checkpoint:
        """Return the checkpoint at a path."""
        return cls(open_folder(where))

    def chunks(self, key: str) -> list[Chunk]:
        """Return the parts of what is stored under a key, to be called once for each.

        Raises:
            RNGStateError: The metadata is malformed.
        """
        return self._metadata.chunks(key)

    def numbers(self, chunk: Chunk) -> torch.Tensor:
        """Return the int64 numbers of a part of one dimension, shape ``chunk.sizes``.

        Raises:
            ValueError: They are not there, or are something else.
            OSError: The file cannot be read.
        """
        name, (count,) = chunk.file, chunk.sizes
        if not name:
            raise ValueError("the metadata names no file for it")
        # Anything else would let a checkpoint make its reader open other files of this machine.
        if "/" in name or "\\" in name or name in (".", ".."):
            raise ValueError(f"refused: its file {name!r:.60} is outside the checkpoint")
        if name not in self._folder.sizes:
            raise ValueError(f"{name} is missing")
        present, end = self._folder.sizes[name], chunk.start + chunk.length
        if end > present:
            raise ValueError(f"{name} is truncated: {present} bytes, expected {end} or more")
        if chunk.form == "extension":
            raise ValueError(f"{name} was written by a storage extension (compression?) of DCP's")
        if not 8 * count <= chunk.length <= 8 * count + ARCHIVE_BYTES:
            raise ValueError(f"{name} has {chunk.length} bytes for {count} numbers of 8 bytes")
        self._read[name] += chunk.length
        if self._read[name] > 2 * present:
            raise ValueError(f"refused: {name} holds fewer bytes than the parts that are in it")
        try:
            return from_archive(self._folder.read(name, chunk.start, chunk.length), count)
        except ValueError as error:
            raise ValueError(f"{name}, byte {chunk.start}: {error}") from error
