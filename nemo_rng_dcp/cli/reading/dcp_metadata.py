"""DCP's ``.metadata``: a pickle, of which nothing is executed."""

from __future__ import annotations

import re
import sys
from typing import Any

from nemo_rng_dcp.cli.reading.folder import Folder
from nemo_rng_dcp.cli.reading.index import Chunk, Stored, integers, malformed_if_wrong, short
from nemo_rng_dcp.cli.reading.pickles import ForbiddenError, Global, Made, parse, typed
from nemo_rng_dcp.errors import RNGStateError

_DCP = "torch.distributed.checkpoint"
_DTYPE = re.compile(r"torch (bool|bits\w+|[a-z]*(int|float|complex)\d+\w*)")
_OF_ALL_RANKS = ".metadata"
_OF_A_RANK = re.compile(r"__(\d{1,9})\.metadata")
_KNOWN = {
    f"{_DCP}.metadata": "Metadata MetadataIndex StorageMeta TensorProperties TensorStorageMetadata "
    "BytesStorageMetadata ChunkStorageMetadata _MEM_FORMAT_ENCODING",
    f"{_DCP}.filesystem": "_StorageInfo _StoragePrefix",
    "torch": "Size",
    "torch.serialization": "_get_layout",
    "collections": "OrderedDict",
    "builtins": "getattr",  # how some versions of Python store an enum
    "pathlib": "PosixPath WindowsPath",
    "pathlib._local": "PosixPath WindowsPath",
}
"""What a ``.metadata`` may name, by module."""
_NAMES = {f"{module} {name}" for module, names in _KNOWN.items() for name in names.split()}


class Metadata:
    """The index of a checkpoint as DCP's own storage writes it; see ``Index``.

    Args:
        folder: The checkpoint.
        name: One of its :func:`metadata_files`.

    Raises:
        RNGStateError: It is damaged, malformed, or wants something that DCP never stores there.
        OSError: It cannot be read.
    """

    def __init__(self, folder: Folder, name: str) -> None:
        self._name = folder.path_of(name)
        metadata = _parse(folder.read(name, 0, folder.sizes[name]), self._name)
        self.files: set[str] = set()
        self._places: dict[str, dict[tuple[int, ...] | None, Made]] = {}
        self._given: set[int] = set()
        with malformed_if_wrong(self._name):
            self._saved = typed(_attribute(metadata, "state_dict_metadata"), dict)
            self.keys = {short(key): _stored(value) for key, value in self._saved.items()}
            for index, place in typed(_attribute(metadata, "storage_data"), dict).items():
                offset = _attribute(index, "offset", None)
                where = None if offset is None else _size(offset)
                self._places.setdefault(short(_attribute(index, "fqn")), {})[where] = place
                self.files.add(short(_attribute(place, "relative_path")))

    def chunks(self, key: str) -> list[Chunk]:
        with malformed_if_wrong(self._name):
            places = self._places.get(key, {})
            if self.keys[key].dtype is None:
                return [_chunk((), (), places.get(None))]
            parts = typed(_attribute(self._saved[key], "chunks"), list)
            chunks = []
            for thing in (parts, *parts):
                # What is named again and again would take more time than the file has bytes.
                if id(thing) in self._given:
                    raise ValueError("one chunk is in two places")
                self._given.add(id(thing))
            for part in parts:
                offsets, sizes = (_size(_attribute(part, name)) for name in ("offsets", "sizes"))
                chunks.append(_chunk(offsets, sizes, places.get(offsets)))
            return chunks


def metadata_files(folder: Folder) -> dict[int | None, str]:
    """Return the files in which DCP says what a folder holds, by the rank that reads each.

    ``None`` is all ranks: if that one is there, ``dcp.load`` reads no other.
    """
    if _OF_ALL_RANKS in folder.sizes:
        return {None: _OF_ALL_RANKS}
    matches = filter(None, map(_OF_A_RANK.fullmatch, folder.sizes))
    return dict(sorted((int(match[1]), match[0]) for match in matches))


def _is_known(name: str) -> bool:
    return name in _NAMES or bool(_DTYPE.fullmatch(name))


def _may_be_stored(name: str) -> bool:
    """Return whether it may be a class of another package's storage writer."""
    root = name.partition(" ")[0].partition(".")[0]
    return root not in {"torch", "numpy", *sys.stdlib_module_names}


def _parse(content: bytes, name: str) -> Made:
    try:
        found = parse(content, _is_known, _may_be_stored)
    except ForbiddenError as error:
        raise RNGStateError(
            f"refused: {name} wants {error}, which DCP never stores there. Nothing in it was "
            "executed. If your own storage writer does not store that, do not load this checkpoint."
        ) from error
    except ValueError as error:
        raise RNGStateError(f"{name} is damaged or truncated ({error})") from error
    if not isinstance(found, Made):
        raise RNGStateError(f"{name} holds {type(found).__name__}, expected DCP's Metadata")
    return found


def _attribute(thing: Any, attribute: str, *default: Any) -> Any:
    """Return an attribute of what a pickle would have built."""
    state = typed(thing, Made).state
    if isinstance(state, dict) and attribute in state:
        return state[attribute]
    if default:
        return default[0]
    raise ValueError(f"a {thing.name.rpartition(' ')[2]} has no {attribute}")


def _stored(saved: Any) -> Stored:
    if isinstance(saved, Made) and saved.name.endswith(" BytesStorageMetadata"):
        return Stored(None, ())
    # TensorProperties hands pickle a tuple, of which the dtype is the first.
    match _attribute(saved, "properties"):
        case Made(state=(Global(dtype), *_)) if _DTYPE.fullmatch(dtype):
            return Stored(dtype.removeprefix("torch "), _size(_attribute(saved, "size")))
    raise ValueError("a tensor has no dtype")


def _chunk(offsets: tuple[int, ...], sizes: tuple[int, ...], place: Any) -> Chunk:
    if place is None:
        return Chunk(offsets, sizes)
    start, length = integers((_attribute(place, "offset"), _attribute(place, "length")))
    return Chunk(offsets, sizes, short(_attribute(place, "relative_path")), start, length)


def _size(value: Any) -> tuple[int, ...]:
    match value:
        case Made("torch Size", (sizes,)):
            return integers(sizes)
    return integers(value)
