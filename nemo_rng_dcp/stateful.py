"""``StatefulRNG``: what ``dcp.save`` and ``dcp.load`` see."""

from __future__ import annotations

import time
import weakref
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Literal, NoReturn, SupportsIndex, overload

import torch
import torch.distributed as dist
from torch.distributed.checkpoint import StorageReader, StorageWriter
from torch.distributed.device_mesh import DeviceMesh

from nemo_rng_dcp import standalone
from nemo_rng_dcp.automodel import RNGState, is_automodel_state, packed_states
from nemo_rng_dcp.errors import RNGStateError, warn
from nemo_rng_dcp.first_forward import rewind_at_first_forward
from nemo_rng_dcp.generators import DeviceWatch, GeneratorSet, States, own_device
from nemo_rng_dcp.rank_streams import RankStreams
from nemo_rng_dcp.ranks import (
    drifted,
    gather_fingerprints,
    global_rank,
    launched_processes,
    world_size,
)
from nemo_rng_dcp.record import KEY, Record, Stream, fingerprint
from nemo_rng_dcp.resume import Job, Loaded, resume
from nemo_rng_dcp.seeding import (
    check_logical_ranks,
    check_ranked,
    check_seed,
    derive_seed,
    seed_all,
)
from nemo_rng_dcp.table import NOT_SAVED, Rows, rows_text


