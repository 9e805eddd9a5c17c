"""A record by itself: saved as a checkpoint of its own, or found in whatever checkpoint has one."""

from __future__ import annotations

import dataclasses
import os
import secrets
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn, cast

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import (
    DefaultLoadPlanner,
    DefaultSavePlanner,
    LoadPlan,
    ReadItem,
    SavePlan,
    StorageReader,
    StorageWriter,
)
from torch.distributed.checkpoint._storage_utils import _storage_setup
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.tensor import DTensor

from nemo_rng_dcp.errors import RNGStateError
from nemo_rng_dcp.record import KEY, Record
from nemo_rng_dcp.table import NOT_SAVED, read_of_row, record_keys, records_in

CheckpointId = str | os.PathLike[str] | None
"""A folder or URL as DCP's ``checkpoint_id`` takes it; ``None``: the storage object knows it."""

Group = dist.ProcessGroup | None
"""The ranks that take part; ``None``: all of the default process group."""

FILES = "rng-"
"""What the names of a record's files begin with, so that no file of other writers is meant."""

_OF_ANOTHER_WRITER = (
    ". If another storage writer than DCP's own wrote it, pass that one's reader: "
    "rng.load(path, storage_reader=...)"
)


def save(
    take: Callable[[], Mapping[str, torch.Tensor]],
    path: CheckpointId,
    writer: StorageWriter | None,
    group: Group = None,
) -> None:
    """Write a checkpoint with nothing but a record; a collective, as ``dcp.save`` is.

    Args:
        take: Returns the table of which this rank has its row. What it raises, all ranks are told.
        path: A folder for the record alone. One that is there already is replaced, and stays
            until the new one is whole.
        writer: DCP's writer of the checkpoint; ``None``: one for ``path``.
        group: The ranks that have rows, and call this.

    Raises:
        RNGStateError: On every rank: there is no record on one of them, ranks name different
            places, the place holds anything but a record of the same generators, the storage
            failed, or not all ranks called.
        ValueError: This rank is not in ``group``.
    """
    _check_member(group)
    place = _Place(writer or cast(StorageWriter, _storage_setup(None, path, reader=False)))
    with _told_on_every_rank(f"the record was not saved to {path or writer}", group):
        dcp.save(
            {},
            checkpoint_id=path,
            storage_writer=cast(StorageWriter, place),
            planner=_SavePlanner(take, place, path, group),
            process_group=group,
        )


def load(
    row: Callable[[], int],
    path: CheckpointId,
    reader: StorageReader | None,
    key: str | None,
    group: Group = None,
    missing_ok: bool = False,
) -> dict[str, torch.Tensor]:
    """Return the saved record for a row, and read nothing else; a collective, as ``dcp.load`` is.

    Args:
        row: Returns this process's row. What it raises, all ranks are told.
        path: A checkpoint that holds a record, alone or beside other things, at any depth; or a
            folder of which one folder is such a checkpoint.
        reader: DCP's reader of the checkpoint; ``None``: one for ``path``.
        key: The record's key in the checkpoint, if there is more than one.
        group: The ranks that call this.
        missing_ok: Whether there may be no checkpoint, or none with a record.

    Returns:
        ``{"rng_streams": record}``, not checked yet; ``NOT_SAVED`` for one that may be missing.

    Raises:
        RNGStateError: On every rank: one of them has no row, there is no record, or several and no
            ``key``, ranks read different checkpoints, the storage failed, or not all ranks called.
        ValueError: This rank is not in ``group``.
    """
    _check_member(group)
    source = _Source(reader or cast(StorageReader, _storage_setup(None, path, reader=True)))
    planner = _LoadPlanner(row, key, source)
    hint = _OF_ANOTHER_WRITER if reader is None else ""
    with _told_on_every_rank(f"no record was loaded from {path or reader}", group, hint):
        try:
            dcp.load(
                {},
                checkpoint_id=path,
                storage_reader=cast(StorageReader, source),
                planner=planner,
                process_group=group,
            )
        except CheckpointException as error:
            causes = [cause for cause, _ in error.failures.values()]
            is_missing = all(isinstance(cause, _MissingRecordError) for cause in causes)
            if not (missing_ok and is_missing and len(causes) == _size(group)):
                raise
    return {KEY: planner.record}


class _MissingRecordError(RNGStateError):
    """There is no checkpoint, or none with a record."""


