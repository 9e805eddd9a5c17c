"""Ways to keep RNG state with a DCP checkpoint, and the plain capture that others use."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.stateful import Stateful
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from nemo_rng_dcp import StatefulRNG
from nemo_rng_dcp.table import local


def plain_capture() -> dict[str, Any]:
    """Return the three global streams as frameworks take them: primitives and tensors."""
    state = np.random.get_state()
    assert isinstance(state, tuple)
    algorithm, keys, *rest = state
    return {
        "python": random.getstate(),
        # As int32, because torch cannot pickle uint32 tensors.
        "numpy": (algorithm, torch.from_numpy(keys.view(np.int32)), *rest),
        "torch": torch.get_rng_state(),
    }


def plain_restore(state: dict[str, Any]) -> None:
    """Put the streams back to where :func:`plain_capture` found them; checks nothing."""
    algorithm, keys, *rest = state["numpy"]
    random.setstate(state["python"])
    np.random.set_state((algorithm, keys.numpy().view(np.uint32), *rest))
    torch.set_rng_state(state["torch"])


class Way(Protocol):
    """Save and load model, optimizer and streams. Every rank calls both, with the same folder."""

    def save(self, app: Stateful, folder: Path) -> None: ...

    def load(self, app: Stateful, folder: Path) -> None: ...


class Beside:
    """Entries of the checkpoint beside model and optimizer.

    Args:
        make: Makes one.
        copies: How many. One may take less than the noise.
    """

    def __init__(self, make: Callable[[], Any], copies: int) -> None:
        self.entries = {f"entry{number}": make() for number in range(copies)}

    def save(self, app: Stateful, folder: Path) -> None:
        dcp.save({"app": app, **self.entries}, checkpoint_id=folder)

    def load(self, app: Stateful, folder: Path) -> None:
        dcp.load({"app": app, **self.entries}, checkpoint_id=folder)


def alone(copies: int) -> Beside:
    """Model and optimizer, no streams."""
    return Beside(dict, copies=0)


def stateful_rng(copies: int) -> Beside:
    """``StatefulRNG``."""
    return Beside(partial(StatefulRNG, seed=0, ranked=True), copies)


def existing_tensor(copies: int) -> Beside:
    """No streams, but a tensor as large as the record, sharded and there already, like a weight."""
    return Beside(sharded_tensor, copies)


def least(copies: int) -> Beside:
    """What captures and restores streams by hand, beside a tensor that exists."""
    return Beside(Least, copies)


class FilePerRank:
    """One ``torch.save`` file per rank beside the checkpoint, as NeMo Automodel does."""

    def __init__(self, copies: int) -> None:
        self._copies = range(copies)

    def save(self, app: Stateful, folder: Path) -> None:
        dcp.save({"app": app}, checkpoint_id=folder)
        (folder / "rng").mkdir(exist_ok=True)
        for copy in self._copies:
            torch.save(plain_capture(), self._file(folder, copy))
            dist.barrier()

    def load(self, app: Stateful, folder: Path) -> None:
        dcp.load({"app": app}, checkpoint_id=folder)
        for copy in self._copies:
            plain_restore(torch.load(self._file(folder, copy), weights_only=False))

    def _file(self, folder: Path, copy: int) -> Path:
        return folder / "rng" / f"rank_{dist.get_rank()}_{copy}.pt"


class Gathered:
    """Every rank's streams, gathered to all ranks and written by rank 0 into one file."""

    def __init__(self, copies: int) -> None:
        self._copies = range(copies)

    def save(self, app: Stateful, folder: Path) -> None:
        dcp.save({"app": app}, checkpoint_id=folder)
        for copy in self._copies:
            states: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(states, plain_capture())
            if dist.get_rank() == 0:
                torch.save(states, self._file(folder, copy))
            dist.barrier()

    def load(self, app: Stateful, folder: Path) -> None:
        dcp.load({"app": app}, checkpoint_id=folder)
        for copy in self._copies:
            states = torch.load(self._file(folder, copy), weights_only=False)
            plain_restore(states[dist.get_rank()])

    def _file(self, folder: Path, copy: int) -> Path:
        return folder / f"rng_{copy}.pt"


class RankNamed:
    """Keys that carry the rank, of which every rank passes its own."""

    def __init__(self, copies: int) -> None:
        self._copies = range(copies)

    def save(self, app: Stateful, folder: Path) -> None:
        dcp.save({"app": app, **self._named()}, checkpoint_id=folder)

    def load(self, app: Stateful, folder: Path) -> None:
        named = self._named()
        dcp.load({"app": app, **named}, checkpoint_id=folder)
        for streams in named.values():
            plain_restore(streams[f"rank_{dist.get_rank()}"])

    def _named(self) -> dict[str, Any]:
        return {f"entry{copy}": rank_named(dist.get_rank()) for copy in self._copies}


class Least:
    """The least that an object which gives and takes streams costs beside an existing tensor.

    It captures and restores by hand, and stores nothing of that. A load asks it for its state, too,
    and to be able to undo a restore it has to capture once more.
    """

    def __init__(self) -> None:
        self._state = {"tensor": sharded_tensor()}
        self._streams = plain_capture()

    def state_dict(self) -> dict[str, Any]:
        self._streams = plain_capture()
        return self._state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        plain_capture()
        plain_restore(self._streams)


def record() -> torch.Tensor:
    """Return this rank's record of the global streams."""
    [table] = StatefulRNG(seed=None, ranked=True).state_dict().values()
    return local(table)


def sharded_tensor() -> DTensor:
    """Return a tensor of which each rank has as many bytes as a record."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    return DTensor.from_local(torch.zeros_like(record()), mesh, [Shard(0)], run_check=False)


def rank_named(rank: int) -> dict[str, Any]:
    """Return the plain capture under a key of the rank's own."""
    return {f"rank_{rank}": plain_capture()}