class StatefulRNG:
    """The random streams of every rank, as one entry of a DCP checkpoint.

    Construction seeds the global generators: Python's ``random``, NumPy's, torch CPU's and those
    of all accelerator devices, of which one is this rank's own (``device``). Pass the object to
    ``dcp.save`` and ``dcp.load`` beside model and optimizer; each rank then gets its own streams
    back, bit for bit, in the process that saved or in a new one.

    What is promised about the moment: a checkpoint holds the streams as they are when DCP calls
    :meth:`state_dict`, and after a load they are as they were then when DCP calls
    :meth:`load_state_dict`. ``dcp.save`` asks its entries in the order of the dict, ``dcp.load``
    restores them in alphabetical order of their keys. An entry that itself draws random numbers
    while it is saved should therefore come before this one in the dict; one that draws while it
    is loaded moves the streams again unless :meth:`rewind` is called after ``dcp.load``.

    Construct it after ``init_process_group``. Under torchrun it may come before, since ``RANK``
    tells the rank.

    It owns this process's streams, so it cannot be copied or pickled: hand its
    :meth:`state_dict` on instead. Threads may use it at the same time: each state taken or restored
    is whole. Draws of other threads are not synchronised.

    Args:
        seed: An integer (NumPy's too, ``bool`` not), ``0 <= seed`` and ``seed + row < 2**32``; the
            same on every rank.
        ranked: Add the row number (without a mesh: the global rank) to the seed, so that ranks
            draw different numbers.
        mesh: The (sub)mesh along which streams differ: one row per coordinate, numbered
            row-major, and ranks of the same coordinate share a stream. ``None``: one row per
            global rank.
        generators: Generators that the job draws from beside the global ones, one stream per row,
            by name; the same names and kinds on every rank. Accepted are ``torch.Generator`` on any
            device, ``numpy.random.Generator`` over any bit generator that NumPy ships,
            ``numpy.random.RandomState``, ``random.Random``, and objects with the methods of
            ``generators.GeneratorAdapter``. They are not seeded here, and restored in place:
            whoever holds one sees the restored stream. On a new row they start a new stream.
        shared_generators: The same for generators that are alike on all ranks, such as a sampler's
            shuffle. On a new row they continue as saved.
        global_generators: ``False`` leaves the global generators alone: nothing is seeded, and only
            the registered ones are stored. A job whose streams differ along several meshes has one
            ``StatefulRNG`` for each, all but one with ``False``.
        device: The accelerator device whose global generator is this rank's: stored, restored and
            used from every thread. Also its index. ``None``: the one that is current now, in this
            thread, so choose it before (``torch.cuda.set_device``). ``"cpu"``: this rank uses none.
            A rank that draws on more devices registers the generators of the others.

    Raises:
        ValueError: The seed is no integer or out of range; this rank is not in ``mesh``; this
            process has no such ``device``; or a generator's name is no identifier or taken, or it
            is registered twice. Nothing was seeded.
        TypeError: ``ranked`` or ``global_generators`` is no bool, ``mesh`` no DeviceMesh, the
            generators no mapping, or a generator is of another kind. Nothing was seeded.

    Example:
        >>> import tempfile, torch
        >>> import torch.distributed.checkpoint as dcp
        >>> rng = StatefulRNG(seed=42, ranked=True)
        >>> with tempfile.TemporaryDirectory() as path:
        ...     _ = dcp.save({"rng": rng}, checkpoint_id=path)
        ...     expected = torch.rand(3)
        ...     dcp.load({"rng": rng}, checkpoint_id=path)
        >>> torch.equal(torch.rand(3), expected)
        True
    """

    use_distributed_checkpointing = True
    """Tells NeMo Automodel's recipes to send the object through DCP, not through torch.save."""

    def __init__(
        self,
        seed: int,
        ranked: bool = False,
        *,
        mesh: DeviceMesh | None = None,
        generators: Mapping[str, Any] | None = None,
        shared_generators: Mapping[str, Any] | None = None,
        global_generators: bool = True,
        device: torch.device | str | int | None = None,
        logical_ranks: int | None = None,
    ) -> None:
        self.ranked = check_ranked(ranked)
        self.logical_ranks = check_logical_ranks(logical_ranks, ranked)
        """The number that was given; ``None``: each process is one rank."""
        if not isinstance(global_generators, bool):
            raise TypeError(f"global_generators is {global_generators!r}, expected True or False")
        self._generators = GeneratorSet(
            own_device(device),
            generators,
            shared_generators,
            global_generators=global_generators,
        )
        if mesh is not None and not isinstance(mesh, DeviceMesh):
            raise TypeError(f"mesh is {mesh!r}, expected a DeviceMesh or None")
        self.mesh = mesh
        own = self._own_rows()
        check_seed(seed, own[-1] if ranked else 0)
        self.seed = int(seed)
        self._resizes = 0
        # The tables that state_dict() handed out and that are still in use, by their time.
        self._handed_out: weakref.WeakValueDictionary[int, torch.Tensor] = (
            weakref.WeakValueDictionary()
        )
        self._loaded_states: Mapping[int, States] | None = None
        self.loaded: Loaded | None = None
        """What the last load restored, with its rows, world size and time; ``None``: nothing."""
        self._streams = RankStreams(self._generators, own, logical=logical_ranks is not None)
        for rank in reversed(own):
            with self._streams.as_rank(rank):
                self._seed(rank)
        watched = self.device if global_generators else None
        self._watch = DeviceWatch(watched, {} if watched is None else self._streams.take())

    @property
    def device(self) -> torch.device | None:
        """The accelerator device whose global generator is this rank's; ``None``: it uses none."""
        return self._generators.device

    @property
    def ranks(self) -> range:
        """The logical ranks that this process plays; without ``logical_ranks`` its own row."""
        return self._streams.ranks

    @property
    def rank(self) -> int:
        """The one of :attr:`ranks` whose streams the generators have now."""
        return self._streams.rank

    def as_rank(self, rank: int) -> AbstractContextManager[None]:
        """Give all generators the streams of a logical rank; does not communicate.

        Afterwards they have those of the rank before, whatever ended the block. Outside they are
        those of the first of :attr:`ranks`. It may be nested, and ranks may be entered in any
        order. A save or a load inside is that of all ranks. Where each process is one rank,
        nothing changes, so one loop serves both::

            for r in rng.ranks:
                with rng.as_rank(r):
                    (model(batch_of(r)) / 8).backward()

        Args:
            rank: One of :attr:`ranks`.

        Raises:
            ValueError: This process does not play that rank; the message names those that it plays.
            RNGStateError: A generator did not take its state; the streams are as they were. Or a
                shared generator was drawn from outside, while ranks had different streams of it.
        """
        return self._streams.as_rank(rank)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Return this rank's record as its row of a table; moves no stream.

        Every rank of the default process group must call it, as DCP does. It does not communicate.

        Returns:
            ``{"rng_streams": table}``: int64, shape ``(rows * length,)``, a DTensor sharded on dim
            0 of which each rank has its row (a plain tensor without a process group). The record is
            described in ``record.py``.

        Warns:
            RNGStateWarning: Another accelerator device is current than this object's; or other code
                gave it another stream, as torch's DTensor does. The message has the remedy.

        Raises:
            RNGStateError: A generator cannot be stored, such as NumPy's global one if it does not
                run MT19937.
            RuntimeError: The streams were seeded, or would be stored, for another rank than this
                process's.
        """
        rows = self._rows()
        self._watch.warn_if_another_is_current()
        states = self._streams.take()
        # Of several processes with row 1 or the like, all are alike.
        self._watch.warn_if_reseeded(states, speaks=rows.own.start == len(rows.own))
        self._warn_in_a_scope("the record holds")
        self._warn_of_exchanged_generators()
        self._warn_if_drawn_outside()
        slots, taken_at = self._generators.slots, time.time_ns()
        records = [
            Record(
                row=row,
                rows=rows.count,
                world_size=world_size(),
                seed=self.seed,
                ranked=self.ranked,
                resizes=self._resizes,
                taken_at=taken_at,
                mesh=rows.mesh_sizes,
                streams={
                    name: Stream(slots[name].kind, slots[name].shared, state)
                    for name, state in self._generators.pack(of_row).items()
                },
            ).to_tensor()
            for row, of_row in states.items()
        ]
        table = rows.table(records)
        self._handed_out[taken_at] = table
        return {KEY: table}

    def load_state_dict(self, state_dict: Mapping[str, Any] | RNGState) -> None:
        """Put every stream of this rank back to where ``state_dict`` has it; all or nothing.

        Does not communicate. Under DCP every rank calls it with its own row. What is not put back
        bit for bit is said in one warning, by the ranks of row 0: other rows or another mesh than
        were saved, another ``ranked``, generators that only the checkpoint or only the job has or
        that are shared now or no longer, other versions, another ``PYTHONHASHSEED``. A rank for
        which nothing was loaded at all says so itself, and its streams stay as they are.

        Args:
            state_dict: What :meth:`state_dict` gave, with the row alone or with all rows; or an
                ``RNGState`` or what NeMo Automodel saves, whose streams become this rank's.

        Raises:
            RNGStateError: The record is missing, altered, of a newer layout or of another rank, or
                a generator would not take its state. No stream of this rank has moved.
            TypeError: ``state_dict`` is none of these.
            RuntimeError: As for :meth:`state_dict`.
        """
        if is_automodel_state(state_dict):
            self._load_automodel_state(state_dict)
            return
        if not isinstance(state_dict, Mapping):
            raise TypeError(
                f"the state is a {type(state_dict).__name__}, expected a mapping or an RNGState"
            )
        rows = self._rows()
        if KEY not in state_dict:
            raise RNGStateError(
                f"{KEY}: the state has no such entry, only {sorted(map(str, state_dict))}; it is "
                "no state of a StatefulRNG"
            )
        table = state_dict[KEY]
        records = {} if table is NOT_SAVED else rows.own_records(table)
        if not records or self._is_untouched(records, table):
            warn(
                f"rank {global_rank()}: the load restored no random stream: the checkpoint holds "
                f"no {KEY} for row {rows.row}, or this is what state_dict() has just returned.",
            )
            self.loaded = self._loaded_states = None
            return
        outcomes = {row: resume(record, self._job(row, rows)) for row, record in records.items()}
        self._watch.warn_if_another_is_current()
        # Rows mostly have the same to say.
        remarks = dict.fromkeys(text for outcome in outcomes.values() for text in outcome.remarks)
        if remarks and rows.row == 0:
            # Before the restore: where warnings are errors, nothing may have moved by then.
            warn("RNG state: " + ". ".join(remarks))
        self._restore(
            {row: self._unpacked(row, outcome.states) for row, outcome in outcomes.items()},
            {row: outcome.seeds for row, outcome in outcomes.items()},
        )
        self.loaded, self._resizes = outcomes[rows.row].loaded, outcomes[rows.row].resizes

    def save(
        self,
        path: standalone.CheckpointId = None,
        *,
        storage_writer: StorageWriter | None = None,
    ) -> None:
        """Write the record by itself, for frameworks that own the checkpoint; moves no stream.

        Every rank of the default process group must call it: it is a ``dcp.save`` of this entry
        alone, to a folder of its own.

        Args:
            path: A folder, or what else DCP takes as ``checkpoint_id``. A record saved there
                before is replaced.
            storage_writer: DCP's writer for another storage; ``path`` may then be left out.

        Raises:
            RNGStateError: On every rank: one of them has no record, as for :meth:`state_dict`; the
                folder holds a checkpoint of other things, which would be lost; or the storage
                failed. If that was while records were written, an earlier one is gone as well.
        """
        standalone.save(self.state_dict, path, storage_writer)

    def load(
        self,
        path: standalone.CheckpointId = None,
        *,
        storage_reader: StorageReader | None = None,
        key: str | None = None,
    ) -> None:
        """Restore the streams from any DCP checkpoint with a record in it, on any world size.

        The record is found by its name, alone or beside a model, and nothing else is read. Every
        rank of the default process group must call it: it is a ``dcp.load``. The rules and the
        warnings are those of ``RNGLoadPlanner`` and :meth:`load_state_dict`.

        Args:
            path: A folder, or what else DCP takes as ``checkpoint_id``.
            storage_reader: DCP's reader for another storage; ``path`` may then be left out.
            key: Which record, if the checkpoint holds several; the error that says so lists them.

        Raises:
            RNGStateError: As for :meth:`load_state_dict`; or, on every rank, the checkpoint holds
                no record or several, one of the ranks has no row, or the storage failed. No stream
                of this rank has moved.
        """
        loaded = standalone.load(self.state_dict, path, storage_reader, key)
        self.load_state_dict(loaded)

    def rewind(self) -> None:
        """Put every stream back to where the last load left it; does not communicate.

        Whatever draws between ``dcp.load`` and the next training step would otherwise move the
        streams: a fresh ``iter(dataloader)``, or another entry of the checkpoint that draws in its
        ``load_state_dict``.

        Raises:
            RuntimeError: Nothing has been loaded yet, or the last load restored nothing; or it is
                called inside :meth:`as_rank` of a process that plays several ranks.
        """
        if self._loaded_states is None:
            raise RuntimeError("rewind() goes back to the last load, and nothing was loaded yet")
        if self._streams.is_inside and len(self.ranks) > 1:
            first, last = self.ranks[0], self.ranks[-1]
            raise RuntimeError(
                f"rewind() inside as_rank({self.rank}) would put back the streams of ranks {first} "
                f"to {last}, all of them: call it outside, once"
            )
        self._restore(self._loaded_states)

    def rewind_at_first_forward(self, model: torch.nn.Module | Sequence[torch.nn.Module]) -> None:
        """Rewind once, before the first forward after a load; does not communicate.

        For training loops that are another's, and draw between the load and the first step, such
        as by a fresh ``iter(dataloader)``. It may be called before or after the load, and does
        nothing while nothing was loaded. Call it again for another load.

        Wrong where the loop itself draws for a step before its forward: random augmentation with
        ``num_workers=0``, noise or time steps of a diffusion model. The rewind would repeat these
        numbers. There, call :meth:`rewind` once the data iterator exists. Wrong also after a
        checkpoint from the end of an epoch, if the iterator of the next one draws from the global
        streams: it drew in the uninterrupted run too, so there nothing is to be rewound.

        Args:
            model: The module that the training step calls, such as an FSDP2, DDP or compiled one,
                or a list of such parts, as pipeline schedules have them: the one that runs first
                rewinds. If the step itself is a compiled function, call this before its first run:
                torch does not notice later that a module in it has got a hook.

        Raises:
            TypeError: ``model`` is neither a module with a forward nor a sequence of them.
            RuntimeError: In that forward: it runs inside an activation checkpoint. Checkpoints
                inside the model are fine.
        """
        rewind_at_first_forward(model, lambda: self.loaded is not None, self._rewind)

    @overload
    def fingerprint(self, gather: Literal[False] = False) -> dict[str, str]: ...
    @overload
    def fingerprint(self, gather: Literal[True]) -> list[dict[str, str]]: ...
    def fingerprint(self, gather: bool = False) -> dict[str, str] | list[dict[str, str]]:
        """Return 12 hexadecimal digits for each stream, by generator; moves no stream.

        Two streams with the same digits draw the same numbers from here on. ``nemo-rng-dcp
        inspect`` shows the same digits for a checkpoint.

        Args:
            gather: Return the streams of all rows. Then it is a collective: every rank of the
                default process group must call it, with the same generators. It costs one
                all-gather of 8 bytes per generator and rank.

        Returns:
            This rank's streams, without communication; with ``gather``, on every rank alike, a
            list by row. Of ranks that share a row, the lowest one speaks (see
            :meth:`verify_shared`).

        Raises:
            RNGStateError: As for :meth:`state_dict`.
            RuntimeError: With ``gather``, as for :meth:`state_dict`.
        """
        own = self._fingerprints()
        if not gather:
            return own[self.rank]
        self._rows()
        return gather_fingerprints(own)

    def verify_shared(self) -> None:
        """Make sure that ranks which should have one stream are in the same state.

        These are the ranks that share a row, and all ranks for ``shared_generators`` and, unless
        ``ranked``, for the global generators. Moves no stream. A collective: every rank of the
        default process group must call it, with the same generators. It costs one all-gather of 8
        bytes per generator and rank. A checkpoint holds a shared row once, so peers that drifted
        apart come back as one of them; call this before a save, or when debugging.

        Raises:
            RNGStateError: Ranks differ; on every rank, naming the ranks and the generators. Also
                as for :meth:`state_dict`, on the rank concerned.
        """
        shared = {
            name
            for name, slot in self._generators.slots.items()
            if slot.shared or (slot.is_global and not self.ranked)
        }
        self._rows()
        messages = drifted(self._fingerprints(), shared)
        if messages:
            raise RNGStateError(
                "; ".join(messages) + ". A draw happened on some of them only, or the mesh given "
                "to StatefulRNG is not the one along which streams differ."
            )

    def __reduce_ex__(self, protocol: SupportsIndex) -> NoReturn:
        raise TypeError(
            "a StatefulRNG owns the random streams of its process and cannot be copied or "
            "pickled: pass its state_dict() on, or construct one in the other process. Give "
            "it to dcp.save at the top level of the dict: DCP pickles what lies deeper."
        )

    def _load_automodel_state(self, state: Any) -> None:
        """Restore the global streams, which are all that NeMo Automodel's state knows."""
        if not self._generators.has_global:
            raise RNGStateError(
                "the state is of the global generators, which this StatefulRNG leaves alone "
                "(global_generators=False): load it with the one that stores them"
            )
        if len(self.ranks) > 1 and not self._streams.is_inside:
            raise RNGStateError(
                f"the state is one rank's, and this process plays ranks {self.ranks[0]} to "
                f"{self.ranks[-1]}: load it inside as_rank() of the rank that it belongs to"
            )
        states = self._generators.unpack(packed_states(state, self.device))
        self._watch.warn_if_another_is_current()
        self._restore({self.rank: states})
        self.loaded = Loaded()

    def _seed(self, rank: int) -> None:
        """Start the current rank's streams."""
        slots = self._generators.slots
        if self.logical_ranks is not None:
            own = [name for name, slot in slots.items() if not slot.shared and not slot.is_global]
            seeds = {
                name: derive_seed(self.seed, "logical rank", rank, name, bits=64) for name in own
            }
            self._generators.restore({}, seeds)
        if self._generators.has_global:
            seed_all(self.seed + rank if self.ranked else self.seed)

    def _warn_in_a_scope(self, what: str) -> None:
        place = self._generators.parked_at
        if place is not None:
            warn(
                f"inside the ScopedRNG entered at {place}: {what} the streams that come back when "
                "it ends, not the scope's own"
            )

    def _warn_of_exchanged_generators(self) -> None:
        for name in self._generators.exchanged():
            warn(
                f"{name}: nothing but this StatefulRNG holds the registered generator any more, so "
                "nothing draws from it. If its owner has another one now (copy.deepcopy, "
                "unpickling, a reset), that one is not stored: register a function that returns "
                f"the one in use, such as {name}=lambda: sampler.generator"
            )

    def _rewind(self) -> None:
        assert self._loaded_states is not None
        self._restore(self._loaded_states)

    def _restore(
        self,
        states: Mapping[int, States],
        seeds: Mapping[int, Mapping[str, int]] | None = None,
    ) -> None:
        self._warn_in_a_scope("what is loaded or rewound are")
        self._loaded_states = self._streams.restore(states, seeds)
        self._watch.note_seeds(self._loaded_states)

    def _unpacked(self, row: int, packed: Mapping[str, bytes]) -> States:
        try:
            return self._generators.unpack(packed)
        except RNGStateError as error:
            if len(self.ranks) == 1:
                raise
            raise RNGStateError(f"row {row}: {error}") from error

    def _fingerprints(self) -> dict[int, dict[str, str]]:
        return {
            rank: {
                name: fingerprint(state) for name, state in self._generators.pack(states).items()
            }
            for rank, states in self._streams.take().items()
        }

    def _warn_if_drawn_outside(self) -> None:
        """Warn of draws that another number of processes would not make; once for each."""
        names = sorted(self._streams.drawn_outside)
        if names:
            self._streams.drawn_outside.clear()
            warn(
                f"rank {global_rank()}: {', '.join(names)} drawn from outside of as_rank(), since "
                "the last load or such warning: those numbers were logical rank "
                f"{self.ranks[0]}'s, and would be another one's on another number of processes. "
                "Draw inside as_rank(), or resume on as many processes"
            )

    def _job(self, row: int, rows: Rows) -> Job:
        return Job(
            row,
            rows.count,
            rows.mesh_sizes,
            self.ranked,
            self._generators.slots,
            self.logical_ranks is not None,
        )

    def _is_untouched(self, records: Mapping[int, Record], table: torch.Tensor) -> bool:
        """Return whether DCP left in a table what :meth:`state_dict` had put there.

        The table of an earlier moment may be given back on purpose, and is then restored. While no
        stream has moved, there is nothing to restore either way.
        """
        if self._handed_out.get(next(iter(records.values())).taken_at) is not table:
            return False
        return all(
            {name: stream.state for name, stream in records[row].streams.items()}
            == self._generators.pack(states)
            for row, states in self._streams.take().items()
        )

    def _own_rows(self) -> range:
        """Return the rows that this process must own, with or without a process group."""
        if self.mesh is None and self.logical_ranks is None:
            return range(global_rank(), global_rank() + 1)
        if self.mesh is None and not dist.is_initialized() and launched_processes() > 1:
            raise RuntimeError(
                f"this process is one of {launched_processes()} (WORLD_SIZE), and without a "
                "process group each would play all logical ranks: construct StatefulRNG after "
                "init_process_group"
            )
        return Rows.current(self.mesh, self.logical_ranks).own

    def _rows(self) -> Rows:
        """Return the rows, after making sure that they give this process the streams it has."""
        rows, own = Rows.current(self.mesh, self.logical_ranks), self._own_rows()
        seeded = (self.ranked and self._generators.has_global) or self.logical_ranks is not None
        if self.ranks != own and seeded:
            raise RuntimeError(
                f"this StatefulRNG was seeded for {rows_text(self.ranks)}, but the process has "
                f"{rows_text(own)}: construct it after init_process_group"
            )
        if rows.own != own:
            raise RuntimeError(
                f"this process is rank {own[0]} (RANK), but without a process group its streams "
                f"would be stored as rank {rows.row}'s: call init_process_group, and construct "
                "StatefulRNG after init_process_group"
            )
        if self.ranks != own:
            self._streams.renumber(own[0])
            if self._loaded_states is not None:
                self._loaded_states = dict(zip(own, self._loaded_states.values(), strict=True))
        return rows
