"""``RNGLoadPlanner``: a load in which records may be of other rows and of another length."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Collection, Iterator, MutableMapping
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
from torch.distributed.checkpoint import DefaultLoadPlanner, LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.metadata import (
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)

from nemo_rng_dcp import row_0
from nemo_rng_dcp.errors import RNGStateError, warn
from nemo_rng_dcp.grids import refuse_one_for_two, warn_if_moved
from nemo_rng_dcp.keys import base_of, beside, is_name, own_key
from nemo_rng_dcp.loader_entry import marked_position
from nemo_rng_dcp.position import POSITION_KEY, positions_in
from nemo_rng_dcp.ranks import world_size
from nemo_rng_dcp.record import Record
from nemo_rng_dcp.table import (
    Wanted,
    buffer_for,
    joined,
    local,
    place_in,
    reads_of_rows,
    record_keys,
    records_in,
    with_records,
)
from nemo_rng_dcp.unread import marked

_Path = tuple[tuple[Any, Any], ...]

# Below a list nothing can be taken out: the elements behind it would get other keys. A tensor of
# which no chunk was stored takes its place there, so that the other planner reads nothing for it.
_PLACEHOLDER = torch.empty(1, dtype=torch.int64, device="cpu")
_PLACEHOLDER_SAVED = TensorStorageMetadata(
    TensorProperties(dtype=torch.int64), _PLACEHOLDER.size(), []
)


@dataclasses.dataclass
class _Entry:
    """An RNG entry of the state dict.

    Attributes:
        path: The containers that it is nested in, from the outside in, each with the key in it.
        value: The live table; once it is planned, one with room for the rows that are read
            instead, or with marks if there are none.
        unread: What is given back if there is nothing to read: the live rows, with marks.
        generators: The names of a record's; none for a loader's position.
        wanted: Which rows these are.
        reads: What is read instead.
    """

    path: _Path
    value: torch.Tensor
    unread: list[torch.Tensor]
    generators: Collection[str]
    wanted: Wanted
    reads: list[ReadItem] = dataclasses.field(default_factory=list)

    @property
    def is_below_a_list(self) -> bool:
        return any(isinstance(container, list) for container, _ in self.path)

    def take_out(self) -> None:
        if self.is_below_a_list:
            container, key = self.path[-1]
            container[key] = _PLACEHOLDER
            return
        for container, key in reversed(self.path):
            del container[key]
            # A dict that is empty now goes too: for checkpoints of torch 2.3 it counts as a value.
            if container:
                return

    def put_in(self) -> None:
        for (container, key), (inner, _) in pairwise(self.path):
            container[key] = inner
        container, key = self.path[-1]
        container[key] = self.value


class RNGLoadPlanner(LoadPlanner):
    """Loads RNG records onto any number of rows; everything else as another planner does.

    Each rank reads one saved row of every RNG entry, or those of its logical ranks, whatever
    generators they hold:

    - As many rows or fewer than were saved: row r reads row r. The others are dropped.
    - More rows: a row that was saved is read by its own rank, bit for bit. A new row r reads row
      ``r % saved``, and ``StatefulRNG`` then forks streams of its own from it.
    - For an entry that the checkpoint lacks, no stream moves, and ``StatefulRNG`` says so.

    RNG entries are found by themselves, at the top level or nested, in the state dict and in the
    checkpoint. The other planner never sees them; below a list it sees a tensor of which nothing
    was stored. What is loaded takes the place of the live table in the state dict, so call
    ``state_dict()`` anew for each load.

    DCP calls it in this order:

    1. :meth:`set_up_planner`, on every rank: finds the RNG entries and chooses the rows that
       are read for each. The other planner is set up with everything else.
    2. :meth:`create_local_plan`, on every rank: the other planner's reads, then ours for
       the RNG entries.
    3. :meth:`create_global_plan`, on the coordinator alone: the other planner's.
    4. :meth:`finish_plan`, on every rank: the other planner's.
    5. :meth:`resolve_tensor` and :meth:`commit_tensor`, or :meth:`load_bytes`, on every rank for
       each read of its own: a record goes to a buffer here, all else to the other planner.

    Every other public attribute and method is the other planner's own, since some readers ask for
    them. Where the reader lists nothing (``BroadcastingTorchSaveReader``), the other planner reads
    the RNG entries too, onto as many rows as were saved.

    Pass it to ``dcp.load`` on every rank. It communicates no more than the other planner. An RNG
    entry of the checkpoint for which the state dict has no place is named in an
    ``RNGStateWarning``, by the coordinator.

    Args:
        planner: The planner for everything else; ``None``: ``DefaultLoadPlanner()``.

    Raises:
        TypeError: ``planner`` is no ``LoadPlanner``.
        RNGStateError: Inside ``dcp.load``: the checkpoint holds something else than records under
            the key of an RNG entry, or has no place for the row. Nothing was read. DCP wraps errors
            of its steps in a ``CheckpointException`` that names the ranks.

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

    def __init__(self, planner: LoadPlanner | None = None) -> None:
        if planner is not None and not isinstance(planner, LoadPlanner):
            raise TypeError(f"planner is {planner!r:.80}, expected a LoadPlanner or None")
        self.planner = DefaultLoadPlanner() if planner is None else planner

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name == "planner":
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(self.planner, name)

    def set_up_planner(
        self,
        state_dict: dict[str, Any],
        metadata: Metadata | None = None,
        is_coordinator: bool = False,
    ) -> None:
        assert metadata is not None
        saved = metadata.state_dict_metadata
        # A reader that lists nothing leaves it to its own planner to say what is stored.
        paths = dict(_find(state_dict)) if saved else {}
        entries = {key: _entry(path) for key, path in paths.items()}
        self._entries: dict[str, _Entry]
        self._entries = {key: entry for key, entry in entries.items() if entry is not None}
        found = {key: own_key(key, saved) for key in self._entries}
        for key, source in found.items():
            if source is not None:
                entry = self._entries[key]
                entry.reads = reads_of_rows(source, entry.wanted, saved[source], key)
                warn_if_moved(key, source, entry.wanted.own[0], saved)
        ours = {*found, *found.values()}
        others = {key: stored for key, stored in saved.items() if key not in ours}
        placeholders: dict[str, Any] = {
            key: _PLACEHOLDER_SAVED for key, entry in self._entries.items() if entry.is_below_a_list
        }
        with self._taken_out():
            self.planner.set_up_planner(
                state_dict,
                dataclasses.replace(metadata, state_dict_metadata={**others, **placeholders}),
                is_coordinator,
            )
        self._saved = saved

    def create_local_plan(self) -> LoadPlan:
        # The default planner may flatten the state dict a second time here.
        with self._taken_out():
            plan = self.planner.create_local_plan()
            for entry in self._entries.values():
                # Records come as they were saved: StatefulRNG is given them instead of its own.
                # They are a table still, since a state dict that is kept may be saved again.
                records = buffer_for(entry.reads)
                if not entry.reads:
                    records = joined(entry.unread)
                entry.value = with_records(entry.value, records)
        reads = [read for entry in self._entries.values() for read in entry.reads]
        plan = dataclasses.replace(plan, items=[*plan.items, *reads])
        names = {
            (key, entry.wanted.own[0]): entry.generators for key, entry in self._entries.items()
        }
        return row_0.tell(plan, names)

    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        # Only the coordinator comes here, and sees what every rank reads.
        reads = [read for plan in global_plan for read in plan.items]
        refuse_one_for_two(reads)
        known = {read.storage_index.fqn for read in reads}
        if len(global_plan) < world_size():  # the other ranks may have the other grids
            known.update(other for key in self._entries for other in beside(key, self._saved))
        ignored = [key for key in record_keys(self._saved) if key not in known]
        if ignored:
            warn(
                f"the checkpoint has RNG state at {', '.join(ignored)}, for which this job has no "
                "StatefulRNG under that key: ignored",
            )
        ignored = [key for key in record_keys(self._saved, POSITION_KEY) if key not in known]
        if ignored:
            warn(
                f"the checkpoint has the position of a loader at {', '.join(ignored)}, for which "
                "this job has no ResumableLoader under that key: ignored",
            )
        return row_0.spread(global_plan, self.planner.create_global_plan)

    def finish_plan(self, central_plan: LoadPlan) -> LoadPlan:
        entries = {key: (entry.value, entry.generators) for key, entry in self._entries.items()}
        return self.planner.finish_plan(row_0.hear(central_plan, entries))

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        self.planner.load_bytes(read_item, value)

    def resolve_bytes(self, read_item: ReadItem) -> io.BytesIO:
        return self.planner.resolve_bytes(read_item)

    def resolve_tensor(self, read_item: ReadItem) -> torch.Tensor:
        entry = self._entries.get(read_item.dest_index.fqn)
        if entry is None:
            return self.planner.resolve_tensor(read_item)
        return place_in(local(entry.value), read_item)

    def commit_tensor(self, read_item: ReadItem, tensor: torch.Tensor) -> None:
        if read_item.dest_index.fqn not in self._entries:
            self.planner.commit_tensor(read_item, tensor)

    @contextmanager
    def _taken_out(self) -> Iterator[None]:
        """Take the entries out of the state dict, whose dicts the other planner may write to.

        A copy would not do: what that planner reads into it would be lost.
        """
        for entry in self._entries.values():
            entry.take_out()
        try:
            yield
        finally:
            for entry in self._entries.values():
                entry.put_in()


