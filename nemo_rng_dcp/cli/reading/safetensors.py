"""The heads of Hugging Face's safetensors files, as DCP's writer for that format leaves them."""

from __future__ import annotations

import json
from typing import Any

from nemo_rng_dcp.cli.reading.folder import Folder
from nemo_rng_dcp.cli.reading.index import Chunk, Stored, integers, malformed_if_wrong, short
from nemo_rng_dcp.cli.reading.pickles import typed
from nemo_rng_dcp.errors import RNGStateError

SUFFIX = ".safetensors"

_LENGTH_BYTES = 8
_DTYPES = {"F": "float", "I": "int", "U": "uint", "BF": "bfloat", "C": "complex"}


class Safetensors:
    """The index of a checkpoint in safetensors files; see ``Index``.

    Args:
        folder: The checkpoint.

    Raises:
        RNGStateError: A file's head is damaged or malformed.
        OSError: A file cannot be read.
    """

    def __init__(self, folder: Folder) -> None:
        self.keys: dict[str, Stored] = {}
        self.files = {name for name in folder.sizes if name.endswith(SUFFIX)}
        self._chunks: dict[str, list[Chunk]] = {}
        for name in sorted(self.files):
            place = folder.path_of(name)
            head, size = _head(folder, name, place)
            with malformed_if_wrong(place):
                self._add(name, typed(head, dict), size)

    def chunks(self, key: str) -> list[Chunk]:
        return self._chunks[key]

    def _add(self, file: str, head: dict[str, Any], data: int) -> None:
        about = typed(head.pop("__metadata__", {}), dict)
        # Where the parts of a tensor belong that is spread over several files.
        sharding = typed(json.loads(about.get("DCP_SHARDING_INFO", "{}")), dict)
        for key, entry in head.items():
            sizes = integers(entry["shape"])
            parts = sharding.get(key, {"saved_offsets": [0] * len(sizes)})
            offsets = integers(parts["saved_offsets"])
            begin, end = integers(entry["data_offsets"])
            if len(offsets) != len(sizes) or end < begin:
                raise ValueError(f"{short(key)} has no place")
            # DCP derives the whole from its parts.
            size = tuple(map(sum, zip(sizes, offsets, strict=True)))
            if (known := self.keys.get(key)) and len(known.size) == len(size):
                size = tuple(map(max, known.size, size))
            self.keys[short(key)] = Stored(_dtype(short(entry["dtype"])), size)
            chunk = Chunk(offsets, sizes, file, data + begin, end - begin, is_raw=True)
            self._chunks.setdefault(key, []).append(chunk)


def _head(folder: Folder, name: str, place: str) -> tuple[Any, int]:
    """Return a file's head and how many bytes come before its data."""
    present = folder.sizes[name]
    length = int.from_bytes(folder.read(name, 0, min(_LENGTH_BYTES, present)), "little")
    data = _LENGTH_BYTES + length
    if data > present:
        raise RNGStateError(f"{place} is truncated: {present} bytes, expected {data} or more")
    try:
        return json.loads(folder.read(name, _LENGTH_BYTES, length)), data
    except (ValueError, RecursionError) as error:
        raise RNGStateError(f"{place} is damaged: its head is no JSON ({error})") from error


def _dtype(code: str) -> str:
    """Return "int64" for "I64"."""
    letters = code.rstrip("0123456789")
    return _DTYPES.get(letters, letters.lower()) + code[len(letters) :]
