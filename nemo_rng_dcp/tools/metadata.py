"""A checkpoint's ``.metadata``, read without executing anything in it."""

from __future__ import annotations

import collections
import pickle
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from nemo_rng_dcp.errors import RNGStateError

METADATA_FILE = ".metadata"

_DCP = "torch.distributed.checkpoint"
_RECORDS = {
    (f"{_DCP}.metadata", "Metadata"),
    (f"{_DCP}.metadata", "MetadataIndex"),
    (f"{_DCP}.metadata", "TensorStorageMetadata"),
    (f"{_DCP}.metadata", "BytesStorageMetadata"),
    (f"{_DCP}.metadata", "ChunkStorageMetadata"),
    (f"{_DCP}.metadata", "TensorProperties"),
    (f"{_DCP}.metadata", "StorageMeta"),
    (f"{_DCP}.filesystem", "_StorageInfo"),
    (f"{_DCP}.filesystem", "_StoragePrefix"),
}
# What DCP stores of these is of no use here. Enums travel as a call of their class, and in some
# versions of Python as a call of getattr: the stand-in for either does nothing.
_IGNORED = {
    (f"{_DCP}.metadata", "_MEM_FORMAT_ENCODING"),
    ("torch.serialization", "_get_layout"),
    ("builtins", "getattr"),
    ("pathlib", "PosixPath"),
    ("pathlib", "WindowsPath"),
    ("pathlib._local", "PosixPath"),
    ("pathlib._local", "WindowsPath"),
}


@dataclass(frozen=True)
class Chunk:
    """A part of a stored tensor and where its bytes are.

    Attributes:
        offsets: Where the part begins in the tensor.
        sizes: Its shape.
        file: The file's name in the checkpoint's folder; empty where the metadata names none.
        start: The file's byte at which the part begins.
        length: Bytes of the part.
        encoded: Whether an extension of DCP's (compression, encryption) has written it.
    """

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    start: int
    length: int
    encoded: bool


@dataclass(frozen=True)
class Stored:
    """What a checkpoint says it holds under one key.

    Attributes:
        dtype: A tensor's dtype; ``None`` for bytes, which are a pickle.
        size: A tensor's shape.
    """

    dtype: torch.dtype | None
    size: tuple[int, ...]


class CheckpointMetadata:
    """The keys of a checkpoint, and where the parts of each are stored.

    Args:
        folder: The checkpoint.

    Raises:
        RNGStateError: The folder or its ``.metadata`` is missing, malformed, or wants something
            that DCP never stores there.
    """

    def __init__(self, folder: Path) -> None:
        self._record = _unpickle(_metadata_file(folder))
        with _as_malformed():
            saved = _mapping(self._record.state_dict_metadata)
            self.keys = {_text(key): _stored(value) for key, value in saved.items()}
            self._places = _mapping(self._record.storage_data)

    def chunks(self, keys: Collection[str]) -> dict[str, list[Chunk]]:
        """Return the parts of every key in ``keys``; bytes are one part without offsets."""
        with _as_malformed():
            places: dict[tuple[str, tuple[int, ...] | None], Any] = {}
            for index, place in self._places.items():
                if index.fqn in keys:
                    offset = getattr(index, "offset", None)
                    places[index.fqn, None if offset is None else _integers(offset)] = place
            return {key: self._chunks(key, places) for key in keys}

    def files(self) -> set[str]:
        """Return the names of all files that hold parts of the checkpoint."""
        with _as_malformed():
            return {_text(place.relative_path) for place in self._places.values()}

    def _chunks(self, key: str, places: Mapping[Any, Any]) -> list[Chunk]:
        record = self._record.state_dict_metadata[key]
        if self.keys[key].dtype is None:
            return [_chunk((), (), places.get((key, None)))]
        chunks = []
        for part in _typed(record.chunks, list):
            offsets, sizes = _integers(part.offsets), _integers(part.sizes)
            chunks.append(_chunk(offsets, sizes, places.get((key, offsets))))
        return chunks


