"""Frameworks' RNG files, one for each rank, made into a checkpoint of records.

The files are what ``torch.save`` writes. They are read by torch's unpickler of weights, which
refuses by name whatever is not on its list and executes nothing. To that list are added NumPy's
arrays and numbers, and NeMo Automodel's older dataclass, in whose place ``RNGState`` is made.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from nemo_rng_dcp import standalone
from nemo_rng_dcp.automodel import RNGState, packed_states
from nemo_rng_dcp.errors import RNGStateError
from nemo_rng_dcp.generators.torch_random import to_bytes
from nemo_rng_dcp.record import KEY, Record, Stream


class Layout(NamedTuple):
    """How a framework names its files, and the fields in them.

    Attributes:
        framework: Its name.
        name: The files' names; the group is the rank.
        fields: Where Python's, NumPy's, torch CPU's and CUDA's states are; empty if they are as in
            NeMo Automodel.
    """

    framework: str
    name: str
    fields: tuple[str, ...] = ()


LAYOUTS = (
    Layout("NeMo Automodel", r"rng_global_rank_(\d{1,9})\.pt"),
    Layout("NeMo Automodel, a file for each dp rank", r"rng_dp_rank_(\d{1,9})\.pt"),
    Layout(
        "Accelerate",
        r"random_states_(\d{1,9})\.pkl",
        ("random_state", "numpy_random_seed", "torch_manual_seed", "torch_cuda_manual_seed"),
    ),
    Layout("Transformers", r"rng_state_(\d{1,9})\.pth", ("python", "numpy", "cpu", "cuda")),
    Layout("Transformers, one process", r"rng_state()\.pth", ("python", "numpy", "cpu", "cuda")),
)


_KINDS = {"python": "python", "numpy": "numpy", "torch": "torch.cpu", "cuda": "torch.cuda"}
_OLDER_RNG_STATE = "nemo_automodel.components.training.rng.RNGState"


@dataclass(frozen=True)
class Files:
    """The files of one framework in a folder.

    Attributes:
        layout: Whose they are.
        folder: Where they are.
        names: By rank.
    """

    layout: Layout
    folder: Path
    names: Mapping[int, str]


def find_files(folder: Path, names: Iterable[str]) -> list[Files]:
    """Return the files that :data:`LAYOUTS` knows among the names in a folder."""
    found = []
    for layout in LAYOUTS:
        matches = [match for name in names if (match := re.fullmatch(layout.name, name))]
        ranks = {int(match[1] or 0): match[0] for match in matches}
        if ranks:
            found.append(Files(layout, folder, dict(sorted(ranks.items()))))
    return found


def read_records(folder: Path) -> tuple[Files, list[Record]]:
    """Return the per-rank files in a folder, or one below it, and a record for each.

    Rank r becomes row r. Of several accelerator states, one for each device of a machine, a rank's
    own is taken to be the one at its rank modulo their number. The seed is rank 0's, as torch's
    state tells it; the streams count as ranked if ranks differ.

    Raises:
        RNGStateError: There are no such files, or of several frameworks, or a rank's is missing;
            or a file is damaged or holds something else.
        OSError: A file cannot be read.
    """
    below = sorted(each for each in folder.iterdir() if each.is_dir())
    found = [
        files
        for place in (folder, *below)
        for files in find_files(place, [each.name for each in place.iterdir()])
    ]
    if len(found) != 1:
        raise RNGStateError(_which(folder, found))
    files = found[0]
    missing = sorted(set(range(max(files.names) + 1)) - files.names.keys())
    if missing:
        raise RNGStateError(
            f"{files.folder}: the files of rank {', '.join(map(str, missing[:10]))} are missing; "
            f"there are those of {len(files.names)} ranks, up to rank {max(files.names)}"
        )
    streams = {rank: _streams(files, rank) for rank in files.names}
    states = [{name: its.state for name, its in each.items()} for each in streams.values()]
    sizes = [{name: len(state) for name, state in each.items()} for each in states]
    for rank, size in enumerate(sizes):
        if size != sizes[0]:
            raise RNGStateError(
                f"{files.folder}: rank {rank} has states of {size} bytes and rank 0 of {sizes[0]}: "
                "they are no ranks of one job"
            )
    record = partial(
        Record,
        rows=len(streams),
        world_size=len(streams),
        # As torch's state begins; its generator uses 32 bits of it.
        seed=int.from_bytes(states[0]["torch"][:4], "little"),
        ranked=any(each != states[0] for each in states),
        resizes=0,
        mesh=None,
    )
    return files, [
        record(
            row=rank,
            taken_at=(files.folder / files.names[rank]).stat().st_mtime_ns,
            streams=streams[rank],
        )
        for rank in streams
    ]


def save_records(records: list[Record], folder: Path) -> None:
    """Write records as a checkpoint that ``StatefulRNG.load`` and ``dcp.load`` take.

    Raises:
        RNGStateError: The folder holds a checkpoint of other things, or it cannot be written to.
    """
    table = torch.cat([record.to_tensor() for record in records])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        warnings.filterwarnings("ignore", "Detected an existing checkpoint")
        standalone.save({KEY: table}, folder, None)


def _which(folder: Path, found: list[Files]) -> str:
    if found:
        places = ", ".join(f"{each.folder} ({each.layout.framework})" for each in found)
        return f"{folder}: there are several frameworks' files, name a folder of one: {places}"
    return (
        f"{folder}: no RNG files of a rank in it or in a folder below, such as "
        "rng/rng_global_rank_0.pt (NeMo Automodel), random_states_0.pkl (Accelerate) or "
        "rng_state_0.pth (Transformers)"
    )


def _streams(files: Files, rank: int) -> dict[str, Stream]:
    file = files.folder / files.names[rank]
    state = _load(file)
    if not isinstance(state, Mapping):
        raise RNGStateError(f"{file}: found a {type(state).__name__}, expected a dict of states")
    if files.layout.fields:
        fields: list[Any] = [state.get(name) for name in files.layout.fields]
        state = RNGState(*fields)
    if isinstance(state, RNGState):
        devices, state.cuda_rng_state = state.cuda_rng_state, []
    else:
        devices, state = state.get("cuda_rng_state"), {**state, "cuda_rng_state": []}
    try:
        packed = packed_states(state, None)
        if devices is not None and len(devices):
            # One process saves one device's, or a list of all that it sees.
            own = devices if isinstance(devices, torch.Tensor) else devices[rank % len(devices)]
            packed["cuda"] = to_bytes(own)
    except (RNGStateError, ValueError, TypeError) as error:
        raise RNGStateError(f"{file}: {error}") from error
    return {name: Stream(_KINDS[name], False, its) for name, its in packed.items()}


def _load(file: Path) -> Any:
    reconstruct, scalar = np.zeros(1).__reduce__()[0], np.int64(0).__reduce__()[0]
    allowed: list[Any] = [np.ndarray, np.dtype, (RNGState, _OLDER_RNG_STATE)]
    allowed += [type(np.dtype(kind)) for kind in ("uint32", "int32", "int64", "float64")]
    for module in ("numpy._core.multiarray", "numpy.core.multiarray"):  # NumPy 2 and 1
        allowed += [(reconstruct, f"{module}._reconstruct"), (scalar, f"{module}.scalar")]
    try:
        with torch.serialization.safe_globals(allowed):
            return torch.load(file, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:
        found = re.search(r"GLOBAL (\S+)|class (\S+) |function (\S+)", str(error))
        if found:
            name = next(filter(None, found.groups()))
            reason = f"refused: it names {name}, which is in no RNG state. Nothing in it was run"
        else:
            reason = "damaged, or not written by torch.save"
        raise RNGStateError(f"{file}: {reason}") from error
