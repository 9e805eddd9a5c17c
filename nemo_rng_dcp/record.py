"""A record: all random streams of a rank at one moment, as one int64 tensor that explains itself.

In words of 8 bytes, little-endian: a head of 14 numbers, the contents as JSON, the states one after
the other, a check word. The head's first two numbers keep their place in every layout to come.
"""

from __future__ import annotations

import hashlib
import json
import platform
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch

from nemo_rng_dcp.errors import RNGStateError
from nemo_rng_dcp.keys import KEY as KEY
from nemo_rng_dcp.versions import (
    HASH_SEED,
    UNSEEDED,
    __version__,
    version_number,
    version_text,
)

LAYOUT_VERSION = 1

Mesh = tuple[tuple[str, int], ...]
"""A device mesh: the name and the size of each dimension."""

_WORD = 8
_HEAD = struct.Struct("<14q")
_HEAD_FIELDS = (
    "layout_version",
    "library_version",
    "length",
    "row",
    "rows",
    "world_size",
    "seed",
    "ranked",
    "resizes",
    "taken_at",
    "python_version",
    "numpy_version",
    "torch_version",
    "contents_bytes",
)
_NO_SEED = -1
_HEAD_RANGES = {
    "rows": (1, 2**31 - 1),
    "world_size": (1, 2**31 - 1),
    "seed": (_NO_SEED, 2**32 - 1),
    "ranked": (0, 1),
    "resizes": (0, 2**31 - 1),
}
_OTHER_RANGE = 0, 2**63 - 1
LENGTH, ROW, ROWS = 2, 3, 4  # places in the head
_CHECK_BYTES = 8
_ROOM = 128


class Stream(NamedTuple):
    """One generator in a record.

    Attributes:
        kind: What is stored, see ``GeneratorAdapter.kind``.
        shared: Whether the generator is alike on all ranks; otherwise each row has its own.
        state: The packed state.
    """

    kind: str
    shared: bool
    state: bytes


def mesh_text(mesh: Mesh | None) -> str:
    """Return "dp 4 x tp 2", or "all ranks" without a mesh."""
    return "all ranks" if mesh is None else " x ".join(f"{name} {size}" for name, size in mesh)


