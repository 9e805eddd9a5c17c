"""A record by itself: saved as a checkpoint of its own, or found in whatever checkpoint has one."""

from __future__ import annotations

import dataclasses
import os
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

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

from nemo_rng_dcp import row_0
from nemo_rng_dcp.errors import RNGStateError
from nemo_rng_dcp.grids import refuse_one_for_two, warn_if_moved
from nemo_rng_dcp.keys import own_key, path_of, renamed
from nemo_rng_dcp.places import OF_ANOTHER_WRITER, MissingRecordError, Place, Source, first_line
from nemo_rng_dcp.record import KEY, Record
from nemo_rng_dcp.table import (
    Wanted,
    buffer_for,
    local,
    place_in,
    reads_of_rows,
    record_keys,
    records_in,
)

CheckpointId = str | os.PathLike[str] | None
"""A folder or URL as DCP's ``checkpoint_id`` takes it; ``None``: the storage object knows it."""

Group = dist.ProcessGroup | None
"""The ranks that take part; ``None``: all of the default process group."""


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
    where = path or writer
    storage: Any = writer or _storage_setup(None, path)  # a writer, as no reader is asked for
    place: Any = Place(storage, record_keys, _first_record)
    with _told_on_every_rank(f"the record was not saved to {where}", group):
        dcp.save(
            {},
            checkpoint_id=path,
            storage_writer=place,
            planner=_SavePlanner(take, place, path, group),
            process_group=group,
        )


def load(
    take: Callable[[], Mapping[str, torch.Tensor]],
    names: Collection[str],
    path: CheckpointId,
    reader: StorageReader | None,
    key: str | None,
    group: Group,
    missing_ok: bool,
) -> dict[str, torch.Tensor] | None:
    """Return the saved records for a job's rows; a collective, as ``dcp.load`` is.

    Nothing else is read.

    Args:
        take: Returns the table of which this rank has its rows. What it raises, all ranks are told.
        names: This rank's generators.
        path: A checkpoint that holds a record, alone or beside other things, at any depth; or a
            folder of which one folder is such a checkpoint.
        reader: DCP's reader of the checkpoint; ``None``: one for ``path``.
        key: The record's key in the checkpoint, if there is more than one.
        group: The ranks that call this.
        missing_ok: Whether there may be no checkpoint, or none with a record.

    Returns:
        By the key of the job's table the records, not checked yet; ``None``: they are missing and
        may be.

    Raises:
        RNGStateError: On every rank: one of them has no row, there is no record, or several and no
            ``key``, ranks read different checkpoints, the storage failed, or not all ranks called.
        ValueError: This rank is not in ``group``.
    """
    _check_member(group)
    storage: Any = reader or _storage_setup(None, path, reader=True)
    source: Any = Source(storage, record_keys)

    def own() -> tuple[str, Wanted]:
        [(name, table)] = take().items()
        return name, Wanted.of(table)

    planner = _LoadPlanner(own, names, key, source)
    hint = OF_ANOTHER_WRITER if reader is None else ""
    with _told_on_every_rank(f"no record was loaded from {path or reader}", group, hint):
        try:
            dcp.load(
                {},
                checkpoint_id=path,
                storage_reader=source,
                planner=planner,
                process_group=group,
            )
        except CheckpointException as error:
            causes = [cause for cause, _ in error.failures.values()]
            is_missing = all(isinstance(cause, MissingRecordError) for cause in causes)
            if not (missing_ok and is_missing and len(causes) == _size(group)):
                raise
            return None
    return planner.loaded


