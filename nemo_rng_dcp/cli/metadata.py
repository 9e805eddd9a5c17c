"""What a checkpoint says of itself in DCP's ``.metadata``; nothing in it is executed."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from nemo_rng_dcp.cli.pickles import ForbiddenError, Global, Made, parse
from nemo_rng_dcp.errors import RNGStateError

METADATA_FILE = ".metadata"

_DCP = "torch.distributed.checkpoint"
_DTYPE = re.compile(r"torch (bool|bits\w+|[a-z]*(int|float|complex)\d+\w*)")
_KNOWN = {
    "torch Size",
    "collections OrderedDict",
    f"{_DCP}.metadata Metadata",
    f"{_DCP}.metadata MetadataIndex",
    f"{_DCP}.metadata TensorStorageMetadata",
    f"{_DCP}.metadata BytesStorageMetadata",
    f"{_DCP}.metadata ChunkStorageMetadata",
    f"{_DCP}.metadata TensorProperties",
    f"{_DCP}.metadata StorageMeta",
    f"{_DCP}.metadata _MEM_FORMAT_ENCODING",
    f"{_DCP}.filesystem _StorageInfo",
    f"{_DCP}.filesystem _StoragePrefix",
    "torch.serialization _get_layout",
    "builtins getattr",  # how some versions of Python store an enum
    "pathlib PosixPath",
    "pathlib WindowsPath",
    "pathlib._local PosixPath",
    "pathlib._local WindowsPath",
}
_DIMENSIONS = 64  # torch's own limit
_NAME_LENGTH = 4096


@dataclass(frozen=True)
class Stored:
    """What a checkpoint says it holds under one key.

    Attributes:
        dtype: A tensor's dtype, such as ``"int64"``; ``None`` for bytes, which are a pickle.
        size: A tensor's shape.
    """

    dtype: str | None
    size: tuple[int, ...]


@dataclass(frozen=True)
class Chunk:
    """A part of a stored tensor and where its bytes are.

    Attributes:
        offsets: Where the part begins in the tensor.
        sizes: Its shape.
        file: The file's name in the checkpoint's folder; empty where the metadata names none.
        start: The file's byte at which the part begins.
        length: Bytes of the part.
        form: ``"torch.save"``, ``"raw"`` for the numbers alone, or ``"extension"`` where an
            extension of DCP's (compression, encryption) has written it.
    """

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str = ""
    start: int = 0
    length: int = 0
    form: str = "torch.save"


class Metadata:
    """The keys of a checkpoint, and where the parts of each are stored.

    Args:
        content: The bytes of a ``.metadata``.
        name: The file's name, for errors.

    Attributes:
        keys: What is stored, by key.
        files: The names of all files that hold parts of the checkpoint.

    Raises:
        RNGStateError: It is damaged, malformed, or wants something that DCP never stores there.
    """

    def __init__(self, content: bytes, name: str = METADATA_FILE) -> None:
        self._name = name
        record = self._parse(content)
        with self._as_malformed():
            self._saved = _typed(_its(record, "state_dict_metadata"), dict)
            self.keys = {_text(key): _stored(value) for key, value in self._saved.items()}
            self._places: dict[str, dict[tuple[int, ...] | None, Made]] = {}
            self.files = set()
            for index, place in _typed(_its(record, "storage_data"), dict).items():
                fqn, offset = _text(_its(index, "fqn")), _its(index, "offset", None)
                where = None if offset is None else _integers(offset)
                self._places.setdefault(fqn, {})[where] = place
                self.files.add(_text(_its(place, "relative_path")))
            self._given: set[int] = set()

    def chunks(self, key: str) -> list[Chunk]:
        """Return the parts of what is stored under a key; bytes are one part without offsets."""
        with self._as_malformed():
            places = self._places.get(key, {})
            if self.keys[key].dtype is None:
                return [_chunk((), (), places.get(None))]
            parts = _typed(_its(self._saved[key], "chunks"), list)
            # Tensors that share one list would take more time than the file has bytes.
            if id(parts) in self._given:
                raise ValueError("two tensors have one list of chunks")
            self._given.add(id(parts))
            chunks = []
            for part in parts:
                offsets, sizes = _integers(_its(part, "offsets")), _integers(_its(part, "sizes"))
                chunks.append(_chunk(offsets, sizes, places.get(offsets)))
            return chunks

    def _parse(self, content: bytes) -> Made:
        try:
            record = parse(
                content, lambda name: name in _KNOWN or _DTYPE.fullmatch(name) is not None
            )
        except ForbiddenError as error:
            raise RNGStateError(
                f"refused: {self._name} wants {error}, which DCP never stores there. Nothing in it "
                "was executed; do not load this checkpoint."
            ) from error
        except ValueError as error:
            raise RNGStateError(f"{self._name} is damaged or truncated ({error})") from error
        if not isinstance(record, Made) or record.name != f"{_DCP}.metadata Metadata":
            raise RNGStateError(
                f"{self._name} holds {type(record).__name__}, expected DCP's Metadata"
            )
        return record

    @contextmanager
    def _as_malformed(self) -> Iterator[None]:
        """Turn what a good pickle of the wrong things runs into into one error."""
        try:
            yield
        except (TypeError, ValueError, KeyError) as error:
            raise RNGStateError(f"{self._name} is malformed: {error}") from error


def _its(thing: Any, attribute: str, *default: Any) -> Any:
    """Return an attribute of what a pickle would have built."""
    state = _typed(thing, Made).state
    if isinstance(state, dict) and attribute in state:
        return state[attribute]
    if default:
        return default[0]
    raise ValueError(f"a {thing.name.rpartition(' ')[2]} has no {attribute}")


def _stored(record: Any) -> Stored:
    if isinstance(record, Made) and record.name.endswith(" BytesStorageMetadata"):
        return Stored(None, ())
    properties = _typed(_its(record, "properties"), Made).state
    # TensorProperties hands pickle a tuple, of which the dtype is the first.
    dtype = _typed(properties[0] if isinstance(properties, tuple) and properties else None, Global)
    if not _DTYPE.fullmatch(dtype.name):
        raise ValueError(f"found {dtype.name}, expected a dtype")
    return Stored(dtype.name.removeprefix("torch "), _integers(_its(record, "size")))


def _chunk(offsets: tuple[int, ...], sizes: tuple[int, ...], place: Any) -> Chunk:
    if place is None:
        return Chunk(offsets, sizes)
    start, length = _integers((_its(place, "offset"), _its(place, "length")))
    form = "extension" if _its(place, "transform_descriptors", None) else "torch.save"
    return Chunk(offsets, sizes, _text(_its(place, "relative_path")), start, length, form)


def _typed(value: Any, kind: type) -> Any:
    if not isinstance(value, kind):
        raise TypeError(f"found {type(value).__name__}, expected {kind.__name__}")
    return value


def _text(value: Any) -> str:
    """Return a name, which will be printed: one with a terminal's control codes is refused."""
    text: str = _typed(value, str)
    if len(text) > _NAME_LENGTH:
        raise ValueError(f"found a name of {len(text)} characters")
    if not text.isprintable():
        raise ValueError(f"found the name {text[:60]!a}, expected printable text")
    return text


def _integers(values: Any) -> tuple[int, ...]:
    """Return a size or a place in a file: integers that fit int64, not negative."""
    if isinstance(values, Made) and values.name == "torch Size" and len(values.arguments) == 1:
        values = values.arguments[0]
    if len(_typed(values, tuple)) > _DIMENSIONS:
        raise ValueError(f"found {len(values)} dimensions")
    for value in values:
        if type(value) is not int or not 0 <= value < 2**63:
            found = value if type(value) is int and abs(value) < 2**64 else type(value).__name__
            raise ValueError(f"found {found}, expected integers from 0 to 2**63 - 1")
    return values  # type: ignore[no-any-return]
