"""A rewind right before the model's first forward, after whatever draws while a job resumes."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.utils.checkpoint


def rewind_at_first_forward(
    parts: Sequence[torch.nn.Module], is_loaded: Callable[[], bool], rewind: Callable[[], None]
) -> None:
    """Call ``rewind`` once, before the first forward of any of the modules for which it is loaded.

    Raises:
        TypeError: Something is no module.
        RuntimeError: In that forward: it runs inside an activation checkpoint, which has kept the
            streams from before the rewind and would run the forward again with those.
    """
    for part in parts:
        if not isinstance(part, torch.nn.Module):
            raise TypeError(f"found a {type(part).__name__}, expected torch modules")

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


def _in_activation_checkpoint() -> bool:
    names = (frame.f_globals.get("__name__") for frame, _ in traceback.walk_stack(None))
    return torch.utils.checkpoint.__name__ in names
