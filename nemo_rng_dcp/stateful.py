"""``StatefulRNG``: what ``dcp.save`` and ``dcp.load`` see."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Literal, NoReturn, SupportsIndex, overload

import torch
import torch.distributed as dist
from torch.distributed.checkpoint import StorageReader, StorageWriter
from torch.distributed.device_mesh import DeviceMesh

from nemo_rng_dcp import standalone
from nemo_rng_dcp.errors import RNGStateError, warn
from nemo_rng_dcp.generators import DeviceWatch, GeneratorSet, States, own_device
from nemo_rng_dcp.grids import Grid
from nemo_rng_dcp.keys import own_key
from nemo_rng_dcp.rank_streams import RankStreams
from nemo_rng_dcp.ranks import (
    Peer,
    drifted,
    fingerprints_by_row,
    gather_peers,
    global_rank,
    launched_processes,
    world_size,
)
from nemo_rng_dcp.recompute import ContextFn, recompute_of
from nemo_rng_dcp.record import Record, Stream, fingerprint
from nemo_rng_dcp.resume import Job, Loaded, Resume, resume
from nemo_rng_dcp.rewinds import Packed, Rewinds
from nemo_rng_dcp.rng_state import RNGState, automodel_states
from nemo_rng_dcp.row_0 import has_its_generators
from nemo_rng_dcp.seeding import (
    check_logical_ranks,
    check_ranked,
    check_seed,
    derive_seed,
    seed_all,
)
from nemo_rng_dcp.table import Rows, rows_text
from nemo_rng_dcp.unread import load_is_asking, marked, was_read


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
    :meth:`state_dict` on instead. Threads and signal handlers may use it at any time: each state
    taken or restored is whole. Draws of other threads are not synchronised.

    The global streams are those of the ``ScopedRNG`` in which it was constructed, if any. Inside a
    further one it acts on the streams that come back at that one's end, and warns.

    Args:
        seed: An integer (NumPy's too, ``bool`` not), ``0 <= seed`` and ``seed + row < 2**32``; the
            same on every rank. ``None``: nothing is seeded, and the streams are taken as a
            framework has seeded them.
        ranked: Add the row number (without a mesh: the global rank) to the seed, so that ranks
            draw different numbers. With ``seed=None`` it says whether the streams differ between
            rows as they are: new rows of a larger job then fork, else they continue as saved.
        mesh: The (sub)mesh along which streams differ: one row per coordinate, numbered
            row-major, and ranks of the same coordinate share a stream. ``None``: one row per
            global rank.
        generators: Generators that the job draws from beside the global ones, one stream per row,
            by name; the same names and kinds on every rank. Accepted are ``torch.Generator`` on any
            device, ``numpy.random.Generator`` over any bit generator that NumPy ships,
            ``numpy.random.RandomState``, ``random.Random``, and objects with the methods of
            ``generators.GeneratorAdapter``. For an owner that exchanges its generator, a function
            that returns the one in use. They are not seeded here, and restored in place:
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
        logical_ranks: How many ranks the streams are for, whatever the number of processes: each
            process plays equally many, one after the other (:attr:`ranks`, :meth:`as_rank`), and
            plain ``dcp.load`` resumes on any number of processes that divides it. Needs ``ranked``.
            With ``mesh``, they are shared out along it. Registered ``generators`` are seeded, by
            ``seed``, rank and name: one object cannot have a state for each rank to start from.
            ``None``: each row is one process's, or one coordinate's of ``mesh``.

    Raises:
        ValueError: The seed is no integer or out of range; this rank is not in ``mesh``; the
            processes cannot play equally many of ``logical_ranks``, or these are not ``ranked``;
            this process has no such ``device``; or a generator's name is no identifier or taken, or
            it is registered twice. Nothing was seeded.
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
        seed: int | None,
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
        self._recompute = recompute_of(self._generators)
        if mesh is not None and not isinstance(mesh, DeviceMesh):
            raise TypeError(f"mesh is {mesh!r}, expected a DeviceMesh or None")
        self.mesh = mesh
        self._grid = None if mesh is None else Grid.of(mesh)
        own = self._own_rows()
        if seed is not None:
            check_seed(seed, own[-1] if ranked else 0)
        elif logical_ranks is not None:
            raise ValueError(
                f"logical_ranks={logical_ranks} needs a seed: a framework seeds one stream for "
                "each process, and not one for each logical rank"
            )
        self.seed = None if seed is None else int(seed)
        self._thread = threading.get_ident()
        self._resizes = 0
        self._rewinds = Rewinds(self._generators, self._restore)
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
            RuntimeError: A ``ScopedRNG`` is open around it: open it inside. Or another thread, or
                another task of asyncio, is inside of another rank.
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
            described in ``record.py``. Where ``mesh`` is no part of a mesh with rank 0, the lowest
            rank of the whole mesh is in the key: ``rng_streams@4``.

        Warns:
            RNGStateWarning: Another accelerator device is current than this object's; other code
                gave it another stream, as torch's DTensor does; a ``ScopedRNG`` has others now;
                nobody else holds a registered generator; or a rewind that
                :meth:`rewind_at_first_forward` was asked for did not happen since the load. The
                message has the remedy.

        Raises:
            RNGStateError: A generator cannot be stored, such as NumPy's global one if it does not
                run MT19937.
            RuntimeError: The streams were seeded, or would be stored, for another rank than this
                process's.
        """
        rows = self._rows()
        self._watch.warn_if_another_is_current()
        is_for_a_load = load_is_asking()
        states = self._streams.take(is_for_a_load=is_for_a_load)
        self._watch.warn_if_reseeded(states, speaks=rows.own.start == len(rows.own))
        packed = {rank: self._generators.pack(of_rank) for rank, of_rank in states.items()}
        packed = self._rewinds.to_save(packed, is_for_a_load)
        if not is_for_a_load:
            self._generators.warn_in_a_scope("the record holds")
            self._generators.warn_of_exchanged()
            self._streams.warn_of_draws_outside()
        records = self._records(rows, packed)
        if is_for_a_load:
            records = [marked(record) for record in records]
        return _table(rows, records)

    def load_state_dict(self, state: Mapping[str, Any] | RNGState) -> None:
        """Put every stream of this rank back to where ``state`` has it; all or nothing.

        Does not communicate. Under DCP every rank calls it with its own row. What is not put back
        bit for bit is said in one warning. Row 0 says what concerns all: other rows or another mesh
        than were saved, another ``ranked`` or ``seed``, generators that are shared now or no
        longer, other versions, another ``PYTHONHASHSEED``. Each row says which generators only the
        checkpoint or only the job has, unless row 0 is known to say the same. A rank for which
        nothing was loaded at all says so itself, and its streams stay as they are.

        Args:
            state: What :meth:`state_dict` gave, with the row alone or with all rows; or an
                ``RNGState`` or what NeMo Automodel saves, whose streams become this rank's.

        Raises:
            RNGStateError: The record is missing, altered, of a newer layout or of another rank, or
                a generator would not take its state. No stream of this rank has moved.
            TypeError: ``state`` is none of these.
            RuntimeError: As for :meth:`state_dict`.
        """
        of_automodel = automodel_states(state, self.device)
        if of_automodel is not None:
            self._load_automodel_state(of_automodel)
            return
        if not isinstance(state, Mapping):
            raise TypeError(
                f"the state is a {type(state).__name__}, expected a mapping or an RNGState"
            )
        rows = self._rows()
        key = own_key(rows.key, [name for name in state if isinstance(name, str)])
        if key is None:
            raise RNGStateError(
                f"{rows.key}: the state has no such entry, only {sorted(map(str, state))}; it is "
                "no state of a StatefulRNG, or of one on another grid of ranks. Give it what was "
                "saved under its own name, such as state['rng'], and not what is around that. RNG "
                "state that other code stored becomes a checkpoint by `nemo-rng-dcp import`."
            )
        records = rows.own_records(state[key])
        # A list: each is asked, as each no is said once.
        were_read = [was_read(record) for record in records.values()]
        if not all(were_read):
            self._note_that_nothing_was_loaded(rows)
            return
        outcomes = {row: resume(record, self._job(row, rows)) for row, record in records.items()}
        states = {row: self._unpacked(row, outcome.states) for row, outcome in outcomes.items()}
        self._watch.warn_if_another_is_current()
        # The rows of a process have the same to say. Before the restore: where warnings are errors,
        # nothing may have moved by then.
        outcome = outcomes[rows.row]
        self._tell(rows, records[rows.row], outcome, state[key])
        self._restore(states, {row: outcome.seeds for row, outcome in outcomes.items()})
        self._rewinds.note_load()
        self.loaded, self._resizes = outcome.loaded, outcome.resizes

    def save(
        self,
        path: standalone.CheckpointId = None,
        *,
        storage_writer: StorageWriter | None = None,
        state: Mapping[str, torch.Tensor] | None = None,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        """Write the record by itself, for frameworks that own the checkpoint; moves no stream.

        Every rank of the process group must call it, with the same path: it is a ``dcp.save`` of
        this entry alone, to a folder of its own. It harms nothing that is there: a record of the
        same generators is replaced, once the new one is whole, and everything else is refused.

        A framework that saves asynchronously tells of it later, on another thread, where the
        streams have gone on. Take the state with the framework's save, and write it then::

            captured = rng.state_dict()
            group = dist.new_group(backend="gloo")  # once: async_save uses the default one
            rng.save(path, state=captured, process_group=group)

        Args:
            path: A folder, or what else DCP takes as ``checkpoint_id``.
            storage_writer: DCP's writer for another storage; ``path`` may then be left out. One
                that names its files itself, such as ``HuggingFaceStorageWriter``, takes an empty
                folder alone. The storage of one that is no ``FileSystemWriter`` cannot be asked:
                give it a new place.
            state: What :meth:`state_dict` gave at the moment that is meant; ``None``: now.
            process_group: The ranks that call it, all that have rows among them; ``None``: the
                default process group. Beside a running ``dcp.async_save`` a group of its own, as
                two saves on one would mix their messages.

        Warns:
            RNGStateWarning: It runs on another thread than the construction, without ``state``.

        Raises:
            RNGStateError: On every rank: one of them has no record, as for :meth:`state_dict`;
                ranks name different paths; the folder holds anything else, or another save runs in
                it; the storage failed; or not all ranks called within the group's time-out. An
                earlier record is still there.
            ValueError: This rank is not in ``process_group``.
        """
        if state is None and threading.get_ident() != self._thread:
            warn(
                "rng.save() runs on another thread than the one that constructed the StatefulRNG, "
                "so the record may be of a later moment than the checkpoint: take captured = "
                "rng.state_dict() with the checkpoint, and rng.save(path, state=captured) here"
            )
        take = self.state_dict if state is None else lambda: state
        standalone.save(take, path, storage_writer, process_group)

    def load(
        self,
        path: standalone.CheckpointId = None,
        *,
        storage_reader: StorageReader | None = None,
        key: str | None = None,
        process_group: dist.ProcessGroup | None = None,
        missing_ok: bool = False,
    ) -> None:
        """Restore the streams from any DCP checkpoint with a record in it, on any world size.

        The record is found by its name, alone or beside a model, and nothing else is read. Every
        rank of the process group must call it: it is a ``dcp.load``. The rules and the warnings are
        those of ``RNGLoadPlanner`` and :meth:`load_state_dict`.

        Args:
            path: A folder, or what else DCP takes as ``checkpoint_id``. Without a record in it, the
                one folder in it that has a record.
            storage_reader: DCP's reader for another storage; ``path`` may then be left out.
            key: Which record, if the checkpoint holds several; the error that says so lists them.
            process_group: The ranks that call it; ``None``: the default process group.
            missing_ok: Go on with the streams as they are, with a warning and ``loaded`` ``None``,
                if there is no checkpoint or none with a record: for checkpoints from before the
                job had a StatefulRNG. A save that was interrupted is an error all the same.

        Raises:
            RNGStateError: As for :meth:`load_state_dict`; or, on every rank, the checkpoint holds
                no record or several, one of the ranks has no row, ranks read different checkpoints,
                the storage failed, or not all ranks called within the group's time-out. No stream
                of this rank has moved.
            ValueError: This rank is not in ``process_group``.
        """

        def table() -> dict[str, torch.Tensor]:
            rows = self._rows()
            return _table(rows, self._records(rows, self._packed(is_for_a_load=True)))

        loaded = standalone.load(
            table,
            self._generators.slots,
            path,
            storage_reader,
            key,
            process_group,
            missing_ok,
        )
        if loaded is None:
            self._note_that_nothing_was_loaded(self._rows())
        else:
            self.load_state_dict(loaded)

    def rewind(self) -> None:
        """Put every stream back to where the last load left it; does not communicate.

        Whatever draws between ``dcp.load`` and the next training step would otherwise move the
        streams: a fresh ``iter(dataloader)``, or another entry of the checkpoint that draws in its
        ``load_state_dict``.

        With logical ranks it puts back the streams of all that this process plays.

        Raises:
            RuntimeError: Nothing has been loaded yet, or the last load restored nothing; or it is
                called inside :meth:`as_rank` of a process that plays several ranks.
        """
        if self._rewinds.states is None:
            raise RuntimeError("rewind() goes back to the last load, and nothing was loaded yet")
        if self._streams.is_inside and len(self.ranks) > 1:
            raise RuntimeError(
                f"rewind() inside as_rank({self.rank}) would put back the streams of ranks "
                f"{self.ranks[0]} to {self.ranks[-1]}, all of them: call it outside, once"
            )
        self._rewinds.rewind()

    def rewind_at_first_forward(
        self,
        model: torch.nn.Module | Sequence[torch.nn.Module],
        *,
        when: Callable[[torch.nn.Module], bool] | None = None,
    ) -> None:
        """Rewind once, before the first training forward after a load; does not communicate.

        A training forward is one with ``model.training``, with gradients enabled, and outside of
        any ``ScopedRNG``: a validation that comes before it does not count, whatever it draws.

        For training loops that are another's, and draw between the load and the first step, such
        as by a fresh ``iter(dataloader)``. It may be called before or after the load, and does
        nothing while nothing was loaded or if :meth:`rewind` was called since. Call it again for
        another load. Where a step never calls the forward of ``model`` (``training_step``,
        ``generate``), no rewind happens: the next save says so (``RNGStateWarning``), and none will
        for this load.

        Wrong where the loop itself draws for a step before its training forward: random
        augmentation with ``num_workers=0``, noise or time steps of a diffusion model, the rollout
        of a reinforcement-learning step. The rewind would repeat these numbers. There, call
        :meth:`rewind` once the data iterator exists. Wrong also after a checkpoint from the end of
        an epoch, if the iterator of the next one draws from the global streams: it drew in the
        uninterrupted run too, so there nothing is to be rewound.

        Args:
            model: The module that the training step calls, such as an FSDP2, DDP or compiled one,
                or a list of such parts, as pipeline schedules have them: the one that runs first
                rewinds, of several calls too. If the step itself is a compiled function, call this
                before its first run: torch does not notice later that a module in it has got a
                hook.
            when: Says instead whether the forward that a module is about to run counts, such as
                ``lambda module: True`` where a step begins with a forward in evaluation and no
                validation comes before.

        Raises:
            TypeError: ``model`` is neither a module with a forward nor a sequence of them.
            RuntimeError: In that forward: it runs inside an activation checkpoint. Checkpoints
                inside the model are fine.
        """
        self._rewinds.first_forward.wait_for(model, when)

    @property
    def recompute(self) -> ContextFn:
        """For activation checkpointing: a recomputation draws what its forward drew.

        ``checkpoint(block, x, use_reentrant=False, context_fn=rng.recompute)``, with the function
        of ``torch.utils.checkpoint``. Every generator of this object then draws the same in the
        recomputation, and is afterwards where it would be without checkpointing; torch alone sees
        to its default generators only. ``preserve_rng_state=False`` may be set beside it.

        Does not communicate. Exceptions pass, with the streams put back. Draws of other threads
        during a recomputation are undone with it. Where ``torch.compile`` traces the checkpoint
        itself, torch has the draws in its graph, and nothing is done here.

        To combine it with another ``context_fn``, such as one of
        ``create_selective_checkpoint_contexts``: ``functools.partial(rng.recompute, context_fn)``.

        Raises:
            RNGStateError: In the forward or the backward: as for :meth:`state_dict`, or a generator
                does not take its state back.
        """
        return self._recompute

    @overload
    def fingerprint(
        self, gather: Literal[False] = False, *, process_group: dist.ProcessGroup | None = None
    ) -> dict[str, str]: ...
    @overload
    def fingerprint(
        self, gather: Literal[True], *, process_group: dist.ProcessGroup | None = None
    ) -> list[dict[str, str]]: ...
    def fingerprint(
        self, gather: bool = False, *, process_group: dist.ProcessGroup | None = None
    ) -> dict[str, str] | list[dict[str, str]]:
        """Return 12 hexadecimal digits for each stream, by generator; moves no stream.

        Two streams with the same digits draw the same numbers from here on. ``nemo-rng-dcp
        inspect`` shows the same digits for a checkpoint.

        Args:
            gather: Return the streams of all rows. Then it is a collective: every rank of the group
                must call it, with generators of the same names. It gathers about 40 bytes per
                generator and rank.
            process_group: The ranks that call it with ``gather``; ``None``: all of the default
                process group.

        Returns:
            The streams of this process's current rank, without communication; with ``gather``, on
            every rank alike, a list by row of this rank's grid (see :meth:`state_dict`). Of ranks
            that share a row, the lowest one speaks (see :meth:`verify_shared`).

        Raises:
            RNGStateError: As for :meth:`state_dict`. With ``gather``, on every rank: one of them
                cannot tell its streams, or has other generators than another rank of its grid. On
                those that called it: others did not, within the group's time-out.
            ValueError: This rank is not in ``process_group``.
        """
        if gather:
            return fingerprints_by_row(gather_peers(self._peers, process_group), self._rows().key)
        return _fingerprints(self._packed()[self.rank])

    def verify_shared(self, *, process_group: dist.ProcessGroup | None = None) -> None:
        """Make sure that ranks which should have one stream are in the same state.

        These are the ranks that share a row, and all ranks for ``shared_generators`` and, unless
        ``ranked``, for the global generators; on several grids (see :meth:`state_dict`), those of
        each by themselves. Moves no stream. A collective: every rank of the group must call it,
        with generators of the same names. It gathers about 40 bytes per generator and rank. A
        checkpoint holds a shared row once, so peers that drifted apart come back as one of them;
        call this before a save, or when debugging.

        Args:
            process_group: The ranks that call it; ``None``: all of the default process group.

        Raises:
            RNGStateError: Ranks differ; on every rank, naming the ranks and the generators. Also
                as for :meth:`fingerprint` with ``gather``.
            ValueError: This rank is not in ``process_group``.
        """
        messages = drifted(gather_peers(self._peers, process_group))
        if messages:
            raise RNGStateError(
                "; ".join(messages) + ". A draw happened on some of them only, or the mesh given "
                "to StatefulRNG is not the one along which streams differ."
            )

    def __reduce_ex__(self, protocol: SupportsIndex) -> NoReturn:
        raise TypeError(
            "a StatefulRNG owns the random streams of its process and cannot be copied or "
            "pickled. In a config or module that is deep-copied: keep it outside. In another "
            "process: construct one there. In a checkpoint: dcp.save calls state_dict() at the top "
            "level of its dict alone; deeper, and for torch.save and the deprecated "
            "save_state_dict, pass rng.state_dict()."
        )

    def _records(self, rows: Rows, packed: Packed) -> list[Record]:
        slots, taken_at = self._generators.slots, time.time_ns()
        return [
            Record(
                row=row,
                rows=rows.count,
                world_size=world_size(),
                seed=self.seed,
                ranked=self.ranked,
                resizes=self._resizes,
                taken_at=taken_at,
                mesh=rows.mesh_sizes,
                parts=rows.parts,
                streams={
                    name: Stream(slots[name].kind, slots[name].shared, state)
                    for name, state in of_rank.items()
                },
            )
            for row, of_rank in packed.items()
        ]

    def _note_that_nothing_was_loaded(self, rows: Rows) -> None:
        self.loaded = self._rewinds.states = None
        warn(
            f"rank {global_rank()}: the load restored no random stream: the checkpoint holds "
            f"no RNG state ({rows.key}) for {rows_text(rows.own)}. The streams stay where they "
            "are, and a job that was just seeded draws its first numbers again: resume once with "
            "another seed, as docs/elastic.md shows under 'A checkpoint without RNG state'"
        )

    def _tell(self, rows: Rows, record: Record, outcome: Resume, table: torch.Tensor) -> None:
        """Warn of what a load does other than restoring, if that is for this row to say."""
        remarks = outcome.remarks
        if rows.row != 0:
            # Row 0 speaks for all, but knows its own generators only. It has these: where others
            # were saved in kind, whose records have another length, it misses them as well.
            changed = sorted(s.kind for s in record.streams.values()) != sorted(
                slot.kind for slot in self._generators.slots.values()
            )
            row_0_says_it = changed and has_its_generators(table)
            remarks = () if row_0_says_it else outcome.of_generators
        if remarks:
            row = f", {rows_text(rows.own)}" if rows.row else ""
            warn(f"RNG state{row}: {'. '.join(remarks)}")

    def _load_automodel_state(self, packed: Mapping[str, bytes]) -> None:
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
        states = self._generators.unpack(packed)
        self._watch.warn_if_another_is_current()
        self._restore({self.rank: states})
        self._rewinds.note_load()
        self.loaded = Loaded()

    def _seed(self, rank: int) -> None:
        """Start the current rank's streams."""
        if self.logical_ranks is not None:
            slots = self._generators.slots.items()
            own = [name for name, slot in slots if not slot.shared and not slot.is_global]
            path = "logical rank", rank
            assert self.seed is not None
            seeds = {name: derive_seed(self.seed, *path, name, bits=64) for name in own}
            self._generators.restore({}, seeds)
        if self._generators.has_global and self.seed is not None:
            seed_all(self.seed + rank if self.ranked else self.seed)

    def _restore(
        self,
        states: Mapping[int, States],
        seeds: Mapping[int, Mapping[str, int]] | None = None,
    ) -> None:
        self._generators.warn_in_a_scope("what is loaded or rewound are")
        self._rewinds.states = self._streams.restore(states, seeds)
        self._watch.note_seeds(self._rewinds.states)

    def _unpacked(self, row: int, packed: Mapping[str, bytes]) -> States:
        try:
            return self._generators.unpack(packed)
        except RNGStateError as error:
            if len(self.ranks) == 1:
                raise
            raise RNGStateError(f"row {row}: {error}") from error

    def _packed(self, *, is_for_a_load: bool = False) -> Packed:
        states = self._streams.take(is_for_a_load=is_for_a_load)
        return {rank: self._generators.pack(of_rank) for rank, of_rank in states.items()}

    def _job(self, row: int, rows: Rows) -> Job:
        return Job(
            row,
            rows.count,
            rows.mesh_sizes,
            self.ranked,
            self._generators.slots,
            parts=rows.parts,
            seed=self.seed,
            logical=self.logical_ranks is not None,
        )

    def _peers(self) -> list[Peer]:
        rows = self._rows()
        shared = {
            name
            for name, slot in self._generators.slots.items()
            if slot.shared or (slot.is_global and not self.ranked)
        }
        return [
            Peer(global_rank(), rows.key, row, _fingerprints(of_rank), shared)
            for row, of_rank in self._packed().items()
        ]

    def _current_rows(self) -> Rows:
        return Rows.current(self.mesh, self._grid, self.logical_ranks)

    def _own_rows(self) -> range:
        """Return the rows that this process must own, with or without a process group."""
        if self.mesh is not None:
            return self._current_rows().own
        if self.logical_ranks is None:
            return range(global_rank(), global_rank() + 1)
        if not dist.is_initialized() and launched_processes() > 1:
            raise RuntimeError(
                f"this process is one of {launched_processes()} (WORLD_SIZE), and without a "
                "process group each would play all logical ranks: construct StatefulRNG after "
                "init_process_group"
            )
        return self._current_rows().own

    def _rows(self) -> Rows:
        """Return the rows, after making sure that they give this process the streams it has."""
        rows, own = self._current_rows(), self._own_rows()
        seeded = self.seed is not None and self.ranked and self._generators.has_global
        if self.ranks != own and (seeded or self.logical_ranks is not None):
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
            if self._rewinds.states is not None:
                [states] = self._rewinds.states.values()
                self._rewinds.states = {own[0]: states}
        return rows


def _table(rows: Rows, records: Sequence[Record]) -> dict[str, torch.Tensor]:
    return {rows.key: rows.table([record.to_tensor() for record in records])}


def _fingerprints(packed: Mapping[str, bytes]) -> dict[str, str]:
    return {name: fingerprint(state) for name, state in packed.items()}