class _Place:
    """A writer that harms nothing in its storage.

    The files of a record have names of their own, new ones in each save, and an earlier record
    goes when the new one is whole. So files cannot collide, and a save that is interrupted leaves
    the earlier record. The rest is refused. Only the writer's own storage is asked: a path may mean
    another place to it. Where it cannot be asked (a writer that is no ``FileSystemWriter``), or
    names its files itself, nothing is replaced.
    """

    def __init__(self, writer: StorageWriter) -> None:
        self._writer: Any = writer

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
        source = _Source(reader)
        planner = _LoadPlanner(lambda: 0, KEY, source)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")
            try:
                metadata = reader.read_metadata()
                saved = metadata.state_dict_metadata
                # A key with a dot is of an application's dict: rng.save() wrote none.
                others = sorted(set(saved) - {key for key in record_keys(saved) if "." not in key})
                if others or KEY not in saved:
                    self._refuse(f"a checkpoint of other things ({', '.join(others[:1])}, for one)")
                dcp.load({}, storage_reader=reader, planner=planner, no_dist=True)
                earlier = Record.from_tensor(planner.record)
            except RNGStateError:
                raise
            except (Exception, CheckpointException) as error:
                self._refuse(f"a checkpoint that cannot be read ({_first_line(error)})", error)
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

    def _refuse(self, what: str, cause: BaseException | None = None) -> NoReturn:
        place = getattr(self._writer, "path", self._writer)
        raise RNGStateError(
            f"{place} holds {what}, which would be lost. Save the record to a folder of its own, "
            f"such as {place}/rng."
        ) from cause

    def _remove(self, names: set[str]) -> None:
        for name in names:
            with suppress(OSError):  # the new record is whole, with or without what it replaces
                self._writer.fs.rm_file(self._writer.fs.concat_path(self._writer.path, name))


class _Source:
    """A reader that also looks one folder below, and says in a line what it did not find."""

    def __init__(self, reader: StorageReader) -> None:
        self._reader: Any = reader
        self.error: RNGStateError | None = None
        """Why there is nothing to read; the planner raises it, for DCP logs what a reader raises"""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._reader, name)

    def read_metadata(self, **options: Any) -> Metadata:
        read: Callable[..., Metadata] = self._reader.read_metadata
        if type(self._reader).read_metadata is not dcp.FileSystemReader.read_metadata:
            return read()
        names = _names(self._reader)
        if "__0.metadata" in names:  # of a save with use_collectives=False: DCP asks for it next
            return read(**options)
        try:
            return self._found(names, read)
        except RNGStateError as error:
            self.error = error
        except Exception as error:
            text = f"its metadata cannot be read: {_first_line(error)}{_OF_ANOTHER_WRITER}"
            self.error = RNGStateError(text)
        return Metadata({})

    def _found(self, names: set[str], read: Callable[[], Metadata]) -> Metadata:
        fs, path = self._reader.fs, self._reader.path
        own = read() if ".metadata" in names else None
        if own is not None and record_keys(own.state_dict_metadata):
            return own
        below = []
        for name in sorted(names):
            folder = fs.concat_path(path, name)
            if fs.exists(fs.concat_path(folder, ".metadata")):
                self._reader.path = folder
                metadata = read()
                if record_keys(metadata.state_dict_metadata):
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
            raise _MissingRecordError(
                f"no checkpoint at {path}. If it is from before the job had a StatefulRNG, go on "
                "with the streams as they are: rng.load(path, missing_ok=True)"
            )
        shown = f"{', '.join(sorted(names)[:3])}{', ...' if len(names) > 3 else ''}"
        raise RNGStateError(
            f"no .metadata in it, only {shown}. Its save did not finish{_OF_ANOTHER_WRITER}"
        )


class _SavePlanner(DefaultSavePlanner):
    """Takes the record, and has the place checked before any rank writes.

    Here and not before ``dcp.save``, because DCP tells every rank what is raised in a planner.
    """

    def __init__(
        self,
        take: Callable[[], Mapping[str, torch.Tensor]],
        place: _Place,
        path: CheckpointId,
        group: Group,
    ) -> None:
        super().__init__()
        self._take = take
        self._place = place
        self._path: object = path
        self._group = group

    def set_up_planner(
        self,
        state_dict: dict[str, Any],
        storage_meta: StorageMeta | None = None,
        is_coordinator: bool = False,
    ) -> None:
        if storage_meta is not None and storage_meta.checkpoint_id is not None:
            self._path = storage_meta.checkpoint_id
        state = self._take()
        if not isinstance(state, Mapping) or len(state) != 1:
            raise RNGStateError(f"the state is {state!r:.80}, expected what state_dict() returns")
        table = next(iter(state.values()))
        records = records_in(table.to_local() if isinstance(table, DTensor) else table)
        self._record = Record.from_tensor(records[0])
        if isinstance(table, DTensor):
            _check_rows(table, self._group)
        super().set_up_planner(dict(state), storage_meta, is_coordinator)

    def create_local_plan(self) -> SavePlan:
        # Absolute: ranks may have different working directories.
        path = self._path
        place = os.path.abspath(path) if isinstance(path, Path) else str(path)
        plan = super().create_local_plan()
        return dataclasses.replace(plan, planner_data=(place, plan.planner_data))

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        # The coordinator alone is asked, once every rank has its record and before any writes it.
        places = [plan.planner_data[0] for plan in all_plans]
        for rank, place in enumerate(places):
            if place != places[0]:
                raise RNGStateError(
                    f"ranks name different places: rank {_global(0, self._group)} {places[0]}, "
                    f"rank {_global(rank, self._group)} {place}. Nothing was written. Let one rank "
                    "choose the place and broadcast it."
                )
        self._place.check(self._record)
        all_plans = [
            dataclasses.replace(plan, planner_data=plan.planner_data[1]) for plan in all_plans
        ]
        return super().create_global_plan(all_plans)