# A hook that a later torch adds to LoadPlanner: the class above would inherit it from there. A
# property without a getter leaves it to __getattr__.
for _name in dir(LoadPlanner):
    if not _name.startswith("_") and _name not in vars(RNGLoadPlanner):
        setattr(RNGLoadPlanner, _name, property())


def _is_ours(name: str) -> bool:
    return is_name(name) or is_name(name, POSITION_KEY)


def _find(value: Any, path: _Path = ()) -> Iterator[tuple[str, _Path]]:
    """Find the tensors with a record's name, with the keys that DCP's planners give them."""
    if any(container is value for container, _ in path):
        return  # it contains itself
    values = value if isinstance(value, list) else value.values()
    # By type: a loader's list of a million numbers is looked at in a few milliseconds.
    nested = {t for t in set(map(type, values)) if issubclass(t, (list, MutableMapping))}
    if isinstance(value, MutableMapping):
        for key, inner in value.items():
            if isinstance(key, str) and _is_ours(key) and isinstance(inner, torch.Tensor):
                here = (*path, (value, key))
                yield ".".join(str(key) for _, key in here), here
    if nested:
        for key, inner in enumerate(value) if isinstance(value, list) else value.items():
            if type(inner) in nested:
                yield from _find(inner, (*path, (value, key)))


def _entry(path: _Path) -> _Entry | None:
    """Return the RNG entry at a path, or ``None`` for a weight that happens to have its name."""
    container, key = path[-1]
    value = container[key]
    try:
        if base_of(key) == POSITION_KEY:
            positions = [marked_position(position) for position in positions_in(local(value))]
            unread, generators = [position.to_tensor() for position in positions], []
        else:
            records = [Record.from_tensor(tensor) for tensor in records_in(local(value))]
            unread = [marked(record).to_tensor() for record in records]
            generators = list(records[0].streams)
    except RNGStateError:
        return None
    return _Entry(path, value, unread, generators, Wanted.of(value))
