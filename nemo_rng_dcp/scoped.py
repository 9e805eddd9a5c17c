"""A scope with random streams of its own."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from types import TracebackType
from typing import Any, TypeVar

import torch

from nemo_rng_dcp.errors import caller, warn
from nemo_rng_dcp.generators import GeneratorSet, Parked, device_in_use
from nemo_rng_dcp.ranks import seed_rank
from nemo_rng_dcp.seeding import check_ranked, check_seed

_Function = TypeVar("_Function", bound=Callable[..., Any])


class ScopedRNG:
    """A scope with streams of its own: reseeds on entry, puts every stream back on exit.

    The streams are the global ones of this process: Python, NumPy, torch CPU and the accelerator
    device that is current on entry. They come back after an exception too. Nothing communicates.

    Scopes nest. The streams are global to the process, so draws of other threads inside the scope
    come from its streams and are undone with it. Scopes of several threads, asyncio tasks or
    generator functions may end in another order than they began: the streams outside come back with
    the last one, and the exit warns (``RNGStateWarning``), since draws came from another scope.

    A ``StatefulRNG`` belongs to the scope in which it was constructed. Inside a further scope its
    saves, loads and rewinds act on the streams that come back at the end, and warn.

    Other devices of the process are left alone: they are not seeded, and what is drawn on them
    inside stays drawn. So is the accelerator of a process that has not used it by then, such as a
    DataLoader worker: a scope never initialises it. If it is first used inside, the exit warns
    (``RNGStateWarning``); ``torch.cuda.init()`` before the scope prevents that.

    Also a decorator: each call of the function is then a scope of its own.

    Args:
        seed: An integer, ``0 <= seed`` and ``seed + rank < 2**32``; the draws inside are those
            after ``init_all_rng(seed, ranked)``. ``None`` keeps the streams as they are and only
            puts them back.
        ranked: Add the global rank to the seed; inside ``StatefulRNG.as_rank()`` of a job with
            logical ranks the logical one.

    Raises:
        ValueError: The seed is no integer or out of range.
        TypeError: ``ranked`` is no bool, or a generator or coroutine function is decorated, whose
            body would run after the scope has ended.
        RuntimeError: One object is entered a second time before it was left.
        RNGStateError: NumPy's global generator does not run MT19937.

    Example:
        >>> import torch
        >>> _ = torch.manual_seed(1)
        >>> expected = torch.rand(2)
        >>> _ = torch.manual_seed(1)
        >>> with ScopedRNG(seed=7):
        ...     initial_weights = torch.rand(100)
        >>> torch.equal(torch.rand(2), expected)
        True
    """

    def __init__(self, seed: int | None = 95050, ranked: bool = False) -> None:
        self.seed = None if seed is None else check_seed(seed)
        self.ranked = check_ranked(ranked)
        self._entered: tuple[GeneratorSet, Parked] | None = None

    def __enter__(self) -> ScopedRNG:
        if self._entered is not None:
            raise RuntimeError(
                "this ScopedRNG is entered already and keeps one set of streams to put back: "
                "nest two objects instead"
            )
        seed = self.seed
        if seed is not None:
            seed = check_seed(seed, seed_rank() if self.ranked else 0)
        generators = GeneratorSet(device_in_use())
        place = "compiled code"
        if not torch.compiler.is_compiling():  # its tracer knows no frames, and warns
            file, line = caller()
            place = f"{file}:{line}"
        self._entered = generators, generators.enter(place, seed)
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        assert self._entered is not None
        (generators, parked), self._entered = self._entered, None
        inner = generators.leave(parked)
        if inner is not None:
            warn(
                f"the ScopedRNG entered at {parked.place} ended before the one that was entered "
                f"inside it, at {inner.place}: since then, draws in both came from the inner one's "
                "streams. The streams outside of both come back when the inner one ends. Draw in "
                "the two one after the other, or from generators of their own.",
            )
        device = device_in_use()
        if device is not None and device.type not in generators.slots:
            warn(
                f"{device.type} was first used inside a ScopedRNG, which can cover it "
                "only if it was used before: its draws did not come from the scope's seed, and "
                "its stream was not put back. Use the device once before the scope.",
            )

    def __call__(self, function: _Function) -> _Function:
        if (
            inspect.isgeneratorfunction(function)
            or inspect.iscoroutinefunction(function)
            or inspect.isasyncgenfunction(function)
        ):
            raise TypeError(
                f"{function!r} is a generator or coroutine function: its body runs "
                "after the call returned, outside the scope. Use `with ScopedRNG(...)` inside it."
            )

        @functools.wraps(function)
        def scoped(*args: Any, **kwargs: Any) -> Any:
            # A scope of its own, so that the function may recurse.
            with ScopedRNG(self.seed, self.ranked):
                return function(*args, **kwargs)

        return scoped  # type: ignore[return-value]
