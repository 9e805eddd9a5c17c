"""A rewind right before the first training forward, after whatever draws while a job resumes."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.utils.checkpoint
from torch.utils.hooks import RemovableHandle


class FirstForward:
    """Rewinds once, before the forward of a module that counts while a rewind is due.

    Args:
        is_due: Whether there is something to rewind; asked before each forward.
        rewind: Called once, whichever module is the first; the others are then released.

    Attributes:
        names: The classes of the modules that are waited for; empty: of none.
    """

    def __init__(self, is_due: Callable[[], bool], rewind: Callable[[], None]) -> None:
        self._is_due, self._rewind = is_due, rewind
        self._handles: list[RemovableHandle] = []
        self.names: list[str] = []

    def wait_for(
        self,
        model: torch.nn.Module | Sequence[torch.nn.Module],
        when: Callable[[torch.nn.Module], bool] | None,
    ) -> None:
        """Wait for one module more.

        Args:
            model: The module, or a list of parts.
            when: Whether the forward that a module is about to run counts. ``None``: it does in
                training mode with gradients enabled.

        Raises:
            TypeError: Something is no module with a forward, or there is none.
            RuntimeError: In that forward: it runs inside an activation checkpoint, which has kept
                the streams from before the rewind and would run the forward again with those.
        """
        # A ModuleList has no forward of its own; the parts of a pipeline may come as one.
        parts: list[Any]
        parts = list(model) if isinstance(model, (Sequence, torch.nn.ModuleList)) else [model]
        for part in parts or [model]:
            if not isinstance(part, torch.nn.Module) or _never_runs(part):
                name = type(part).__name__
                raise TypeError(f"found a {name}, expected a torch module with a forward")
        counts = _trains if when is None else when

        # Where a module is compiled in place with fullgraph=True, tracing the hook would be an
        # error.
        @torch.compiler.disable  # type: ignore[untyped-decorator]
        def hook(module: torch.nn.Module, args: Any) -> None:
            if not self._is_due() or not counts(module):
                return
            if _in_activation_checkpoint():
                raise RuntimeError(
                    f"the first forward of {type(module).__name__} runs inside an activation "
                    "checkpoint, which would run it again in the backward with the streams from "
                    "before the rewind. Give rewind_at_first_forward() the module that the "
                    "training step calls, or call rewind() right before that."
                )
            self.release()
            self._rewind()

        # Before hooks that draw: what they draw is part of the forward.
        self._handles += [part.register_forward_pre_hook(hook, prepend=True) for part in parts]
        self.names += [type(part).__name__ for part in parts]

    def release(self) -> None:
        """Wait no longer."""
        for handle in self._handles:
            handle.remove()
        self._handles, self.names = [], []


def _trains(module: torch.nn.Module) -> bool:
    # The reentrant kind of activation checkpoint runs a training forward without gradients.
    return module.training and (torch.is_grad_enabled() or _in_activation_checkpoint())


def _never_runs(module: torch.nn.Module) -> bool:
    # Asked of the object, since torch.compile() gives it its forward.
    return getattr(module.forward, "__func__", None) is torch.nn.Module.forward


def _in_activation_checkpoint() -> bool:
    names = (frame.f_globals.get("__name__") for frame, _ in traceback.walk_stack(None))
    return torch.utils.checkpoint.__name__ in names
