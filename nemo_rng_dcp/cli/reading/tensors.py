"""int64 tensors of one dimension, from the bytes that ``torch.save`` or safetensors wrote."""

from __future__ import annotations

import io
import struct
import zipfile
import zlib
from collections.abc import Callable
from contextlib import suppress
from functools import lru_cache

import torch

from nemo_rng_dcp.cli.reading.pickles import ForbiddenError, Global, Made, parse

ARCHIVE_BYTES = 2**16
"""More than ``torch.save`` adds to a tensor's numbers."""

_Reader = Callable[[bytes], bytes | None]
_like_the_last: _Reader | None = None
_KNOWN = {"torch._utils _rebuild_tensor_v2", "torch LongStorage", "collections OrderedDict"}


def pickle_in(archive: zipfile.ZipFile, size: int) -> tuple[str, bytes]:
    """Return the name that ``torch.save`` gave an archive of ``size`` bytes, and its pickle.

    Raises:
        ForbiddenError: A few bytes in it can stand for all of the memory.
        ValueError: It has no such pickle, or several.
    """
    entries = archive.infolist()
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise ForbiddenError("something compressed")
    if sum(entry.file_size for entry in entries) > size:
        raise ForbiddenError("more bytes than the file has")
    (name,) = (name for name in archive.namelist() if name.endswith("/data.pkl"))
    return name.removesuffix("/data.pkl"), archive.read(name)


def from_raw(content: bytes) -> torch.Tensor:
    """Return the numbers that are the whole of ``content``."""
    return torch.frombuffer(bytearray(content), dtype=torch.int64)


def from_archive(content: bytes, count: int) -> torch.Tensor:
    """Return the tensor that ``torch.save`` wrote: int64, shape ``(count,)``, dense.

    Nothing in it is executed.

    Raises:
        ValueError: The bytes are damaged, or are no such tensor.
    """
    global _like_the_last
    numbers = _like_the_last(content) if _like_the_last else None
    try:
        if numbers is None or len(numbers) != 8 * count:
            with zipfile.ZipFile(io.BytesIO(content)) as archive:
                folder, pickled = pickle_in(archive, len(content))
                _check_tensor(pickled, count)
                numbers = archive.read(f"{folder}/data/0")
                with suppress(struct.error):  # what is damaged may be what nobody has read
                    _like_the_last = _reader_like(archive, folder, content)
    except ForbiddenError as error:
        raise ValueError(f"refused: it holds {error}, expected a tensor") from error
    except Exception as error:  # zipfile runs into many in damaged bytes
        raise ValueError(f"no tensor that torch.save wrote ({error})") from error
    if len(numbers) != 8 * count:
        raise ValueError(f"{len(numbers)} bytes for {count} numbers")
    return from_raw(numbers)


def _reader_like(archive: zipfile.ZipFile, folder: str, content: bytes) -> _Reader | None:
    """Return what reads archives that differ from a good one in numbers and checksums alone.

    It returns their numbers; ``None`` where more differs or the numbers do not fit their checksum.
    To take each apart takes 0.2 ms, more than all else that is done with a record.
    """
    # Of the second one, a hash of all, nobody reads more than where it is.
    data, other_data = f"{folder}/data/0", f"{folder}/.data/serialization_id"
    entries, place, edges, listed = archive.infolist(), archive.start_dir, [0], list[int]()
    for part, end in zip(entries, [*(e.header_offset for e in entries[1:]), place], strict=True):
        start = (at := part.header_offset) + 30 + sum(struct.unpack_from("<2H", content, at + 26))
        if start + part.file_size > end:
            return None  # parts overlap
        if part.filename in (data, other_data):
            edges, listed = [*edges, start, end], [*listed, place + 16, place + 20]
        if part.filename == data:
            numbers, checksum = slice(start, start + part.file_size), slice(*listed[-2:])
        place += 46 + sum(struct.unpack_from("<3H", content, place + 28))
    edges = [*edges, *listed, len(content)]
    pieces = [slice(*ends) for ends in zip(edges[::2], edges[1::2], strict=True)]

    def read(other: bytes) -> bytes | None:
        alike = len(other) == len(content) and all(other[p] == content[p] for p in pieces)
        fits = zlib.crc32(other[numbers]) == int.from_bytes(other[checksum], "little")
        return other[numbers] if alike and fits else None

    return read


@lru_cache(maxsize=8)
def _check_tensor(pickled: bytes, count: int) -> None:
    """Make sure that a tensor's pickle says nothing but "these numbers, in this order"."""
    match parse(pickled, _KNOWN.__contains__):
        case Made(
            "torch._utils _rebuild_tensor_v2",
            (Made("", (("storage", Global("torch LongStorage"), "0", _, _),)), 0, size, (1,), *_),
            None,
        ) if size == (count,):
            return
        case Made():
            raise ForbiddenError(f"another tensor than int64 ({count},)")
    raise ForbiddenError("something else than a tensor")
