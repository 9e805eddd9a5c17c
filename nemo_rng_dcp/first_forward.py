"""A rewind right before the model's first forward, after whatever draws while a job resumes."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.utils.checkpoint


def rewind_at_first_forward(
    model: torch.nn.Module | Sequence[torch.nn.Module],
    is_loaded: Callable[[], bool],
    rewind: Callable[[], None],
) -> None:
    """Call ``rewind`` once, before the first forward of a module for which something is loaded.

    Args:
        model: The module, or a list of parts of which the one that runs first rewinds.
        is_loaded: Whether there is something to rewind to; asked before each forward.
        rewind: Called once.

    Raises:
        TypeError: Something is no module with a forward, or there is none.
        RuntimeError: In that forward: it runs inside an activation checkpoint, which has kept the
            streams from before the rewind and would run the forward again with those.
    """
    # A ModuleList has no forward of its own; the parts of a pipeline may come as one.
    parts: list[Any]
    parts = list(model) if isinstance(model, (Sequence, torch.nn.ModuleList)) else [model]
    for part in parts or [model]:
        if not isinstance(part, torch.nn.Module) or _never_runs(part):
            name = type(part).__name__
            raise TypeError(f"found a {name}, expected a torch module with a forward")

    # Where a module is compiled in place with fullgraph=True, tracing the hook would be an error.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def hook(module: torch.nn.Module, args: Any) -> None:
        if not is_loaded():
            return
        if _in_activation_checkpoint():
            raise RuntimeError(
                f"the first forward of {type(module).__name__} runs inside an activation "
                "checkpoint, which would run it again in the backward with the streams from "
                "before the rewind. Give rewind_at_first_forward() the module that the training "
                "step calls, or call rewind() right before that."
            )
        for handle in handles:
            handle.remove()
        rewind()

    # Before hooks that draw: what they draw is part of the forward.
    handles = [part.register_forward_pre_hook(hook, prepend=True) for part in parts]


def _never_runs(module: torch.nn.Module) -> bool:
    # Asked of the object, since torch.compile() gives it its forward.
    return getattr(module.forward, "__func__", None) is torch.nn.Module.forward


def _in_activation_checkpoint() -> bool:
    names = (frame.f_globals.get("__name__") for frame, _ in traceback.walk_stack(None))
    return torch.utils.checkpoint.__name__ in names
