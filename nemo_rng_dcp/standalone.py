"""A record by itself: saved as a checkpoint of its own, or found in whatever checkpoint has one."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Collection, Mapping
from typing import Any, NoReturn

import torch
import torch.distributed.checkpoint as dcp
from fsspec.core import url_to_fs  # type: ignore[import-untyped]
from torch.distributed.checkpoint import (
    DefaultLoadPlanner,
    DefaultSavePlanner,
    LoadPlan,
    ReadItem,
    SavePlan,
    StorageReader,
    StorageWriter,
)
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta

from nemo_rng_dcp import row_0
from nemo_rng_dcp.errors import RNGStateError
from nemo_rng_dcp.grids import refuse_one_for_two, warn_if_moved
from nemo_rng_dcp.keys import own_key, path_of, renamed
from nemo_rng_dcp.record import KEY
from nemo_rng_dcp.table import Rows, read_of_row, record_keys

CheckpointId = str | os.PathLike[str] | None
"""A folder or URL as DCP's ``checkpoint_id`` takes it; ``None``: the storage object knows it."""


def save(
    take: Callable[[], dict[str, torch.Tensor]], path: CheckpointId, writer: StorageWriter | None
) -> None:
    """Write a checkpoint with nothing but a record; a collective, as ``dcp.save`` is.

    Args:
        take: Returns the table of which this rank has its row. What it raises, all ranks are told.
        path: A folder for the record alone. One that is there already is replaced.
        writer: DCP's writer of the checkpoint; ``None``: one for ``path``.

    Raises:
        RNGStateError: On every rank: there is no record on one of them, ``path`` holds a checkpoint
            of other things, which would be lost, or the storage failed.
    """
    planner = _SavePlanner(take)
    try:
        dcp.save({}, checkpoint_id=path, storage_writer=writer, planner=planner)
    except CheckpointException as error:
        _raise_first_cause(error, f"the record was not saved to {path or writer}")


def load(
    rows: Callable[[], Rows],
    names: Collection[str],
    path: CheckpointId,
    reader: StorageReader | None,
    key: str | None,
) -> dict[str, torch.Tensor]:
    """Return the saved record for a row, and read nothing else; a collective, as ``dcp.load`` is.

    Args:
        rows: Returns the rows of the job. What it raises, all ranks are told.
        names: This rank's generators.
        path: A checkpoint that holds a record, alone or beside other things, at any depth.
        reader: DCP's reader of the checkpoint; ``None``: one for ``path``.
        key: The record's key in the checkpoint, if there is more than one.

    Returns:
        ``{rows().key: record}``, not checked yet.

    Raises:
        RNGStateError: On every rank: one of them has no row, there is no record, or several and no
            ``key``, or the storage failed.
    """
    planner = _LoadPlanner(rows, names, key)
    try:
        dcp.load({}, checkpoint_id=path, storage_reader=reader, planner=planner)
    except CheckpointException as error:
        _raise_first_cause(error, f"no record was loaded from {path or reader}")
    return planner.loaded


class _SavePlanner(DefaultSavePlanner):
    """Takes the record, and replaces no checkpoint that holds anything but records.

    Here and not before ``dcp.save``, because DCP tells every rank what is raised in a planner.
    """

    def __init__(self, take: Callable[[], dict[str, torch.Tensor]]) -> None:
        super().__init__()
        self._take = take
        self._path: str | None = None

    def set_up_planner(
        self,
        state_dict: dict[str, Any],
        storage_meta: StorageMeta | None = None,
        is_coordinator: bool = False,
    ) -> None:
        if storage_meta is not None and storage_meta.checkpoint_id is not None:
            self._path = os.fspath(storage_meta.checkpoint_id)
        super().set_up_planner(self._take(), storage_meta, is_coordinator)

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        # The coordinator alone is asked, once every rank has its record and before any writes it.
        if self._path is not None:
            _make_room(self._path)
        return super().create_global_plan(all_plans)


