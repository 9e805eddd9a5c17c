"""Activation checkpointing: the recomputation draws what the forward drew."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from types import TracebackType
from typing import Any

import torch
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from nemo_rng_dcp.generators import GeneratorSet, States

Contexts = tuple[AbstractContextManager[Any], AbstractContextManager[Any]]
"""What ``context_fn`` of ``torch.utils.checkpoint.checkpoint`` returns: forward, recomputation."""

ContextFn = Callable[..., Contexts]


def recompute_of(generators: GeneratorSet) -> ContextFn:
    """Return the function that :attr:`StatefulRNG.recompute` is, for these generators.

    It is a plain function: ``torch.compile`` takes no bound method as ``context_fn``.
    """

    def recompute(context_fn: Callable[[], Contexts] | None = None) -> Contexts:
        if torch.compiler.is_compiling() or _is_traced():
            # The draws become part of the graph, and torch insists on dispatch modes.
            return _recompute_all() if context_fn is None else context_fn()
        inner = (nullcontext(), nullcontext()) if context_fn is None else context_fn()
        forward = _Forward(generators, inner[0])
        return forward, _Recomputation(forward, inner[1])

    return recompute


class _Forward:
    """Remembers the streams with which a forward begins."""

    states: States

    def __init__(self, generators: GeneratorSet, inner: AbstractContextManager[Any]) -> None:
        self.generators = generators
        self._inner = inner

    def __enter__(self) -> None:
        self.states = self.generators.in_this_scope().take()
        self._inner.__enter__()

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        traceback: TracebackType | None,
    ) -> bool | None:
        return self._inner.__exit__(exc_type, exc_value, traceback)


class _Recomputation:
    """Begins with the streams of its forward, and puts back those from before it.

    It is entered once for each backward through the block (``retain_graph=True``).
    """

    def __init__(self, forward: _Forward, inner: AbstractContextManager[Any]) -> None:
        self._forward = forward
        self._inner = inner
        self._outside: list[tuple[GeneratorSet, States]] = []

    def __enter__(self) -> None:
        generators = self._forward.generators.in_this_scope()
        outside = generators.take()
        generators.restore(self._forward.states)
        try:
            self._inner.__enter__()
        except BaseException:
            generators.restore(outside)
            raise
        self._outside.append((generators, outside))

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        traceback: TracebackType | None,
    ) -> bool | None:
        # Mostly with an exception: by one, torch ends a recomputation that has got all it needs.
        try:
            return self._inner.__exit__(exc_type, exc_value, traceback)
        finally:
            generators, outside = self._outside.pop()
            generators.restore(outside)


def _is_traced() -> bool:
    """Return what torch 2.9 asks before it insists; ``is_compiling()`` is false there by then."""
    asks: Any = getattr(torch.utils.checkpoint, "_is_compiling", None)
    return asks is not None and bool(asks(None, (), {}))


def _recompute_all() -> Contexts:
    """Return what torch.compile uses for a checkpoint without ``context_fn``."""

    def policy(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        return CheckpointPolicy.PREFER_RECOMPUTE

    contexts: Contexts = create_selective_checkpoint_contexts(policy)  # type: ignore[no-untyped-call]
    return contexts
