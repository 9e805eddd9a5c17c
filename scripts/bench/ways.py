"""Ways to keep RNG state with a DCP checkpoint, and the plain capture that others use."""

from __future__ import annotations

import pickle
import random
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


class Alone:
    """Model and optimizer, no streams."""

    def save(self, app: Stateful, folder: Path) -> None:
        dcp.save({"app": app}, checkpoint_id=folder)

    def load(self, app: Stateful, folder: Path) -> None:
        dcp.load({"app": app}, checkpoint_id=folder)


class Record:
    """``StatefulRNG`` beside model and optimizer."""

    def __init__(self) -> None:
        self.rng = StatefulRNG(seed=0, ranked=True)

    def save(self, app: Stateful, folder: Path) -> None:
        dcp.save({"app": app, "rng": self.rng}, checkpoint_id=folder)

    def load(self, app: Stateful, folder: Path) -> None:
        dcp.load({"app": app, "rng": self.rng}, checkpoint_id=folder)


class FilePerRank:
    """One ``torch.save`` file per rank beside the checkpoint, as NeMo Automodel does."""

    def save(self, app: Stateful, folder: Path) -> None:
        dcp.save({"app": app}, checkpoint_id=folder)
        (folder / "rng").mkdir(exist_ok=True)
        torch.save(plain_capture(), self._file(folder))
        dist.barrier()

    def load(self, app: Stateful, folder: Path) -> None:
        dcp.load({"app": app}, checkpoint_id=folder)
        plain_restore(torch.load(self._file(folder), weights_only=False))

    def _file(self, folder: Path) -> Path:
        return folder / "rng" / f"rank_{dist.get_rank()}.pt"


class Gathered:
    """Every rank's pickled streams, gathered into one entry on all ranks, as Composer does."""

    def save(self, app: Stateful, folder: Path) -> None:
        states: list[bytes | None] = [None] * dist.get_world_size()
        dist.all_gather_object(states, pickle.dumps(plain_capture()))
        dcp.save({"app": app, "rng": states}, checkpoint_id=folder)

    def load(self, app: Stateful, folder: Path) -> None:
        checkpoint: dict[str, Any] = {"app": app, "rng": [None] * dist.get_world_size()}
        dcp.load(checkpoint, checkpoint_id=folder)
        plain_restore(pickle.loads(checkpoint["rng"][dist.get_rank()]))


class RankNamed:
    """Keys that carry the rank, of which every rank passes its own."""

    def save(self, app: Stateful, folder: Path) -> None:
        dcp.save({"app": app, "rng": rank_named(dist.get_rank())}, checkpoint_id=folder)

    def load(self, app: Stateful, folder: Path) -> None:
        rank = dist.get_rank()
        checkpoint: dict[str, Any] = {"app": app, "rng": rank_named(rank)}
        dcp.load(checkpoint, checkpoint_id=folder)
        plain_restore(checkpoint["rng"][f"rank_{rank}"])


class OneNumber:
    """No streams, but one number a rank, in an object whose DTensor is made when DCP asks for it.

    That is the least that a ``Stateful`` of a value per rank costs.
    """

    def __init__(self) -> None:
        self._number = torch.zeros(1)

    def state_dict(self) -> dict[str, Any]:
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        return {"number": DTensor.from_local(self._number, mesh, [Shard(0)], run_check=False)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._number = state["number"].to_local()

    def save(self, app: Stateful, folder: Path) -> None:
        dcp.save({"app": app, "one": self}, checkpoint_id=folder)

    def load(self, app: Stateful, folder: Path) -> None:
        dcp.load({"app": app, "one": self}, checkpoint_id=folder)


class OneTensor:
    """No streams, but one tensor more of one number a rank, which is there like a weight."""

    def __init__(self) -> None:
        self._state = OneNumber().state_dict()

    def save(self, app: Stateful, folder: Path) -> None:
        dcp.save({"app": app, **self._state}, checkpoint_id=folder)

    def load(self, app: Stateful, folder: Path) -> None:
        dcp.load({"app": app, **self._state}, checkpoint_id=folder)


def rank_named(rank: int) -> dict[str, Any]:
    """Return the plain capture under a key of the rank's own."""
    return {f"rank_{rank}": plain_capture()}
