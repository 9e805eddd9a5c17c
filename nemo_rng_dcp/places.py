"""Where a record lies by itself: what a save may replace there, and where a load finds it."""

from __future__ import annotations

import dataclasses
import os
import secrets
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any, NoReturn

import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import SavePlan, StorageReader, StorageWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata

from nemo_rng_dcp.errors import RNGStateError
from nemo_rng_dcp.record import KEY, Record

FILES = "rng-"
"""What the names of a record's files begin with, so that no file of other writers is meant."""

Keys = Callable[[Mapping[str, Any]], list[str]]
"""Returns the keys under which a checkpoint's metadata lists records."""

OF_ANOTHER_WRITER = (
    ". If another storage writer than DCP's own wrote it, pass that one's reader: "
    "rng.load(path, storage_reader=...)"
)


class MissingRecordError(RNGStateError):
    """There is no checkpoint, or none with a record."""


class Place:
    """A writer that harms nothing in its storage.

    The files of a record have names of their own, new ones in each save, and an earlier record
    goes when the new one is whole. So files cannot collide, and a save that is interrupted leaves
    the earlier record. The rest is refused. Only the writer's own storage is asked: a path may mean
    another place to it. Where it cannot be asked (a writer that is no ``FileSystemWriter``), or
    names its files itself, nothing is replaced.
    """

    def __init__(
        self, writer: StorageWriter, keys: Keys, read: Callable[[StorageReader], Record]
    ) -> None:
        self._writer: Any = writer
        self._keys = keys
        self._read = read

    def __getattr__(self, name: str) -> Any:
        return getattr(self._writer, name)

    def check(self, record: Record) -> None:
        """Refuse the place if it holds anything but a record that ``record`` may replace."""
        self._before = _names(self._writer)
        self._earlier = {name for name in self._before if name.startswith(FILES)}
        if ".metadata" in self._before:
            self._earlier |= self._files_of_earlier(record)
        self._refuse_others(self._before - self._earlier)

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Give the files names of this save; the coordinator alone is asked."""
        plans = self._writer.prepare_global_plan(plans)
        self._own = f"{FILES}{secrets.token_hex(4)}"
        self._named = all(hasattr(plan.storage_data, "prefix") for plan in plans)
        if self._named:
            return [dataclasses.replace(plan, storage_data=self._renamed(plan)) for plan in plans]
        if self._before:
            self._refuse(
                f"{min(self._before)}, and {type(self._writer).__name__} names its files itself"
            )
        return plans

    def finish(self, metadata: Metadata, results: Any) -> None:
        """Make the record visible, once all ranks have written; the coordinator alone is asked."""
        if not self._named:
            self._writer.finish(metadata, results)
            return
        # A save that began after check() has files by now, and its metadata must not be replaced.
        added = _names(self._writer) - self._before
        own = {name for name in added if name.startswith(self._own)}
        try:
            self._refuse_others(added - own)
        except RNGStateError:
            self._remove(own)
            raise
        self._writer.finish(metadata, results)
        self._remove(self._earlier)

    def _renamed(self, plan: SavePlan) -> Any:
        prefix = f"{self._own}{plan.storage_data.prefix}"
        return dataclasses.replace(plan.storage_data, prefix=prefix)

    def _files_of_earlier(self, record: Record) -> set[str]:
        # A reader of the same storage, whatever that is.
        reader = dcp.FileSystemReader(self._writer.path)
        reader.fs, reader.path = self._writer.fs, self._writer.path
        try:
            metadata = reader.read_metadata()
            saved = metadata.state_dict_metadata
            # A key with a dot is of an application's dict: rng.save() wrote none.
            others = sorted(set(saved) - {key for key in self._keys(saved) if "." not in key})
            if others or KEY not in saved:
                self._refuse(f"a checkpoint of other things ({', '.join(others[:1])}, for one)")
            earlier = self._read(reader)
        except RNGStateError:
            raise
        except (Exception, CheckpointException) as error:
            self._refuse(f"a checkpoint that cannot be read ({first_line(error)})")
        lost = sorted(earlier.streams.keys() - record.streams)
        if lost or _axes(earlier) != _axes(record):
            what = f"streams of {', '.join(lost)}" if lost else f"rows along {_axes(earlier)}"
            self._refuse(f"the record of another StatefulRNG ({what})")
        return {info.relative_path for info in metadata.storage_data.values()}

    def _refuse_others(self, names: set[str]) -> None:
        others = sorted(
            name
            for name in names
            if not name.startswith(".") and not _is_folder(self._writer, name)
        )
        if others:
            self._refuse(
                f"{', '.join(others[:3])}{', ...' if len(others) > 3 else ''}: files of another "
                "checkpoint, or of a save that is still running"
            )

    def _refuse(self, what: str) -> NoReturn:
        place = self._writer.path  # without one, nothing is known of the place, or refused
        raise RNGStateError(
            f"{place} holds {what}, which would be lost. Save the record to a folder of its own, "
            f"such as {place}/rng."
        )

    def _remove(self, names: set[str]) -> None:
        for name in names:
            with suppress(Exception):  # the new record is whole, with or without what it replaces
                self._writer.fs.rm_file(self._writer.fs.concat_path(self._writer.path, name))


class Source:
    """A reader that also looks one folder below, and says in a line what it did not find."""

    def __init__(self, reader: StorageReader, keys: Keys) -> None:
        self._reader: Any = reader
        self._keys = keys
        self.error: RNGStateError | None = None
        """Why there is nothing to read; the planner raises it, for DCP logs what a reader raises"""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._reader, name)

    def read_metadata(self, **kwargs: Any) -> Metadata:
        read: Callable[..., Metadata] = self._reader.read_metadata
        if type(self._reader).read_metadata is not dcp.FileSystemReader.read_metadata:
            return read()
        names = _names(self._reader)
        # Of a save with use_collectives=False: DCP asks next for the own one, but only where the
        # parameter is called `kwargs`. Each rank's one names a save of its own: that tells nothing.
        if "__0.metadata" in names:
            return dataclasses.replace(read(**kwargs), storage_meta=None)
        try:
            return self._found(names, read)
        except RNGStateError as error:
            self.error = error
        except Exception as error:
            text = f"its metadata cannot be read: {first_line(error)}{OF_ANOTHER_WRITER}"
            self.error = RNGStateError(text)
        return Metadata({})

    def _found(self, names: set[str], read: Callable[[], Metadata]) -> Metadata:
        fs, path = self._reader.fs, self._reader.path
        own = read() if ".metadata" in names else None
        if own is not None and self._keys(own.state_dict_metadata):
            return own
        below = []
        for name in sorted(names):
            folder = fs.concat_path(path, name)
            if fs.exists(fs.concat_path(folder, ".metadata")):
                self._reader.path = folder
                metadata = read()
                if self._keys(metadata.state_dict_metadata):
                    below.append((folder, metadata))
        self._reader.path = path
        if len(below) == 1:
            self._reader.path, metadata = below[0]
            return metadata
        if below:
            folders = ", ".join(str(folder) for folder, _ in below[:6])
            raise RNGStateError(f"it holds {len(below)} records, name one: {folders}")
        if own is not None:
            return own
        if not names:
            raise MissingRecordError(
                f"no checkpoint at {path}. If it is from before the job had a StatefulRNG, go on "
                "with the streams as they are: rng.load(path, missing_ok=True)"
            )
        shown = f"{', '.join(sorted(names)[:3])}{', ...' if len(names) > 3 else ''}"
        raise RNGStateError(
            f"no .metadata in it, only {shown}. Its save did not finish{OF_ANOTHER_WRITER}"
        )


def _names(storage: Any) -> set[str]:
    """Return what is in the folder of a reader or writer; nothing, where it cannot be asked."""
    fs, path = getattr(storage, "fs", None), getattr(storage, "path", None)
    if fs is None or path is None:
        return set()
    if not hasattr(fs, "ls"):  # of an older torch's interface: it knows names alone
        known = (".metadata", "__0.metadata", "__0_0.distcp")
        return {name for name in known if fs.exists(fs.concat_path(path, name))}
    try:
        return {os.path.basename(str(name).rstrip("/")) for name in fs.ls(path)}
    except FileNotFoundError:
        return set()


def _is_folder(storage: Any, name: str) -> bool:
    """Return whether a name is a folder's; for a file, listing it fails or gives itself."""
    try:
        inside = storage.fs.ls(storage.fs.concat_path(storage.path, name))
    except (OSError, AttributeError):
        return False
    return [os.path.basename(str(inner)) for inner in inside] != [name]


def _axes(record: Record) -> str:
    return "all ranks" if record.mesh is None else f"mesh {', '.join(n for n, _ in record.mesh)}"


def first_line(error: BaseException) -> str:
    """Return what an error is, and the first line of what it says."""
    if isinstance(error, CheckpointException):
        error, _ = error.failures[min(error.failures)]
    return ": ".join([type(error).__name__, *str(error).strip().splitlines()[:1]])
