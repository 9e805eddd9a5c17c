"""The files of a checkpoint's folder, wherever they are: listed once, read in part."""

from __future__ import annotations

import os
from typing import Any, Protocol

from nemo_rng_dcp.errors import RNGStateError


class MissingFolderError(RNGStateError):
    """There is no such folder."""


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

    def remove(self, name: str) -> None:
        """Remove a file that is in ``sizes``; ``sizes`` stays as it is.

        Raises:
            OSError: It cannot be removed.
        """
        ...

    def inner(self, name: str) -> Folder:
        """Return a folder that is in ``folders``."""
        ...

    def path_of(self, name: str) -> str:
        """Return the path or URL of what is in the folder."""
        ...


def open_folder(where: str) -> Folder:
    """Return the folder at a path, or at a URL that fsspec knows, such as ``s3://bucket/folder``.

    Raises:
        MissingFolderError: There is none.
        RNGStateError: It is a file, or fsspec is needed and missing.
        OSError: It cannot be listed.
    """
    if not where:
        raise RNGStateError("the path is empty, expected the folder of a checkpoint")
    return _RemoteFolder(where) if "://" in where else _LocalFolder(where)


class _LocalFolder:
    """A folder that this machine's file system knows."""

    def __init__(self, where: str) -> None:
        self.where = where
        if not os.path.exists(where):
            raise MissingFolderError(f"{where}: there is no such folder")
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
        with open(self.path_of(name), "rb") as file:
            file.seek(start)
            return file.read(length)

    def remove(self, name: str) -> None:
        os.remove(self.path_of(name))

    def inner(self, name: str) -> Folder:
        return _LocalFolder(self.path_of(name))

    def path_of(self, name: str) -> str:
        return os.path.join(self.where, name)


class _RemoteFolder:
    """A folder that fsspec knows: in an object store, in memory, on this machine."""

    def __init__(self, where: str) -> None:
        self.where = where
        try:
            from fsspec.core import url_to_fs  # type: ignore[import-untyped]
        except ImportError as error:
            raise RNGStateError(
                f"{where}: a URL needs fsspec: pip install 'nemo_rng_dcp[fsspec]'"
            ) from error
        try:
            self._files, self._path = url_to_fs(where)
            entries = self._files.ls(self._path, detail=True)
        except FileNotFoundError as error:
            raise MissingFolderError(f"{where}: there is no such folder") from error
        except Exception as error:  # each kind of storage has errors of its own
            raise _as_os_error(where, error) from error
        # Some list the folder itself, or for a file the file.
        itself = self._path.strip("/")
        inside = {_name(its): its for its in entries if str(its["name"]).strip("/") != itself}
        files = {name: its for name, its in inside.items() if its["type"] == "file"}
        if unknown := [name for name, its in files.items() if its.get("size") is None]:
            raise OSError(f"{where}: the storage does not say how many bytes {unknown[0]} has")
        self.sizes = {name: int(files[name]["size"]) for name in sorted(files)}
        self.folders = sorted(inside.keys() - files.keys())

    def read(self, name: str, start: int, length: int) -> bytes:
        try:
            end = start + length
            return bytes(self._files.cat_file(self._inside(name), start=start, end=end))
        except Exception as error:
            raise _as_os_error(self.path_of(name), error) from error

    def remove(self, name: str) -> None:
        try:
            self._files.rm_file(self._inside(name))
        except Exception as error:
            raise _as_os_error(self.path_of(name), error) from error

    def inner(self, name: str) -> Folder:
        return _RemoteFolder(self.path_of(name))

    def path_of(self, name: str) -> str:
        return f"{self.where.rstrip('/')}/{name}"

    def _inside(self, name: str) -> str:
        return f"{self._path.rstrip('/')}/{name}"


def _name(entry: dict[str, Any]) -> str:
    return str(entry["name"]).rstrip("/").rpartition("/")[2]


def _as_os_error(where: str, error: Exception) -> OSError:
    return OSError(f"{where}: {type(error).__name__}: {error}")
