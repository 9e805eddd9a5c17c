"""Frameworks' RNG files: one for each rank, or one that has all ranks' states."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from nemo_rng_dcp.cli.importing import weights_only
from nemo_rng_dcp.cli.importing.rank_states import JobStates, RankStates, require_ranks
from nemo_rng_dcp.cli.reading.folder import Folder
from nemo_rng_dcp.cli.terminal import visible
from nemo_rng_dcp.errors import RNGStateError

Fields = tuple[str | tuple[str, ...], ...]
"""Where the states of Python, NumPy, torch and CUDA are: a field, or several; "" for none."""

_GENERATORS = ("python", "numpy", "torch", "cuda")
_NUMPY = ("np_bit_generator", "np_keys", "np_position", "np_has_gauss", "np_cached_gaussian")
_AUTOMODEL: Fields = ("random_rng_state", _NUMPY, "torch_rng_state", "cuda_rng_state")
_ACCELERATE = ("random_state", "numpy_random_seed", "torch_manual_seed", "torch_cuda_manual_seed")
_TRANSFORMERS = ("python", "numpy", "cpu", "cuda")
_COMPOSER = ("python", "numpy", "torch", "cuda")
_VERL = ("random", "numpy", "cpu", "cuda")
_MILES = ("", "", "torch", "cuda")


class Naming(NamedTuple):
    """How a framework names its files, and the fields in them.

    Attributes:
        framework: Its name.
        name: The files' names; the group ``rank`` is the rank, ``ranks`` how many there are.
        fields: The fields in them.
        within: The field whose value has these fields, "" if the file itself has them. It may be a
            list, with an item for each rank.
        global_ranks: Whether the rank is the global one.
    """

    framework: str
    name: str
    fields: Fields
    within: str = ""
    global_ranks: bool = True


_RANK, _RANKS = r"(?P<rank>\d{1,9})", r"(?P<ranks>\d{1,9})"
COMPOSER = Naming("Composer", rf"ep\d+-ba\d+-rank{_RANK}\.pt", _COMPOSER, within="rng")
NAMINGS = (
    Naming("NeMo Automodel", rf"rng_global_rank_{_RANK}\.pt", _AUTOMODEL),
    Naming(
        "NeMo Automodel, by dp rank", rf"rng_dp_rank_{_RANK}\.pt", _AUTOMODEL, global_ranks=False
    ),
    Naming("Accelerate", rf"random_states_{_RANK}\.pkl", _ACCELERATE),
    Naming("Transformers", rf"rng_state_{_RANK}\.pth", _TRANSFORMERS),
    Naming("Transformers, one process", r"rng_state(?P<rank>)\.pth", _TRANSFORMERS),
    Naming("verl", rf"extra_state_world_size_{_RANKS}_rank_{_RANK}\.pt", _VERL, within="rng"),
    Naming("miles", rf"rng_rank_{_RANK}\.pt", _MILES),
    COMPOSER,
)


@dataclass(frozen=True)
class Files:
    """The files of one checkpoint of a framework in a folder.

    Attributes:
        naming: Whose they are.
        folder: Where they are.
        names: By rank.
        expected: How many ranks there were, by the files' names; 0 if they do not say.
    """

    naming: Naming
    folder: Path
    names: dict[int, str]
    expected: int = 0

    def __str__(self) -> str:
        return f"{self.folder / self.names[min(self.names)]} ({self.naming.framework})"


def find_files(folder: Folder) -> list[Files]:
    """Return the files in a folder that :data:`NAMINGS` knows."""
    found: dict[tuple[str, str], Files] = {}
    for naming in NAMINGS:
        for name in folder.sizes:
            if not (match := re.fullmatch(naming.name, name)):
                continue
            # What differs in more than the rank is of another checkpoint.
            beside = naming.name, name[: match.start("rank")]
            expected = int(match.groupdict().get("ranks") or 0)
            files = found.setdefault(beside, Files(naming, Path(folder.where), {}, expected))
            files.names[int(match["rank"] or 0)] = name
    return list(found.values())


def read_files(files: Files) -> JobStates:
    """Return the states that are in files.

    Raises:
        RNGStateError: A rank's file is missing, is damaged, or holds something else.
        OSError: A file cannot be read.
    """
    naming, where = files.naming, str(files.folder)
    last = {files.expected - 1} if files.expected else set()
    require_ranks(where, set(files.names), last)
    ranks: dict[int, RankStates] = {}
    unread: set[str] = set()
    for rank, name in sorted(files.names.items()):
        file = files.folder / name
        with file.open("rb") as stream:
            content = weights_only.load(stream, str(file))
        if naming.within:
            content = _field(content, naming.within, file)
        written = file.stat().st_mtime_ns
        items = content if naming.within and isinstance(content, list) else [content]
        if not items or (len(items) > 1 and len(files.names) > 1):
            raise RNGStateError(f"{file}: found {len(items)} ranks' states, expected one rank's")
        for number, item in enumerate(items, rank):
            ranks[number] = RankStates(name, written, _fields(item, naming, file))
            unread |= _others(item, naming)
    return JobStates(naming.framework, where, ranks, naming.global_ranks, tuple(sorted(unread)))


def _fields(content: Any, naming: Naming, file: Path) -> dict[str, Any]:
    states = {}
    for generator, name in zip(_GENERATORS, naming.fields, strict=True):
        if isinstance(name, tuple):
            states[generator] = tuple(_field(content, part, file) for part in name)
        # Without an accelerator it has no such field.
        elif name and (generator != "cuda" or name in _dict(content, file)):
            states[generator] = _field(content, name, file)
    return states


def _others(content: Mapping[str, Any], naming: Naming) -> set[str]:
    """Return the fields beside the known ones that look like generators' states."""
    known = {*naming.fields, *_NUMPY}
    others = {name: value for name, value in content.items() if name not in known}
    return {visible(str(name)) for name, value in others.items() if _may_be_state(value)}


def _may_be_state(value: Any) -> bool:
    """Return whether something may be a state: Python's and NumPy's are tuples, torch's bytes."""
    if isinstance(value, tuple):
        return True
    values = value if isinstance(value, list) and value else [value]
    return all(isinstance(item, torch.Tensor) and item.dtype == torch.uint8 for item in values)


def _field(content: Any, name: str, file: Path) -> Any:
    found = _dict(content, file)
    if name not in found:
        raise RNGStateError(f"{file}: it has no {name!r}, but {', '.join(map(str, found))[:80]}")
    return found[name]


def _dict(content: Any, file: Path) -> Mapping[str, Any]:
    if not isinstance(content, Mapping):
        found = type(content).__name__
        raise RNGStateError(f"{file}: found a {found}, expected a dict of states")
    return content
