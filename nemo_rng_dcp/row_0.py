"""Whether row 0 has the generators of this row, and so says what this row would say.

``load_state_dict`` does not communicate. But DCP gathers and scatters the plans of a load, and ours
carry the names of the generators to the coordinator and those of row 0 back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.distributed.checkpoint import LoadPlan

_ALIKE = "_has_the_generators_of_row_0"


@dataclass(frozen=True)
class _Data:
    """A plan's data: the wrapped planner's, and names of generators by entry's key and row."""

    inner: Any
    names: Mapping[tuple[str, int], frozenset[str]]


def tell(plan: LoadPlan, names: Mapping[tuple[str, int], Iterable[str]]) -> LoadPlan:
    """Return a rank's plan that carries the names of its generators, by entry's key and row."""
    known = {place: frozenset(listed) for place, listed in names.items()}
    return replace(plan, planner_data=_Data(plan.planner_data, known))


def spread(
    plans: list[LoadPlan], create_global_plan: Callable[[list[LoadPlan]], list[LoadPlan]]
) -> list[LoadPlan]:
    """Return what the wrapped planner makes of all plans, with the names of row 0 in each."""
    told = [place for plan in plans for place in _data(plan).names.items()]
    of_row_0 = {place: names for place, names in told if not place[1]}
    inner = [replace(plan, planner_data=_data(plan).inner) for plan in plans]
    return [tell(plan, of_row_0) for plan in create_global_plan(inner)]


def hear(plan: LoadPlan, entries: Mapping[str, tuple[torch.Tensor, Iterable[str]]]) -> LoadPlan:
    """Take the names of row 0 out of a rank's plan, and note for each entry if they are the same.

    Args:
        plan: From :func:`spread`.
        entries: By key, what is loaded, and the names of this rank's generators.
    """
    data = _data(plan)
    for key, (table, names) in entries.items():
        # On the tensor itself: of a copy nobody knows, and its row speaks for itself.
        setattr(table, _ALIKE, data.names.get((key, 0)) == frozenset(names))
    return replace(plan, planner_data=data.inner)


def has_its_generators(table: torch.Tensor) -> bool:
    """Return whether row 0 is known to have the generators of the rank that loaded a table."""
    return bool(getattr(table, _ALIKE, None))


def _data(plan: LoadPlan) -> _Data:
    # A storage reader may have made the plan anew.
    data = plan.planner_data
    return data if isinstance(data, _Data) else _Data(data, {})