@dataclass(frozen=True)
class Record:
    """The streams of one row and who wrote them. All numbers fit int64.

    Attributes:
        row: The row's number, ``0 <= row < rows``.
        rows: Rows of the table it is part of.
        world_size: Ranks of the job that wrote it.
        seed: The seed given to ``StatefulRNG``, before a row number was added; ``None``: it seeded
            nothing.
        ranked: Whether the row number was added to the seed, or the streams differ without one.
        resizes: How often the job was resumed with another number of rows before this was written.
        taken_at: When the streams were taken, in ns since 1970, UTC.
        mesh: The mesh along which streams differ; ``None``: all ranks.
        streams: By generator.
        unread: Whether a load was given it to read into, see ``unread.py``.
        parts: The dimensions that a flattened mesh is made of; ``None``: it is none, or nobody
            knows.
        python_version, numpy_version, torch_version, library_version: Of the job that wrote it, as
            ``major * 10**6 + minor * 10**3 + micro``.
        hash_seed: ``PYTHONHASHSEED`` of that job; "random" if it had none, or none was stored.
    """

    row: int
    rows: int
    world_size: int
    seed: int | None
    ranked: bool
    resizes: int
    taken_at: int
    mesh: Mesh | None
    streams: Mapping[str, Stream]
    python_version: int = field(default_factory=lambda: version_number(platform.python_version()))
    numpy_version: int = field(default_factory=lambda: version_number(np.__version__))
    torch_version: int = field(default_factory=lambda: version_number(str(torch.__version__)))
    library_version: int = field(default_factory=lambda: version_number(__version__))
    hash_seed: str = HASH_SEED
    unread: bool = False
    parts: Mesh | None = None

    def to_tensor(self) -> torch.Tensor:
        """Return the record as int64, shape ``(length,)``, on the CPU.

        Every rank gets the same length if it has generators of the same names and kinds.
        """
        contents = _contents(
            self.mesh,
            self.hash_seed,
            self.parts,
            tuple((name, s.kind, len(s.state), s.shared) for name, s in self.streams.items()),
        )
        body = b"".join([_padded(contents), *(_padded(s.state) for s in self.streams.values())])
        head = _HEAD.pack(
            LAYOUT_VERSION,
            self.library_version,
            (_HEAD.size + len(body) + _CHECK_BYTES) // _WORD,
            self.row,
            self.rows,
            self.world_size,
            _NO_SEED if self.seed is None else self.seed,
            self.ranked,
            self.resizes,
            -self.taken_at if self.unread else self.taken_at,
            self.python_version,
            self.numpy_version,
            self.torch_version,
            len(contents),
        )
        record = bytearray(head + body)
        record += _check_word(record)
        return torch.from_numpy(np.frombuffer(record, dtype=np.int64))

    @classmethod
    def from_tensor(cls, tensor: torch.Tensor) -> Record:
        """Return the record that :meth:`to_tensor` wrote.

        Args:
            tensor: int64, shape ``(length,)``.

        Raises:
            RNGStateError: It is no record, was altered, or is one of a newer layout.
        """
        words = words_of(tensor)
        content = words.tobytes()
        # Before all else: a newer layout may differ in everything but these two numbers.
        layout_version, library_version = words[:2].tolist()
        if layout_version != LAYOUT_VERSION:
            raise RNGStateError(
                f"{KEY}: the record has layout version {layout_version}, and nemo_rng_dcp "
                f"{__version__} reads version {LAYOUT_VERSION}. Load it with nemo_rng_dcp "
                f"{version_text(library_version)}, which wrote it, or newer."
            )
        if len(content) < _HEAD.size + _CHECK_BYTES or content[-8:] != _check_word(
            memoryview(content)[:-8]
        ):
            raise RNGStateError(
                f"{KEY}: a record of {len(words)} numbers{_head_row(words)} does not fit its check "
                "word: it was altered after it was written. Load another checkpoint."
            )
        head = dict(zip(_HEAD_FIELDS, _HEAD.unpack_from(content), strict=True))
        unread = -(2**63) < head["taken_at"] < 0
        if unread:
            head["taken_at"] *= -1
        bad = out_of_range(head)
        if bad:
            # Its check word fits, so it is no damage: another program wrote it.
            raise RNGStateError(
                f"{KEY}: a record{_head_row(words)} says {'; '.join(bad)}. Load another checkpoint."
            )
        del head["layout_version"], head["length"]
        seed = head.pop("seed")
        mesh, hash_seed, parts, streams = _parse_contents(content, head.pop("contents_bytes"))
        return cls(
            **head | {"ranked": bool(head["ranked"])},
            seed=None if seed == _NO_SEED else seed,
            mesh=mesh,
            streams=streams,
            hash_seed=hash_seed,
            unread=unread,
            parts=parts,
        )

    def versions(self) -> dict[str, str]:
        """Return the versions that it was written with, by package, such as "2.13.0"."""
        return {
            "nemo_rng_dcp": version_text(self.library_version),
            "python": version_text(self.python_version),
            "numpy": version_text(self.numpy_version),
            "torch": version_text(self.torch_version),
        }

    def version_skew(self) -> list[str]:
        """Return what has another version here than where the record was written, readably."""
        here = {
            "python": platform.python_version(),
            "numpy": np.__version__,
            "torch": str(torch.__version__),
        }
        then, now = self.versions(), {n: version_text(version_number(v)) for n, v in here.items()}
        return [f"{name} {then[name]}, now {now[name]}" for name in now if then[name] != now[name]]


def out_of_range(head: Mapping[str, int]) -> list[str]:
    """Return what is wrong with the numbers of a head, such as "seed -7, expected ..."."""
    ranges = {field: _HEAD_RANGES.get(field, _OTHER_RANGE) for field in head}
    if head["rows"] > 0:
        ranges["row"] = 0, head["rows"] - 1
    return [
        f"{field} {head[field]}, expected {low} to {high}"
        for field, (low, high) in ranges.items()
        if not low <= head[field] <= high
    ]


def fingerprint(state: bytes) -> str:
    """Return 12 hexadecimal digits that tell a packed state from every other one."""
    return hashlib.blake2b(state, digest_size=6).hexdigest()


