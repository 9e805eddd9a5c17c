"""The files of a checkpoint's folder, wherever they are: listed once, read in part."""

from __future__ import annotations

import os
from contextlib import suppress
from typing import Any

from fsspec.core import url_to_fs  # type: ignore[import-untyped]
from fsspec.implementations.local import LocalFileSystem  # type: ignore[import-untyped]

from nemo_rng_dcp.errors import RNGStateError


class Folder:
    """A folder of this machine, or one behind a URL that fsspec knows.

    Args:
        where: Its path, or its URL, such as ``s3://bucket/folder``.

    Attributes:
        where: The same.
        sizes: The bytes of each of its files, by name.
        folders: The names of the folders in it.

    Raises:
        RNGStateError: There is none, or it is a file.
        OSError: It cannot be listed.
    """

    def __init__(self, where: str) -> None:
        if not where:
            raise RNGStateError("the path is empty, expected the folder of a checkpoint")
        self.where = where
        try:
            self._files, self._path = storage_of(where)
            entries = self._files.ls(self._path, detail=True)
        except FileNotFoundError as error:
            raise RNGStateError(f"{where}: there is no such folder") from error
        except Exception as error:  # each kind of storage has errors of its own
            raise _as_os_error(where, error) from error
        self.sizes: dict[str, int] = {}
        self.folders: list[str] = []
        for entry in sorted(entries, key=lambda entry: str(entry["name"])):
            self._add(entry, alone=len(entries) == 1)

    def read(self, name: str, start: int, length: int) -> bytes:
        """Return a part of a file that is in ``sizes``; the part is within it.

        Raises:
            OSError: It cannot be read.
        """
        place = f"{self._path.rstrip('/')}/{name}"
        try:
            if isinstance(self._files, LocalFileSystem):  # twice as fast as by it
                with open(place, "rb") as file:
                    file.seek(start)
                    return file.read(length)
            return bytes(self._files.cat_file(place, start=start, end=start + length))
        except Exception as error:
            raise _as_os_error(self.path_of(name), error) from error

    def below(self) -> list[Folder]:
        """Return the folders in it; one that cannot be opened is somebody else's."""
        found = []
        for name in self.folders:
            with suppress(OSError):
                found.append(Folder(self.path_of(name)))
        return found

    def path_of(self, name: str) -> str:
        """Return the path or URL of what is in the folder."""
        return f"{self.where.rstrip('/')}/{name}"

    def _add(self, entry: dict[str, Any], alone: bool) -> None:
        place, kind = str(entry["name"]), entry["type"]
        name = place.rstrip("/").rpartition("/")[2]
        if place.strip("/") == self._path.strip("/"):
            # Some list the folder itself, or for a file the file.
            if kind == "file" and alone:
                raise RNGStateError(f"{self.where}: a file, expected the folder of a checkpoint")
        elif kind == "directory" or (kind != "file" and self._files.isdir(place)):
            self.folders.append(name)
        elif kind == "file" or self._files.isfile(place):  # a link to one; a pipe is none
            self.sizes[name] = int(entry["size"])


def storage_of(where: str) -> tuple[Any, str]:
    """Return fsspec's file system for a path or URL, and what it is called there."""
    if "://" in where:
        storage, path = url_to_fs(where)
        return storage, str(path)
    # url_to_fs would take a path apart at "::", and its "~" for somebody's home.
    return LocalFileSystem(), os.path.abspath(where)


def _as_os_error(where: str, error: Exception) -> OSError:
    return OSError(f"{where}: {type(error).__name__}: {error}".removesuffix(": "))
