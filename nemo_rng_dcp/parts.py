"""What a loader consists of: samplers, datasets, and whatever these keep."""

from __future__ import annotations

import contextlib
import functools
import types
from collections import deque
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

MOST_PARTS = 10_000
"""A loader is looked at as far as this, so that a look takes milliseconds."""

LONGEST = 100
"""A longer list holds samples, and is not looked into."""

_WITHOUT_PARTS = (
    *(type(None), bool, int, float, str, bytes, type, types.ModuleType),
    *(np.ndarray, torch.Tensor),
)


class Part(NamedTuple):
    """An object that a loader's batches may come from.

    Attributes:
        name: The attributes that lead to it: an identifier, the same in each process.
        value: The object.
        is_data: Whether it makes samples or batches, and not their order.
        is_told: Whether it is the loader, a sampler or a dataset, and so is told the epoch.
    """

    name: str
    value: Any
    is_data: bool
    is_told: bool

    def inside(self) -> Iterator[Part]:
        """Yield what it keeps: attributes, elements, what a function was made with."""
        for number, (name, value) in enumerate(_kept_by(self.value)):
            if isinstance(value, _WITHOUT_PARTS):
                continue
            # A sampler or a dataset may be of any class.
            is_data = name in ("dataset", "collate_fn") or isinstance(value, Dataset)
            is_known = is_data or name in ("sampler", "batch_sampler")
            yield Part(
                f"{self.name}_{name if name.isidentifier() else number}",
                value,
                self.is_data or is_data,
                self.is_told and (is_known or isinstance(value, (DataLoader, Sampler))),
            )


def check_that_it_can_be_repeated(loader: Any) -> None:
    """Check that a loader can be gone through again, with the same batches.

    Raises:
        TypeError: It can be gone through once only, or is no iterable.
        ValueError: Its workers would give other batches.
    """
    kind = type(loader).__name__
    if isinstance(loader, types.FunctionType) or not hasattr(type(loader), "__iter__"):
        raise TypeError(
            f"loader is a {kind}, expected an iterable such as a DataLoader. Give a generator "
            "function as an object whose __iter__ calls it."
        )
    if hasattr(type(loader), "__next__"):
        raise TypeError(
            f"loader is a {kind}, an iterator: it can be gone through once only. Give what it was "
            "made from, such as the DataLoader."
        )
    if getattr(loader, "persistent_workers", False):
        raise ValueError(
            "the loader has persistent_workers=True: torch seeds such workers once, in the first "
            "epoch, so a later epoch cannot be repeated. Leave it out."
        )
    if getattr(loader, "num_workers", 0) > 1 and not getattr(loader, "in_order", True):
        raise ValueError(
            "the loader has in_order=False and several workers: which batch comes next depends on "
            "which worker is faster. Leave it out."
        )


def parts_of(loader: Any) -> Iterator[Part]:
    """Yield a loader and what is inside of it, each object once, those nearest to it first."""
    seen: dict[int, Any] = {}
    waiting = deque([Part("_loader", loader, False, True)])
    while waiting and len(seen) < MOST_PARTS:
        part = waiting.popleft()
        if id(part.value) not in seen:
            seen[id(part.value)] = part.value
            yield part
            waiting.extend(part.inside())


def _kept_by(value: Any) -> Iterator[tuple[str, Any]]:
    kept: list[Any] = []
    if isinstance(value, (list, tuple, dict)) and len(value) <= LONGEST:
        kept = list(value.values()) if isinstance(value, dict) else list(value)
    elif isinstance(value, functools.partial):
        kept = [value.func, value.args, value.keywords]
    elif isinstance(value, types.FunctionType):
        kept = list(value.__defaults__ or ())
        for cell in value.__closure__ or ():
            with contextlib.suppress(ValueError):  # what it names is not defined yet
                kept.append(cell.cell_contents)
    yield from ((str(number), one) for number, one in enumerate(kept))
    yield from ((str(name), one) for name, one in getattr(value, "__dict__", {}).items())
    yield "self", getattr(value, "__self__", None)  # of a method