def _metadata_file(folder: Path) -> Path:
    """Return the path of a checkpoint's ``.metadata``, or say what is there instead."""
    if not folder.exists():
        raise RNGStateError(f"{folder}: there is no such folder")
    if not folder.is_dir():
        raise RNGStateError(f"{folder}: a file, expected the folder of a DCP checkpoint")
    file = folder / METADATA_FILE
    if not file.is_file():
        inside = sorted(path.name for path in folder.iterdir())
        found = (
            f"only {', '.join(inside[:3])}{', ...' * (len(inside) > 3)}" if inside else "nothing"
        )
        raise RNGStateError(
            f"{folder}: no {METADATA_FILE} in it, {found}. It is no DCP checkpoint, or its save "
            "did not finish."
        )
    return file


def _unpickle(file: Path) -> Any:
    try:
        with file.open("rb") as content:
            record = _Unpickler(content).load()
    except RNGStateError:
        raise
    except Exception as error:  # a damaged pickle raises whatever it runs into
        raise RNGStateError(
            f"{METADATA_FILE} is damaged or truncated ({type(error).__name__}: {error})"
        ) from error
    if type(record).__name__ != "Metadata":
        raise RNGStateError(
            f"{METADATA_FILE} holds {type(record).__name__}, expected DCP's Metadata"
        )
    return record


class _Unpickler(pickle.Unpickler):
    """Gives a pickle inert stand-ins for DCP's metadata classes, and refuses everything else.

    The stand-ins are made anew for each pickle and have no code, so that not even a pickle which
    sets attributes of the classes it is given can change anything outside its own result.
    """

    def __init__(self, content: Any) -> None:
        super().__init__(content)
        self._given: dict[tuple[str, str], Any] = {
            ("torch", "Size"): tuple,
            ("collections", "OrderedDict"): collections.OrderedDict,
        }

    def find_class(self, module: str, name: str) -> Any:
        wanted = (module, name)
        if wanted not in self._given:
            self._given[wanted] = _stand_in(module, name)
        return self._given[wanted]


def _stand_in(module: str, name: str) -> Any:
    if (module, name) in _RECORDS:
        # TensorProperties hands pickle a tuple, which only a method can take.
        members = {"__setstate__": _set_properties} if name == "TensorProperties" else {}
        return type(name, (), members)
    if (module, name) in _IGNORED:
        return lambda *_: None
    if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
        return getattr(torch, name)
    raise RNGStateError(
        f"refused: {METADATA_FILE} wants {module}.{name}, which DCP never stores there. Nothing in "
        "it was executed; do not load this checkpoint."
    )


def _set_properties(properties: Any, state: tuple[Any, ...]) -> None:
    properties.dtype = state[0]


@contextmanager
def _as_malformed() -> Iterator[None]:
    """Turn what a good pickle of the wrong things runs into into one error."""
    try:
        yield
    except (AttributeError, TypeError, ValueError, KeyError, IndexError) as error:
        raise RNGStateError(f"{METADATA_FILE} is malformed: {error}") from error


def _stored(record: Any) -> Stored:
    if type(record).__name__ == "BytesStorageMetadata":
        return Stored(None, ())
    return Stored(_typed(record.properties.dtype, torch.dtype), _integers(record.size))


def _chunk(offsets: tuple[int, ...], sizes: tuple[int, ...], place: Any) -> Chunk:
    if place is None:
        return Chunk(offsets, sizes, "", 0, 0, False)
    start, length = _integers((place.offset, place.length))
    encoded = bool(getattr(place, "transform_descriptors", None))
    return Chunk(offsets, sizes, _text(place.relative_path), start, length, encoded)


def _typed(value: Any, kind: Any) -> Any:
    if not isinstance(value, kind):
        raise TypeError(f"found {type(value).__name__}, expected {kind.__name__}")
    return value


def _text(value: Any) -> str:
    """Return a name, which will be printed: one with a terminal's control codes is refused."""
    text: str = _typed(value, str)
    if not text.isprintable():
        raise ValueError(f"found the name {text!a:.60}, expected printable text")
    return text


def _mapping(value: Any) -> dict[Any, Any]:
    mapping: dict[Any, Any] = _typed(value, dict)
    return mapping


def _integers(values: Any) -> tuple[int, ...]:
    """Return numbers as they must be in a size or a place in a file: integers, not negative."""
    if any(type(value) is not int or value < 0 for value in values):
        raise ValueError(f"found {values!r:.60}, expected integers >= 0")
    return tuple(values)