class _SavePlanner(DefaultSavePlanner):
    """Takes the record, and has the place checked before any rank writes.

    Here and not before ``dcp.save``, because DCP tells every rank what is raised in a planner.
    """

    def __init__(
        self,
        take: Callable[[], Mapping[str, torch.Tensor]],
        place: Place,
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
        records = records_in(local(table))
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
    """Reads one table's records, wherever it lies in the checkpoint.

    It is chosen in here, because DCP tells every rank what is raised in a planner.
    """

    def __init__(
        self,
        own: Callable[[], tuple[str, Wanted]],
        names: Collection[str],
        key: str | None,
        source: Source,
    ) -> None:
        super().__init__()
        self._own, self._names = own, names
        self._key = key
        self._source = source

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
        name, wanted = self._own()
        key = _chosen(self.saved, self._key, name)
        entry = renamed(key, name)
        reads = reads_of_rows(key, wanted, self.saved[key], entry)
        if self._key is None:
            warn_if_moved(entry, key, wanted.own[0], self.saved)
        self.loaded: dict[str, torch.Tensor] = {name: buffer_for(reads)}
        plan = LoadPlan(reads, planner_data=self._save)
        return row_0.tell(plan, {(name, wanted.own[0]): self._names})

    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        return row_0.spread(global_plan, self._check)

    def _check(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        if len({plan.planner_data for plan in global_plan}) > 1:
            raise RNGStateError(
                "ranks read different checkpoints: each of them named a place of its own. Let one "
                "rank choose the place and broadcast it."
            )
        if self._key is None:
            refuse_one_for_two(read for plan in global_plan for read in plan.items)
        return global_plan

    def finish_plan(self, central_plan: LoadPlan) -> LoadPlan:
        entries = {key: (record, self._names) for key, record in self.loaded.items()}
        return super().finish_plan(row_0.hear(central_plan, entries))

    def resolve_tensor(self, read_item: ReadItem) -> torch.Tensor:
        [records] = self.loaded.values()
        return place_in(records, read_item)

    def commit_tensor(self, read_item: ReadItem, tensor: torch.Tensor) -> None:
        pass  # it was read into its place itself


def _first_record(reader: StorageReader) -> Record:
    """Return the record of row 0 that ``rng.save`` wrote; does not communicate."""
    wanted = KEY, Wanted(range(1))
    planner = _LoadPlanner(lambda: wanted, (), None, Source(reader, record_keys))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # such as that of DCP, that one process reads alone
        dcp.load({}, storage_reader=reader, planner=planner, no_dist=True)
    [records] = planner.loaded.values()
    return Record.from_tensor(records_in(records)[0])


def _chosen(saved: Mapping[str, Any], key: str | None, name: str) -> str:
    """Return the key of the record to load on the grid of ranks whose table has a name."""
    found = record_keys(saved)
    keys = {path_of(one): one for one in found} | {
        one: one for one in found
    }  # `inspect` shows paths
    places = {one.rpartition(".")[0] for one in found}
    if key in keys:
        own = renamed(keys[key], name)
        return own if keys[key].endswith(KEY) and own in found else keys[key]
    if key is None and len(places) == 1:
        chosen = own_key(renamed(found[0], name), found)
        if chosen is not None:
            return chosen
    if not found:
        raise MissingRecordError(
            f"the checkpoint holds no record ({KEY}) of a StatefulRNG, only "
            f"{', '.join(sorted(saved)[:5]) or 'nothing'}{', ...' if len(saved) > 5 else ''}. Load "
            "the folder to which the StatefulRNG was saved. If the checkpoint is from before the "
            "job had one, go on with the streams as they are: rng.load(path, missing_ok=True)"
        )
    if key is None:
        other = "" if len(places) > 1 else f", none of them of this grid of ranks ({name})"
        raise RNGStateError(
            f"the checkpoint holds {len(found)} records{other}: choose one with "
            f"{' or '.join(f'key={name!r}' for name in found)}"
        )
    raise RNGStateError(f"the checkpoint holds no record {key!r}, only {', '.join(found)}")


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
        text = f"{what} (rank {_global(rank, group)}): {first_line(cause)}{hint}"
        raise RNGStateError(text) from error
    except RuntimeError as error:  # of a collective: DCP wraps all others
        of_whom = "the default process group" if group is None else "process_group"
        raise RNGStateError(
            f"{what}: {first_line(error)}. Every rank of {of_whom} has to call it, and no other "
            "save may run on that group at the same time: pass process_group= for a part of the "
            "ranks, or a new_group() of all beside an async_save."
        ) from error
