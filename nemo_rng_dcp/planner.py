"""``RNGLoadPlanner``: a load in which the RNG tables may have another number of rows."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.distributed.checkpoint import ChunkStorageMetadata, DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import (
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.tensor import DTensor

from nemo_rng_dcp.errors import RNGStateError
from nemo_rng_dcp.layout import Layout, global_rank, source_row
from nemo_rng_dcp.origin import ORIGIN


class RNGLoadPlanner(DefaultLoadPlanner):
    """Loads RNG tables onto any number of rows; everything else as ``DefaultLoadPlanner`` does.

    Each rank reads one saved row of every RNG table:

    - As many rows or fewer than were saved: row r reads row r. The others are dropped.
    - More rows: a row that was saved is read by its own rank, bit for bit. A new row r reads row
      ``r % saved``, and ``StatefulRNG`` then forks a stream of its own from it.
    - A table that the checkpoint lacks is left as it is.

    Dropped and forked rows and missing tables are warned of, once for each RNG entry, by rank 0.

    Pass it to ``dcp.load`` on every rank. It communicates no more than the default planner.

    Args:
        keys: Dotted paths of the RNG entries in the state dict: ``"rng"`` for
            ``{"rng": StatefulRNG(...)}``, ``"app.rng"`` where ``app.state_dict()`` holds
            ``{"rng": rng.state_dict()}``. At least one.
        flatten_state_dict: As in ``DefaultLoadPlanner``.
        flatten_sharded_tensors: As in ``DefaultLoadPlanner``.
        allow_partial_load: As in ``DefaultLoadPlanner``; it concerns everything but RNG.

    Raises:
        TypeError: ``keys`` is a string or holds something else than strings.
        ValueError: ``keys`` is empty; or, inside ``dcp.load``, a path is not in the state dict.
        RNGStateError: Inside ``dcp.load``: the checkpoint holds something else than a fitting
            table under an RNG key. Nothing was read. DCP wraps errors of its steps in a
            ``CheckpointException`` that names the ranks.

    Example:
        >>> import tempfile, torch
        >>> import torch.distributed.checkpoint as dcp
        >>> from nemo_rng_dcp import StatefulRNG
        >>> rng = StatefulRNG(seed=42, ranked=True)
        >>> with tempfile.TemporaryDirectory() as path:
        ...     _ = dcp.save({"rng": rng}, checkpoint_id=path)
        ...     expected = torch.rand(3)
        ...     dcp.load({"rng": rng}, checkpoint_id=path, planner=RNGLoadPlanner())
        >>> torch.equal(torch.rand(3), expected)
        True
    """

    def __init__(
        self,
        keys: Sequence[str] = ("rng",),
        flatten_state_dict: bool = True,
        flatten_sharded_tensors: bool = True,
        allow_partial_load: bool = False,
    ) -> None:
        self.keys = () if isinstance(keys, str) else tuple(dict.fromkeys(keys))
        if isinstance(keys, str) or not all(isinstance(key, str) for key in self.keys):
            raise TypeError(f'keys is {keys!r}, expected a sequence of strings such as ("rng",)')
        if not self.keys:
            raise ValueError('keys is empty, expected at least one path such as "rng"')
        super().__init__(flatten_state_dict, flatten_sharded_tensors, allow_partial_load)

    def set_up_planner(
        self,
        state_dict: dict[str, Any],
        metadata: Metadata | None = None,
        is_coordinator: bool = False,
    ) -> None:
        super().set_up_planner(state_dict, metadata, is_coordinator)
        for key in self.keys:
            # Tolerance is for RNG tables alone: a path that holds anything else is a mistake.
            if f"{key}.{ORIGIN}" not in self.state_dict:
                raise ValueError(
                    f"RNGLoadPlanner: no StatefulRNG at {key!r} in the state dict, whose entries "
                    f"are {sorted(map(str, state_dict))}. keys are the dotted paths of the RNG "
                    'entries, such as "rng" or "app.rng".'
                )

    def create_local_plan(self) -> LoadPlan:
        assert self.metadata is not None
        tables = {fqn: value for fqn, value in self.state_dict.items() if self._is_rng(fqn)}
        saved = self.metadata.state_dict_metadata
        requests: list[ReadItem] = []
        for key in self.keys:
            own = {fqn: t for fqn, t in tables.items() if fqn.startswith(f"{key}.")}
            requests += _read_items(own, saved)
            if global_rank() == 0:
                _warn(key, own, saved)

        # The default planner plans everything else, and must neither miss the RNG entries nor see
        # them: when the checkpoint holds keys that were not asked for, it takes it for one of torch
        # 2.3, flattens the original dict anew and would get them back.
        mappings, metadata, original = self.mappings, self.metadata, self.original_state_dict
        self.state_dict = {fqn: v for fqn, v in self.state_dict.items() if fqn not in tables}
        self.metadata = dataclasses.replace(
            self.metadata,
            state_dict_metadata={fqn: v for fqn, v in saved.items() if not self._is_rng(fqn)},
        )
        for key in self.keys:
            self.original_state_dict = _without(self.original_state_dict, key)
        try:
            plan = super().create_local_plan()
        finally:
            self.metadata, self.original_state_dict = metadata, original
        self.state_dict = {**self.state_dict, **tables}
        self.mappings = {**mappings, **self.mappings}
        return dataclasses.replace(plan, items=[*plan.items, *requests])

    def _is_rng(self, fqn: str) -> bool:
        return any(fqn.startswith(f"{key}.") for key in self.keys)


def _read_items(tables: Mapping[str, Any], saved: Mapping[str, Any]) -> list[ReadItem]:
    """Return the reads of one saved row for each table that the checkpoint has."""
    requests: list[ReadItem] = []
    for fqn, table in tables.items():
        if fqn not in saved:
            continue
        _check_table(fqn, table, saved[fqn])
        row = _row_number(table)
        width = table.shape[1]
        source = ChunkStorageMetadata(
            offsets=torch.Size((source_row(row, saved[fqn].size[0]), 0)),
            sizes=torch.Size((1, width)),
        )
        items = create_read_items_for_chunk_list(fqn, saved[fqn], [source])
        # A row without chunks would be no error to DCP: it would keep the live state.
        if sum(item.lengths.numel() for item in items) != width:
            raise RNGStateError(
                f"{fqn}: the checkpoint's metadata places {len(items)} chunks for row "
                f"{source.offsets[0]}, which do not make up the row. Load another checkpoint."
            )
        own = MetadataIndex(fqn, torch.Size((row, 0)))
        requests += [dataclasses.replace(item, dest_index=own) for item in items]
    return requests


def _row_number(table: torch.Tensor) -> int:
    return Layout.current(table.device_mesh).row if isinstance(table, DTensor) else 0


def _check_table(fqn: str, table: Any, saved: Any) -> None:
    """Raise ``RNGStateError`` unless the checkpoint has a table of rows like the live ones."""
    if not isinstance(saved, TensorStorageMetadata):
        raise RNGStateError(
            f"{fqn}: the checkpoint holds bytes (a pickle) here, expected a tensor. No StatefulRNG "
            "wrote that; it was not read. Load without RNG state, or another checkpoint."
        )
    if (
        saved.properties.dtype != table.dtype
        or len(saved.size) != 2
        or saved.size[0] < 1
        or saved.size[1] != table.shape[1]
    ):
        raise RNGStateError(
            f"{fqn}: the checkpoint holds {saved.properties.dtype} {tuple(saved.size)}, expected "
            f"{table.dtype} (rows, {table.shape[1]}). It is another generator's, or was written "
            "by another version of nemo_rng_dcp or torch."
        )


def _warn(key: str, tables: Mapping[str, Any], saved: Mapping[str, Any]) -> None:
    """Say what a load does to this RNG entry other than restoring each row."""
    missing = [fqn for fqn in tables if fqn not in saved]
    if missing:
        warnings.warn(
            f"the checkpoint has no {', '.join(missing)}: these streams stay as they are",
            stacklevel=2,
        )
    origin = f"{key}.{ORIGIN}"
    if origin not in saved:
        return
    rows, rows_saved = tables[origin].shape[0], saved[origin].size[0]
    if rows < rows_saved:
        warnings.warn(
            f"{key}: {rows_saved} rows were saved and {rows} are loaded: "
            f"{_span(rows, rows_saved)} dropped",
            stacklevel=2,
        )
    if rows > rows_saved:
        warnings.warn(
            f"{key}: {rows_saved} rows were saved and {rows} are loaded: "
            f"{_span(rows_saved, rows)} new, each made from row r % {rows_saved}",
            stacklevel=2,
        )


def _span(first: int, end: int) -> str:
    return f"row {first} is" if end - first == 1 else f"rows {first} to {end - 1} are"


def _without(value: Any, path: str) -> Any:
    """Return nested dicts without the entry at a dotted path; what is given stays as it is."""
    if not isinstance(value, Mapping):
        return value
    return {
        key: _without(inner, path.removeprefix(f"{key}.")) if path.startswith(f"{key}.") else inner
        for key, inner in value.items()
        if str(key) != path
    }
