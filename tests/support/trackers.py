"""A tracker of named states, as Megatron-Core and Transformer Engine have one."""

from typing import Any


class Tracker:
    """Its two methods are theirs: the states themselves are handed out."""

    def __init__(self, **states: Any) -> None:
        self.states = {name.replace("_", "-"): state for name, state in states.items()}

    def get_states(self) -> dict[str, Any]:
        return dict(self.states)

    def set_states(self, states: dict[str, Any]) -> None:
        self.states = states