@lru_cache(maxsize=64)
def _contents(
    mesh: Mesh | None,
    hash_seed: str,
    parts: Mesh | None,
    streams: tuple[tuple[str, str, int, bool], ...],
) -> bytes:
    generators = [
        {"name": name, "kind": kind, "bytes": size, "shared": shared}
        for name, kind, size, shared in streams
    ]
    listed, text = (json.dumps(value, separators=(",", ":")) for value in (generators, mesh))
    # As long as false, so that a generator may move to shared_generators= and back. In a name
    # this text has backslashes.
    listed = listed.replace('"shared":true', '"shared":true ')
    # With room to spare, so that a job on another mesh, or with another hash seed, has records of
    # the same length: plain dcp.load takes no other.
    room = -(-len(text) // _ROOM) * _ROOM
    additions = {"hash_seed": None if hash_seed == UNSEEDED else hash_seed, "parts": parts}
    for name, value in additions.items():
        addition = f',"{name}":{json.dumps(value, separators=(",", ":"))}'
        if value is not None and len(text + addition) <= room:
            text += addition
    text = text.ljust(room)
    return f'{{"generators":{listed},"mesh":{text}}}'.encode()


def _parse_contents(
    content: bytes, size: int
) -> tuple[Mesh | None, str, Mesh | None, dict[str, Stream]]:
    """Return mesh, hash seed, parts and streams of a record whose check word fits."""
    try:
        mesh, hash_seed, parts, generators = _described(content[_HEAD.size : _HEAD.size + size])
        place = _HEAD.size + _padded_size(size)
        streams: dict[str, Stream] = {}
        for name, kind, shared, length in generators:
            end = place + length
            streams[name] = Stream(kind, shared, content[place:end])
            place += _padded_size(end - place)
        if place != len(content) - _CHECK_BYTES:
            raise ValueError(f"{len(content) - _CHECK_BYTES} bytes, of which {place} are described")
        return mesh, hash_seed, parts, streams
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError) as error:
        # Its check word fits, so it is no damage: another program wrote it.
        raise RNGStateError(f"{KEY}: a record's contents make no sense: {error!r}") from error


# All rows of a table have the same.
@lru_cache(maxsize=64)
def _described(
    contents: bytes,
) -> tuple[Mesh | None, str, Mesh | None, tuple[tuple[str, str, bool, int], ...]]:
    """Return mesh, hash seed, parts, and of each generator name, kind, shared and bytes."""
    described = json.loads(contents)
    mesh, parts = (
        None if sizes is None else tuple((str(n), int(s)) for n, s in sizes)
        for sizes in (described["mesh"], described.get("parts"))
    )
    generators = tuple(
        (str(entry["name"]), str(entry["kind"]), bool(entry["shared"]), int(entry["bytes"]))
        for entry in described["generators"]
    )
    return mesh, str(described.get("hash_seed", UNSEEDED)), parts, generators


def words_of(tensor: torch.Tensor) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Return a tensor's numbers, refusing what cannot be a record."""
    if not isinstance(tensor, torch.Tensor):
        raise RNGStateError(f"{KEY}: expected a tensor, found {type(tensor).__name__}")
    if (
        tensor.dtype != torch.int64
        or tensor.ndim != 1
        or len(tensor) < 2
        or tensor.is_meta
        or tensor.layout != torch.strided
    ):
        raise RNGStateError(
            f"{KEY}: found {tensor.dtype} {tuple(tensor.shape)} on {tensor.device}, expected a "
            "dense torch.int64 tensor of one dimension. No StatefulRNG wrote that."
        )
    words: np.ndarray[Any, np.dtype[np.int64]] = tensor.detach().cpu().numpy()
    return words


def _head_row(words: np.ndarray[Any, np.dtype[np.int64]]) -> str:
    return f", by its head row {words[ROW]} of {words[ROWS]}," if len(words) > ROWS else ""


def _check_word(content: bytes | bytearray | memoryview) -> bytes:
    return hashlib.blake2b(content, digest_size=_CHECK_BYTES).digest()


def _padded(content: bytes) -> bytes:
    return content + bytes(-len(content) % _WORD)


def _padded_size(size: int) -> int:
    return size + -size % _WORD
