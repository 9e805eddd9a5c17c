"""Frameworks' RNG files: one for each rank, or one that has all ranks' states."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from nemo_rng_dcp.cli.importing import weights_only
from nemo_rng_dcp.cli.importing.rank_states import JobStates, RankStates, generator_of, require_all
from nemo_rng_dcp.cli.reading.folder import Folder
from nemo_rng_dcp.cli.reading.foreign import MEGATRON
from nemo_rng_dcp.errors import RNGStateError

_NUMPY = ("np_bit_generator", "np_keys", "np_position", "np_has_gauss", "np_cached_gaussian")
"""NeMo Automodel's fields of one state."""


class Naming(NamedTuple):
    """How a framework names its files. What a field holds is told by its own name.

    Attributes:
        framework: Its name.
        name: The files' names; the group ``rank`` is the rank, ``ranks`` how many there are.
        within: The field whose value has the states, "" if the file itself has them. It may be a
            list, with an item for each rank.
        refused: Why such a file is not read.
    """

    framework: str
    name: str
    within: str = ""
    refused: str = ""


_RANK, _RANKS = r"(?P<rank>\d{1,9})", r"(?P<ranks>\d{1,9})"
COMPOSER = Naming("Composer", rf"ep\d+-ba\d+-rank{_RANK}\.pt", within="rng")
OTHER = Naming("files by rank", rf"[\w.-]*(?:rng|random)[\w.-]*?{_RANK}\.(?:pt|pth|pkl|bin)")
NAMINGS = (
    Naming("NeMo Automodel", rf"rng_global_rank_{_RANK}\.pt"),
    Naming("NeMo Automodel, by dp rank", rf"rng_dp_rank_{_RANK}\.pt"),
    Naming("Accelerate", rf"random_states_{_RANK}\.pkl"),
    Naming("Transformers", rf"rng_state_{_RANK}\.pth"),
    Naming("Transformers, one process", r"rng_state(?P<rank>)\.pth"),
    Naming("verl", rf"extra_state_world_size_{_RANKS}_rank_{_RANK}\.pt", within="rng"),
    COMPOSER,
    OTHER,
    Naming("Megatron", r"model_optim_rng\.pt(?P<rank>)", refused=MEGATRON),
    Naming(
        "no rank's",
        r"[\w.-]*(?:rng|random)[\w.-]*\.(?:pt|pth|pkl|bin)(?P<rank>)",
        refused="it names no rank: one process's state, or one for all ranks, and those of the "
        "others are lost",
    ),
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

    @property
    def first(self) -> Path:
        return self.folder / self.names[min(self.names)]

    def __str__(self) -> str:
        return f"{self.first} ({self.naming.framework})"


def find_files(folder: Folder) -> list[Files]:
    """Return the files in a folder that :data:`NAMINGS` knows."""
    found: dict[tuple[str, str], Files] = {}
    for name in folder.sizes:
        matches = ((naming, re.fullmatch(naming.name, name)) for naming in NAMINGS)
        naming, match = next((pair for pair in matches if pair[1]), (OTHER, None))
        if match:
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
    require_all(where, set(files.names), last)
    ranks: dict[int, RankStates] = {}
    unread: set[str] = set()
    for rank, name in sorted(files.names.items()):
        file = files.folder / name
        with file.open("rb") as stream:
            content = weights_only.load(stream, str(file))
        if naming.within:
            fields = _fields(content, file)
            if naming.within not in fields:
                raise RNGStateError(f"{file}: it has no {naming.within!r}, but {_listed(fields)}")
            content = fields[naming.within]
        written = file.stat().st_mtime_ns
        items = content if naming.within and isinstance(content, list) else [content]
        if not items or (len(items) > 1 and len(files.names) > 1):
            raise RNGStateError(f"{file}: found {len(items)} ranks' states, expected one rank's")
        for number, item in enumerate(items, rank):
            states, others = _states(_fields(item, file), file)
            ranks[number] = RankStates(name, written, states)
            unread |= others
    return JobStates(naming.framework, where, ranks, tuple(sorted(unread)))


def _states(fields: dict[Any, Any], file: Path) -> tuple[dict[str, Any], set[str]]:
    """Return the states in fields, and the names of other fields that may be states."""
    if fields.keys() >= set(_NUMPY):
        fields["numpy"] = tuple(fields.pop(part) for part in _NUMPY)
    states: dict[str, Any] = {}
    others = set()
    for field, value in fields.items():
        name = generator_of(str(field))
        # Without an accelerator its list is empty.
        filled = isinstance(value, (tuple, list, dict)) and len(value) > 0
        if not name and _may_be_state(value):
            others.add(str(field))
        elif name and (filled or isinstance(value, torch.Tensor)):
            if name in states:
                raise RNGStateError(f"{file}: {field} is not its only state of {name}")
            states[name] = value
    absent = [name for name in ("python", "numpy", "torch") if name not in states]
    if absent and (others or not states):
        has = _listed(others or fields)
        raise RNGStateError(f"{file}: it has no state of {', '.join(absent)}, but {has}")
    return states, others


def _may_be_state(value: Any) -> bool:
    """Return whether something may be a state: Python's and NumPy's are tuples, torch's bytes."""
    values = value if isinstance(value, list) and value else [value]
    return isinstance(value, tuple) or all(
        isinstance(item, torch.Tensor) and item.dtype == torch.uint8 for item in values
    )


def _fields(content: Any, file: Path) -> dict[Any, Any]:
    if not isinstance(content, Mapping):
        found = type(content).__name__
        raise RNGStateError(f"{file}: found a {found}, expected a dict of states")
    return dict(content)


def _listed(names: Iterable[Any]) -> str:
    return ", ".join(map(str, names))[:80]
