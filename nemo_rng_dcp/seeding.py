"""Seeds: what is a valid one, seeding every global generator, and seeds by what they are for."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Mapping
from functools import lru_cache

import numpy as np
import torch

from nemo_rng_dcp.generators.mt19937 import SEED_LIMIT, MT19937State
from nemo_rng_dcp.ranks import seed_rank

MAX_BITS = 64
"""The longest seed that a library takes: ``torch.manual_seed`` for an accelerator."""


def check_seed(seed: int, offset: int = 0) -> int:
    """Return ``seed + offset`` as an int.

    Args:
        seed: A Python or NumPy integer, no ``bool``; ``0 <= seed`` and ``seed + offset < 2**32``.
        offset: What to add, such as a rank; >= 0.

    Raises:
        ValueError: The seed is no integer or out of range.
    """
    if not is_integer(seed):
        raise ValueError(
            f"the seed is {seed!r} ({type(seed).__name__}), expected an integer from 0 to 2**32 - 1"
        )
    if not 0 <= int(seed) < SEED_LIMIT - offset:
        added = f" and the rank or row adds {offset}" if offset else ""
        raise ValueError(
            f"the seed is {seed}{added}: expected 0 <= seed and seed + rank <= 2**32 - 1"
        )
    return int(seed) + offset


def is_integer(value: object) -> bool:
    """Return whether a value is a Python or NumPy integer; a ``bool`` is none."""
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def check_ranked(ranked: bool) -> bool:
    """Return ``ranked``, refusing anything but a bool.

    Raises:
        TypeError: ``ranked`` is no bool. A rank passed by mistake would read as true.
    """
    if not isinstance(ranked, bool):
        raise TypeError(f"ranked is {ranked!r} ({type(ranked).__name__}), expected True or False")
    return ranked


def check_logical_ranks(logical_ranks: int | None, ranked: bool) -> int | None:
    """Return ``logical_ranks`` as an int, or ``None``.

    Raises:
        TypeError: It is no integer.
        ValueError: It is less than 1, or given without ``ranked``.
    """
    if logical_ranks is None:
        return None
    if not is_integer(logical_ranks):
        raise TypeError(
            f"logical_ranks is {logical_ranks!r} ({type(logical_ranks).__name__}), expected an "
            "integer or None"
        )
    if logical_ranks < 1:
        raise ValueError(f"logical_ranks is {logical_ranks}, expected at least 1")
    if not ranked:
        raise ValueError(
            f"logical_ranks={logical_ranks} needs ranked=True: logical ranks that draw the same "
            "numbers need no streams of their own"
        )
    return int(logical_ranks)


def seed_all(seed: int) -> None:
    """Seed Python's, NumPy's and torch's global generators with a seed that was checked.

    ``torch.manual_seed`` reaches torch's CPU generator and every visible accelerator device; a
    device that is not initialised yet gets its seed when it is.
    """
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def init_all_rng(seed: int, ranked: bool = False) -> None:
    """Seed ``random``, NumPy's global generator, torch CPU and every accelerator device.

    Any rank may call it, alone; it does not communicate.

    Args:
        seed: An integer (NumPy's too, ``bool`` not), ``0 <= seed`` and ``seed + rank < 2**32``.
        ranked: Add the global rank to the seed, so that ranks draw different numbers. The rank is
            the default process group's, before that torchrun's ``RANK``, else 0. Runs with
            neighbouring seeds then share streams: choose seeds by :func:`derive_seed`.

    Raises:
        ValueError: The seed is no integer or out of range. Nothing was seeded.
        TypeError: ``ranked`` is no bool. Nothing was seeded.

    Example:
        >>> import random
        >>> init_all_rng(42)
        >>> first = random.random()
        >>> init_all_rng(42)
        >>> random.random() == first
        True
    """
    seed_all(check_seed(seed, seed_rank() if check_ranked(ranked) else 0))


def derive_seed(seed: int, *path: int | str, bits: int = 32) -> int:
    """Return the seed for one purpose of a job, which depends on nothing but the arguments.

    The path names what the numbers are for: ``derive_seed(seed, "augment", epoch, sample_index)``.
    Any rank or worker gets the same numbers, however many there are.
    No stream moves and nothing communicates, so any rank may call it at any time.

    The mapping will never change, and it is the same on every platform: BLAKE2b with an 8-byte
    digest and the personalization ``nemo_rng_dcp`` over the seed and the path, element after
    element: ``i`` or ``s``, the number of bytes that follow (8 bytes), then an integer in the
    fewest bytes of two's complement that hold it, or a string in UTF-8. All of it, and the digest
    as well, is little-endian. So ``1`` and ``"1"``, ``("ab", "c")`` and ``("a", "bc")``, and paths
    of different lengths are different inputs.

    Args:
        seed: An integer >= 0 of any size (NumPy's too, ``bool`` not), the job's or a derived one.
        path: Integers of any size and sign, and strings. A string counts by its code points:
            nothing is normalized.
        bits: Length of the result, 1 to 64. Results of different lengths are one number cut off:
            the ``bits`` low bits of the 64. Most libraries take 32.

    Returns:
        ``0 <= result < 2**bits``.

    Raises:
        ValueError: The seed is no integer or negative, or ``bits`` is out of range.
        TypeError: An element of the path is neither an integer nor a string, or ``bits`` is no
            integer.

    Example:
        >>> derive_seed(42, "shuffle", 0)
        4087576169
        >>> derive_seed(42, "shuffle", 1)
        2980580437
        >>> order = torch.Generator().manual_seed(derive_seed(42, "shuffle", 0))
    """
    if not is_integer(seed) or seed < 0:
        raise ValueError(
            f"the seed is {seed!r} ({type(seed).__name__}), expected an integer of at least 0"
        )
    if not is_integer(bits):
        raise TypeError(f"bits is {bits!r} ({type(bits).__name__}), expected an integer")
    if not 1 <= bits <= MAX_BITS:
        raise ValueError(f"bits is {bits}, expected 1 to {MAX_BITS}")
    return _derived(seed, b"".join(map(_encode, path)), int(bits))


def derive_seeds(seeds: Mapping[str, int], *path: int | str, bits: int) -> dict[str, int]:
    """Return by name what :func:`derive_seed` gives of several seeds, unchecked, and one path."""
    encoded = b"".join(map(_encode, path))
    return {name: _derived(seed, encoded, bits) for name, seed in seeds.items()}


def seed_worker(worker_id: int) -> None:
    """Seed Python's, NumPy's and torch CPU's global generators in a DataLoader worker.

    For ``DataLoader(worker_init_fn=seed_worker)``. Everything derives from torch's worker seed,
    ``torch.initial_seed()`` in the worker: 63 bits, drawn for every iterator from the loader's
    ``generator``, or from torch's global one, plus the worker's number. So workers of all ranks
    differ where that generator does (``ranked=True``, or a seed that contains the rank), and ranks
    that share a stream, such as tensor-parallel peers, have workers that agree.

    torch's CPU generator uses 32 bits of its seed, and so does ``np.random.seed(number)``: of
    10,000 workers seeded so, two draw the same numbers in about one epoch of a hundred. Here each
    of the three generators starts from 64 bits of its own. An accelerator's generator, which uses
    all of its seed, keeps the one that torch gave it.

    Runs in the worker and does not communicate. In any other process it does the same, from that
    process's ``torch.initial_seed()``, which it leaves as it is.

    Args:
        worker_id: Not used: the worker seed contains it.

    Example:
        >>> from torch.utils.data import DataLoader
        >>> loader = DataLoader(range(8), num_workers=2, worker_init_fn=seed_worker)
    """
    worker_seed = torch.initial_seed()
    random.setstate(_stream(worker_seed, "python").to_python())
    np.random.set_state(_stream(worker_seed, "numpy").to_numpy())
    # torch.initial_seed() still tells the worker's seed to whoever seeds another library from it.
    torch.set_rng_state(_stream(worker_seed, "torch").to_torch(initial_seed=worker_seed))


def _derived(seed: int, encoded: bytes, bits: int) -> int:
    digest = _begun_with(seed).copy()
    digest.update(encoded)
    return int.from_bytes(digest.digest(), "little") & ((1 << bits) - 1)


@lru_cache  # a job derives from a few seeds, and a loader from the same ones for every batch
def _begun_with(seed: int) -> hashlib.blake2b:
    return hashlib.blake2b(_encode(seed), digest_size=MAX_BITS // 8, person=b"nemo_rng_dcp")


def _encode(element: int | str) -> bytes:
    """Return a string of bytes that no other element begins with."""
    if isinstance(element, str):
        # Names of files may hold lone surrogates, which strict UTF-8 refuses.
        kind, content = b"s", element.encode("utf-8", "surrogatepass")
    elif is_integer(element):
        number = int(element)
        # One bit for the sign; ~n of a negative n because -128 fits a byte and 128 does not.
        size = max(number, ~number).bit_length() // 8 + 1
        kind, content = b"i", number.to_bytes(size, "little", signed=True)
    else:
        raise TypeError(
            f"the path holds {element!r} ({type(element).__name__}), expected integers and "
            "strings: write a float as a string, and other things by a name or number of theirs"
        )
    return kind + len(content).to_bytes(8, "little") + content


def _stream(worker_seed: int, library: str) -> MT19937State:
    """Return where a library's stream begins in the worker with this seed."""
    return MT19937State.from_seed(derive_seed(worker_seed, "worker", library, bits=64))
