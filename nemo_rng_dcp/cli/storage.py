"""The files of a checkpoint's folder, wherever they are: listed once, read in part."""

from __future__ import annotations

import os
from typing import Protocol

from nemo_rng_dcp.errors import RNGStateError


class Folder(Protocol):
    """A folder.

    Attributes:
        where: Its path or URL.
        sizes: The bytes of each of its files, by name.
        folders: The names of the folders in it.
    """

    where: str
    sizes: dict[str, int]
    folders: list[str]

    def read(self, name: str, start: int, length: int) -> bytes:
        """Return a part of a file that is in ``sizes``; the part is within it.

        Raises:
            OSError: It cannot be read.
        """
        ...

    def inner(self, name: str) -> Folder:
        """Return a folder that is in ``folders``."""
        ...


def open_folder(where: str) -> Folder:
    """Return the folder at a path.

    Raises:
        RNGStateError: There is none.
        OSError: It cannot be listed.
    """
    if not where:
        raise RNGStateError("the path is empty, expected the folder of a checkpoint")
    return LocalFolder(where)


class LocalFolder:
    """A folder that this machine's file system knows."""

    def __init__(self, where: str) -> None:
        self.where = where
        if not os.path.exists(where):
            raise RNGStateError(f"{where}: there is no such folder")
        if not os.path.isdir(where):
            raise RNGStateError(f"{where}: a file, expected the folder of a checkpoint")
        self.sizes: dict[str, int] = {}
        self.folders: list[str] = []
        with os.scandir(where) as entries:
            for entry in sorted(entries, key=lambda entry: entry.name):
                if entry.is_dir():
                    self.folders.append(entry.name)
                elif entry.is_file():
                    self.sizes[entry.name] = entry.stat().st_size

    def read(self, name: str, start: int, length: int) -> bytes:
        with open(os.path.join(self.where, name), "rb") as file:
            file.seek(start)
            return file.read(length)

    def inner(self, name: str) -> LocalFolder:
        return LocalFolder(os.path.join(self.where, name))
