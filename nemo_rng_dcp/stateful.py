"""``StatefulRNG``: what ``dcp.save`` and ``dcp.load`` see."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Mapping
from typing import Any, Literal, NoReturn, SupportsIndex, overload

import torch
from torch.distributed.device_mesh import DeviceMesh

from nemo_rng_dcp import peers, snapshot
from nemo_rng_dcp.adapters import GeneratorAdapter
from nemo_rng_dcp.errors import RNGStateError
from nemo_rng_dcp.generators import global_generators, registered_generators
from nemo_rng_dcp.layout import Layout, global_rank, source_row, world_size
from nemo_rng_dcp.origin import ORIGIN, Origin
from nemo_rng_dcp.rows import check_row, fingerprint, fork_seed, is_sealed, seal, unseal
from nemo_rng_dcp.seeding import check_ranked, check_seed, seed_all
from nemo_rng_dcp.snapshot import RNGState


class StatefulRNG:
    """The random streams of every rank, as one entry of a DCP checkpoint.

    Construction seeds the global generators: Python's ``random``, NumPy's, torch CPU's and the
    accelerator's. Pass the object to ``dcp.save`` and ``dcp.load`` beside model and optimizer; each
    rank then gets its own streams back, bit for bit, in the process that saved or in a new one.

    What is promised about the moment: a checkpoint holds the streams as they are when DCP calls
    :meth:`state_dict`, and after a load they are as they were then when DCP calls
    :meth:`load_state_dict`. ``dcp.save`` asks its entries in the order of the dict, ``dcp.load``
    restores them in alphabetical order of their keys. An entry that itself draws random numbers
    while it is saved should therefore come before this one in the dict; one that draws while it
    is loaded moves the streams again unless :meth:`rewind` is called after ``dcp.load``.

    Construct it after ``init_process_group``. Under torchrun it may come before, since ``RANK``
    tells the rank.

    It stands for the streams of this process, so it cannot be copied or pickled: hand its
    :meth:`state_dict` on instead. Threads may use it at the same time: each state taken or restored
    is whole, but what other threads draw meanwhile is theirs to keep in order.

    Args:
        seed: An integer (NumPy's too, ``bool`` not), ``0 <= seed`` and ``seed + row < 2**32``; the
            same on every rank.
        ranked: Add the row number (without a mesh: the global rank) to the seed, so that ranks
            draw different numbers.
        mesh: The (sub)mesh along which streams differ: one row per coordinate, numbered
            row-major, and ranks of the same coordinate share a stream. ``None``: one row per
            global rank.
        generators: Generators that the job draws from beside the global ones, by the name of
            their table; the same names on every rank. Accepted are ``torch.Generator`` on any
            device, ``numpy.random.Generator`` over any bit generator that NumPy ships,
            ``numpy.random.RandomState``, ``random.Random``, and objects with the methods of
            ``adapters.GeneratorAdapter``. They are not seeded here, and restored in place:
            whoever holds one sees the restored stream.

    Raises:
        ValueError: The seed is no integer or out of range; this rank is not in ``mesh``; or a
            generator's name is no identifier or taken, or it is registered twice. Nothing was
            seeded.
        TypeError: ``ranked`` is no bool, ``mesh`` no DeviceMesh, ``generators`` no mapping, or a
            generator is of another kind. Nothing was seeded.

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
    ) -> None:
        self.ranked = check_ranked(ranked)
        self._registered = registered_generators({} if generators is None else generators)
        if mesh is not None and not isinstance(mesh, DeviceMesh):
            raise TypeError(f"mesh is {mesh!r}, expected a DeviceMesh or None")
        self.mesh = mesh
        self._seeded_row = self._row_number()
        check_seed(seed, self._seeded_row if ranked else 0)
        self.seed = int(seed)
        self._resizes = 0
        # What state_dict() gave last, for a load, which DCP begins and ends on one thread.
        self._given = threading.local()
        self._loaded: dict[str, torch.Tensor] | None = None
        seed_all(self.seed + (self._seeded_row if ranked else 0))

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Return this rank's row of every table; moves no stream and does not communicate.

        Every rank of the default process group must call it, as DCP does.

        Returns:
            By table name an int64 tensor of shape ``(rows, n)``, a DTensor sharded on dim 0 (a
            plain tensor without a process group): ``origin`` (n = 13), ``python`` (628),
            ``numpy`` (628), ``torch`` (633); with an accelerator its device type (``cuda``: 3);
            and every registered generator under its name. The last element of a row is its check
            word.

        Raises:
            RNGStateError: NumPy's global generator does not run MT19937.
            RuntimeError: The streams were seeded, or would be stored, for another rank than this
                process's.
        """
        layout = self._layout()
        contents, rows = seal(layout.row, snapshot.read(self._generators()))
        self._given.contents = contents
        origin = Origin.here(
            row=layout.row,
            rows=layout.rows,
            world_size=world_size(),
            seed=self.seed,
            ranked=self.ranked,
            resizes=self._resizes,
            contents=contents,
        )
        return layout.tables({ORIGIN: origin.to_row(), **rows})

    def load_state_dict(self, state_dict: Mapping[str, torch.Tensor] | RNGState) -> None:
        """Put every stream of this rank back to where ``state_dict`` has it; all or nothing.

        Does not communicate. Under DCP every rank calls it with its own rows. A table that the
        checkpoint lacked is told by what :meth:`state_dict` gave this thread last, so a load begins
        and ends on one thread, as DCP's does.

        Args:
            state_dict: What :meth:`state_dict` gave, with DTensors or with whole plain tensors of
                shape ``(rows, n)``; or an ``RNGState``, whose streams become this rank's.

        Raises:
            RNGStateError: A table is missing, unexpected, of another dtype or shape, altered, of
                another rank or generator, or out of range. No stream of this rank has moved.
            TypeError: ``state_dict`` is neither a mapping nor an ``RNGState``.
            RuntimeError: As for :meth:`state_dict`.
        """
        if isinstance(state_dict, RNGState):
            # It knows the global streams only; registered ones stay as they are.
            registered = snapshot.read(self._registered)
            states = snapshot.states_of(state_dict)
            self._loaded = {**snapshot.restore(global_generators(), states), **registered}
            return
        if not isinstance(state_dict, Mapping):
            raise TypeError(
                f"the state is a {type(state_dict).__name__}, expected a mapping or an RNGState"
            )
        layout = self._layout()
        rows = layout.own_rows(state_dict)
        origin = _own_origin(layout, rows)
        states, absent = self._unsealed(layout, origin, rows)
        resizes = origin.resizes_on(layout.rows)
        seeds = {}
        if origin.forks(layout.row, self.ranked):
            for name in states.keys() - absent:
                seeds[name] = fork_seed(name, layout.row, resizes, states[name])
        skew = origin.version_skew()
        if skew and global_rank() == 0:
            # Before the restore: where warnings are errors, nothing may have moved by then.
            warnings.warn(
                f"the RNG state was saved with {'; '.join(skew)}: the streams continue, but what a "
                "library makes of them may have changed",
                stacklevel=2,
            )
        self._loaded = snapshot.restore(self._generators(), states, seeds)
        self._resizes = resizes

    def rewind(self) -> None:
        """Put every stream back to where the last load left it; does not communicate.

        Whatever draws between ``dcp.load`` and the next training step would otherwise move the
        streams: a fresh ``iter(dataloader)``, or another entry of the checkpoint that draws in its
        ``load_state_dict``.

        Raises:
            RuntimeError: Nothing has been loaded yet.
        """
        if self._loaded is None:
            raise RuntimeError("rewind() goes back to the last load, and nothing was loaded yet")
        snapshot.restore(self._generators(), self._loaded)

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
            RNGStateError: NumPy's global generator does not run MT19937.
            RuntimeError: With ``gather``, as for :meth:`state_dict`.
        """
        states = snapshot.read(self._generators())
        if gather:
            return peers.fingerprints(self._layout().row, states)
        return {name: fingerprint(state) for name, state in states.items()}

    def verify_shared(self) -> None:
        """Make sure that ranks which share a row are in the same state; moves no stream.

        A collective: every rank of the default process group must call it, with the same
        generators. It costs one all-gather of 8 bytes per generator and rank. A checkpoint holds
        a shared row once, so peers that drifted apart would come back as one of them; call this
        before a save, or when debugging.

        Raises:
            RNGStateError: Ranks that share a row differ; on every rank, naming the ranks and the
                generators. Also as for :meth:`state_dict`, on the rank concerned.
        """
        row = self._layout().row
        drifted = peers.drifted(row, snapshot.read(self._generators()))
        if drifted:
            raise RNGStateError(
                "; ".join(drifted) + ". A draw happened on some of them only, or the mesh given "
                "to StatefulRNG is not the one along which streams differ."
            )

    def __reduce_ex__(self, protocol: SupportsIndex) -> NoReturn:
        raise TypeError(
            "a StatefulRNG stands for the random streams of its process and cannot be copied or "
            "pickled: pass its state_dict() on, or construct one in the other process"
        )

    def _generators(self) -> dict[str, GeneratorAdapter]:
        return {**global_generators(), **self._registered}

    def _row_number(self) -> int:
        """Return the row that this process must own, with or without a process group."""
        return global_rank() if self.mesh is None else Layout.current(self.mesh).row

    def _layout(self) -> Layout:
        """Return the layout, after making sure that it gives this process the streams it has."""
        layout = Layout.current(self.mesh)
        own_row = self._row_number()
        if self.ranked and self._seeded_row != own_row:
            raise RuntimeError(
                f"this StatefulRNG was seeded for rank {self._seeded_row}, but the process is "
                f"rank {own_row}: construct it after init_process_group"
            )
        if layout.row != own_row:
            raise RuntimeError(
                f"this process is rank {own_row} (RANK), but without a process group its streams "
                f"would be stored as rank {layout.row}'s: call init_process_group, and construct "
                "StatefulRNG after init_process_group"
            )
        return layout

    def _unsealed(
        self, layout: Layout, origin: Origin, rows: Mapping[str, torch.Tensor]
    ) -> tuple[dict[str, torch.Tensor], set[str]]:
        """Return the states in rows, and the names of those that the checkpoint lacks."""
        states, absent = {}, set()
        given = getattr(self._given, "contents", None)
        for name, row in rows.items():
            check_row(name, row)
            try:
                states[name] = unseal(name, origin.row, origin.contents, row)
            except RNGStateError:
                if given is None or not is_sealed(name, layout.row, given, row):
                    raise
                # DCP left in it what state_dict() had put there.
                states[name] = row[:-1].clone()
                absent.add(name)
        return states, absent


def _own_origin(layout: Layout, rows: dict[str, torch.Tensor]) -> Origin:
    """Take the origin out of ``rows`` and make sure that they are for this process."""
    if ORIGIN not in rows:
        raise RNGStateError(
            f"{ORIGIN}: the state has no such table, only {sorted(rows)}; it is no state of a "
            "StatefulRNG"
        )
    origin = Origin.from_row(rows.pop(ORIGIN))
    source = source_row(layout.row, origin.rows)
    if origin.row != source:
        raise RNGStateError(
            f"{ORIGIN}: row {layout.row} of {layout.rows} was given row {origin.row} of "
            f"{origin.rows}, expected row {source}. Give each rank its own rows: "
            "load with dcp.load, not from another rank's state_dict()."
        )
    return origin
