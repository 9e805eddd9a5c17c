"""Checkpoints for the reading tools, made row by row in one process."""

import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp

from nemo_rng_dcp.origin import Origin
from nemo_rng_dcp.rows import digest, seal
from nemo_rng_dcp.tools.findings import private_generators

States = Mapping[str, torch.Tensor]


def drawn_states(row: int) -> dict[str, torch.Tensor]:
    """Return states that differ between rows and are no seed's."""
    states = {name: state.clone() for name, state in _MOVED.items()}
    for state in states.values():
        state[100] = row
    return states


def rows_of(count: int, states: Callable[[int], States] = drawn_states, **fields: Any) -> Any:
    """Return whole tables of ``count`` good rows."""
    tables: dict[str, list[torch.Tensor]] = {}
    for row in range(count):
        contents, rows = seal(row, states(row))
        known = {"world_size": count, "seed": 42, "ranked": True, "resizes": 0, **fields}
        origin = Origin.here(row=row, rows=count, contents=contents, **known)
        for name, sealed in {"origin": origin.to_row(), **rows}.items():
            tables.setdefault(name, []).append(sealed)
    return {name: torch.stack(rows) for name, rows in tables.items()}


def sealed(tables: Mapping[str, torch.Tensor], name: str, state: torch.Tensor) -> torch.Tensor:
    """Return a table of one row whose check word fits beside ``tables``, whatever the state is."""
    contents = 0 if name == "origin" else Origin.from_row(tables["origin"][0]).contents
    return torch.cat([state, torch.tensor([digest(name, 0, state) ^ contents])]).unsqueeze(0)


def save(tables: Any, path: Path, key: str = "rng") -> Path:
    """Store whole tables as a job of one process would."""
    dcp.save({key: tables}, checkpoint_id=path, no_dist=True)
    return path


def change_metadata(path: Path, change: Callable[[Any], object]) -> None:
    """Rewrite a checkpoint's ``.metadata`` after ``change`` was applied to it."""
    file = path / ".metadata"
    metadata = pickle.loads(file.read_bytes())
    change(metadata)
    file.write_bytes(pickle.dumps(metadata))


def place_of(path: Path, fqn: str) -> tuple[Path, int, int]:
    """Return the file, the start and the length of the first stored part of a table."""
    metadata = dcp.FileSystemReader(path).read_metadata()
    place = next(place for at, place in metadata.storage_data.items() if at.fqn == fqn)
    return path / place.relative_path, place.offset, place.length


def _moved() -> dict[str, torch.Tensor]:
    states = {}
    for name, generator in private_generators().items():
        generator.seed(2**40)
        states[name] = generator.read()
    return states


_MOVED = _moved()