class _ContentsPlanner(DefaultLoadPlanner):
    """Reads nothing, and knows what a checkpoint holds."""

    def set_up_planner(
        self,
        state_dict: dict[str, Any],
        metadata: Metadata | None = None,
        is_coordinator: bool = False,
    ) -> None:
        assert metadata is not None
        self.saved = metadata.state_dict_metadata

    def create_local_plan(self) -> LoadPlan:
        return LoadPlan([])


class _LoadPlanner(_ContentsPlanner):
    """Reads one record, wherever it lies in the checkpoint.

    The record is chosen in here, because DCP tells every rank what is raised in a planner.
    """

    def __init__(self, rows: Callable[[], Rows], names: Collection[str], key: str | None) -> None:
        super().__init__()
        self._rows = rows
        self._names = names
        self._key = key
        self.loaded: dict[str, torch.Tensor] = {}

    def create_local_plan(self) -> LoadPlan:
        rows = self._rows()
        key = _chosen(self.saved, self._key, rows.key)
        entry = renamed(key, rows.key)
        read = read_of_row(key, rows.row, self.saved[key], entry)
        if self._key is None:
            warn_if_moved(entry, key, rows.row, self.saved)
        self.loaded = {rows.key: torch.zeros(read.lengths, dtype=torch.int64)}
        return row_0.tell(LoadPlan([read]), {(rows.key, rows.row): self._names})

    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        if self._key is None:
            refuse_one_for_two(read for plan in global_plan for read in plan.items)
        return row_0.spread(global_plan, super().create_global_plan)

    def finish_plan(self, central_plan: LoadPlan) -> LoadPlan:
        entries = {key: (record, self._names) for key, record in self.loaded.items()}
        return super().finish_plan(row_0.hear(central_plan, entries))

    def resolve_tensor(self, read_item: ReadItem) -> torch.Tensor:
        [record] = self.loaded.values()
        return record

    def commit_tensor(self, read_item: ReadItem, tensor: torch.Tensor) -> None:
        pass  # it was read into the record itself


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
        raise RNGStateError(
            f"the checkpoint holds no record ({KEY}) of a StatefulRNG, only "
            f"{', '.join(sorted(saved)[:5]) or 'nothing'}{', ...' if len(saved) > 5 else ''}. Load "
            "the folder to which the StatefulRNG was saved."
        )
    if key is None:
        other = "" if len(places) > 1 else f", none of them of this grid of ranks ({name})"
        raise RNGStateError(
            f"the checkpoint holds {len(found)} records{other}: choose one with "
            f"{' or '.join(f'key={name!r}' for name in found)}"
        )
    raise RNGStateError(f"the checkpoint holds no record {key!r}, only {', '.join(found)}")


def _make_room(path: str) -> None:
    """Take away an earlier record, so that a save which is interrupted leaves none.

    DCP would leave the old metadata, which fits the rows of both moments.
    """
    # The second is that of a save with use_collectives=False.
    storage, folder = url_to_fs(path)
    files = [f"{folder}/{name}" for name in (".metadata", "__0.metadata")]
    files = [file for file in files if storage.exists(file)]
    if not files:
        return
    planner = _ContentsPlanner()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        try:
            dcp.load({}, checkpoint_id=path, planner=planner, no_dist=True)
        except CheckpointException as error:
            _raise_first_cause(error, f"the checkpoint in {path} cannot be read")
    others = sorted(planner.saved.keys() - record_keys(planner.saved))
    if others:
        raise RNGStateError(
            f"{path} holds a checkpoint of other things ({others[0]}, for one), which would be "
            f"lost. Save the record to a folder of its own, such as {path}/rng."
        )
    for file in files:
        storage.rm_file(file)


def _raise_first_cause(error: CheckpointException, what: str) -> NoReturn:
    """Raise DCP's exception, which ``except Exception`` misses, as this library's own."""
    rank = min(error.failures)
    cause, _ = error.failures[rank]
    kind = "" if isinstance(cause, RNGStateError) else f"{type(cause).__name__}: "
    # torch 2.9 asserts that it has read metadata, and says no more.
    reason = str(cause) or "is there a .metadata, which a save writes last?"
    raise RNGStateError(f"{what} (rank {rank}): {kind}{reason}") from error