class _LoadPlanner(DefaultLoadPlanner):
    """Reads one record, wherever it lies in the checkpoint.

    The record is chosen in here, because DCP tells every rank what is raised in a planner.
    """

    def __init__(self, row: Callable[[], int], key: str | None, source: _Source) -> None:
        super().__init__()
        self._row = row
        self._key = key
        self._source = source
        self.record = NOT_SAVED

    def set_up_planner(
        self,
        state_dict: dict[str, Any],
        metadata: Metadata | None = None,
        is_coordinator: bool = False,
    ) -> None:
        if self._source.error is not None:
            raise self._source.error
        assert metadata is not None
        self.saved = metadata.state_dict_metadata
        self._save = getattr(metadata.storage_meta, "save_id", None)

    def create_local_plan(self) -> LoadPlan:
        key = _chosen(self.saved, self._key)
        read = read_of_row(key, self._row(), self.saved[key])
        self.record = torch.zeros(read.lengths, dtype=torch.int64, device="cpu")
        return LoadPlan([read], planner_data=self._save)

    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        if len({plan.planner_data for plan in global_plan}) > 1:
            raise RNGStateError(
                "ranks read different checkpoints: each of them named a place of its own. Let one "
                "rank choose the place and broadcast it."
            )
        return global_plan

    def resolve_tensor(self, read_item: ReadItem) -> torch.Tensor:
        return self.record

    def commit_tensor(self, read_item: ReadItem, tensor: torch.Tensor) -> None:
        pass  # it was read into the record itself


def _chosen(saved: Mapping[str, Any], key: str | None) -> str:
    found = record_keys(saved)
    if key is None and len(found) == 1:
        return found[0]
    for chosen in (key, f"{key}.{KEY}"):  # as it is, or as `inspect` shows it
        if chosen in found:
            return chosen
    if not found:
        raise _MissingRecordError(
            f"the checkpoint holds no record ({KEY}) of a StatefulRNG, only "
            f"{', '.join(sorted(saved)[:5]) or 'nothing'}{', ...' if len(saved) > 5 else ''}. Load "
            "the folder to which the StatefulRNG was saved. If the checkpoint is from before the "
            "job had one, go on with the streams as they are: rng.load(path, missing_ok=True)"
        )
    if key is None:
        raise RNGStateError(
            f"the checkpoint holds {len(found)} records: choose one with "
            f"{' or '.join(f'key={name!r}' for name in found)}"
        )
    raise RNGStateError(f"the checkpoint holds no record {key!r}, only {', '.join(found)}")


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
    return [os.path.basename(str(inner).rstrip("/")) for inner in inside] != [name]


def _axes(record: Record) -> str:
    return "all ranks" if record.mesh is None else f"mesh {', '.join(n for n, _ in record.mesh)}"


def _size(group: Group) -> int:
    return dist.get_world_size(group) if dist.is_initialized() else 1


def _global(rank: int, group: Group) -> int:
    return rank if group is None else dist.get_global_rank(group, rank)


def _check_member(group: Group) -> None:
    if group is not None and dist.get_rank(group) < 0:
        raise ValueError("this rank is not in process_group: let only ranks of the group call this")


def _check_rows(table: DTensor, group: Group) -> None:
    ranks = set(table.device_mesh.mesh.flatten().tolist())
    calling = set(dist.get_process_group_ranks(group))
    if not ranks <= calling:
        raise RNGStateError(
            f"the ranks {sorted(ranks)} have rows, and of these process_group lacks "
            f"{sorted(ranks - calling)}: pass a group that has them all, or construct the "
            "StatefulRNG with a mesh= of the group's ranks"
        )


@contextmanager
def _told_on_every_rank(what: str, group: Group, hint: str = "") -> Iterator[None]:
    """Raise DCP's exception, which ``except Exception`` misses, as this library's own."""
    try:
        yield
    except CheckpointException as error:
        failures = error.failures
        own, _ = failures.get(dist.get_rank(group) if dist.is_initialized() else 0, (None, None))
        if own is not None and not isinstance(own, Exception):
            raise own from None  # Ctrl-C and SystemExit stay what they are
        rank = min(failures)
        cause, _ = failures[rank]
        if isinstance(cause, RNGStateError):
            raise RNGStateError(f"{what} (rank {_global(rank, group)}): {cause}") from None
        text = f"{what} (rank {_global(rank, group)}): {_first_line(cause)}{hint}"
        raise RNGStateError(text) from error
    except RuntimeError as error:  # of a collective: DCP wraps all others
        of_whom = "the default process group" if group is None else "process_group"
        raise RNGStateError(
            f"{what}: {_first_line(error)}. Every rank of {of_whom} has to call it, and no other "
            "save may run on that group at the same time: pass process_group= for a part of the "
            "ranks, or a new_group() of all beside an async_save."
        ) from error


def _first_line(error: BaseException) -> str:
    if isinstance(error, CheckpointException):
        error, _ = error.failures[min(error.failures)]
    return ": ".join([type(error).__name__, *str(error).strip().splitlines()[:1]])
