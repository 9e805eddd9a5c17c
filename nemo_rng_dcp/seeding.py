"""Seeds: what is a valid one, and one call that seeds every global generator."""

from __future__ import annotations

import random

import numpy as np
import torch

from nemo_rng_dcp.layout import global_rank

SEED_LIMIT = 2**32
"""Seeds are below this, because ``numpy.random.seed`` takes no larger ones."""


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
            the default process group's, before that torchrun's ``RANK``, else 0.

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
    seed_all(check_seed(seed, global_rank() if check_ranked(ranked) else 0))
