"""How the RNG entries of two checkpoints differ."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from nemo_rng_dcp.origin import version_text
from nemo_rng_dcp.tools.findings import Streams


@dataclass
class Comparison:
    """How one entry differs between two checkpoints, A and B.

    Attributes:
        key: The dotted path of the entry.
        compared: Rows that at least one of them has, and of which nothing is damaged in either.
        differing: By row and generator, the digests in A and in B, "-" where there is none; only
            what differs.
        remarks: What else is different; it makes no stream another one.
        damaged: By "A" and "B" how many rows are missing or damaged and were not compared.
    """

    key: str
    compared: int = 0
    differing: dict[int, dict[str, tuple[str, str]]] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)
    damaged: dict[str, int] = field(default_factory=dict)


def compare(a: Sequence[Streams], b: Sequence[Streams]) -> list[Comparison]:
    """Return a comparison for each entry that A or B has."""
    in_a, in_b = {each.key: each for each in a}, {each.key: each for each in b}
    return [_compare(key, in_a.get(key), in_b.get(key)) for key in dict.fromkeys([*in_a, *in_b])]


def _compare(key: str, a: Streams | None, b: Streams | None) -> Comparison:
    found = Comparison(key, remarks=_remarks(a, b))
    good_a, good_b = _good_rows(a), _good_rows(b)
    for side, streams, good in (("A", a, good_a), ("B", b, good_b)):
        found.damaged[side] = (streams.count if streams else 0) - len(good)
    for row in sorted(good_a.keys() | good_b.keys()):
        # A damaged row is no difference: nobody knows what it was.
        if any(s and row < s.count and row not in g for s, g in ((a, good_a), (b, good_b))):
            continue
        found.compared += 1
        in_a, in_b = good_a.get(row, {}), good_b.get(row, {})
        differing = {
            name: (in_a.get(name, "-"), in_b.get(name, "-"))
            for name in dict.fromkeys([*in_a, *in_b])
            if in_a.get(name) != in_b.get(name)
        }
        if differing:
            found.differing[row] = differing
    return found


def _good_rows(streams: Streams | None) -> dict[int, dict[str, str]]:
    """Return the digests of the rows of which nothing is missing or damaged."""
    if streams is None:
        return {}
    names = set(streams.generators)
    return {row: its for row, its in streams.digests.items() if its.keys() == names}


def _remarks(a: Streams | None, b: Streams | None) -> list[str]:
    if a is None or b is None:
        return [f"only in {'B' if a is None else 'A'}"]
    if not a.origins or not b.origins:
        return []
    first, second = next(iter(a.origins.values())), next(iter(b.origins.values()))
    remarks = []
    for name in ("rows", "world_size", "seed", "ranked", "resizes"):
        pair = getattr(first, name), getattr(second, name)
        if pair[0] != pair[1]:
            remarks.append(f"{name.replace('_', ' ')} {pair[0]} in A, {pair[1]} in B")
    for name in ("python", "numpy", "torch"):
        pair = getattr(first, f"{name}_version"), getattr(second, f"{name}_version")
        if pair[0] != pair[1]:
            remarks.append(f"{name} {version_text(pair[0])} in A, {version_text(pair[1])} in B")
    return remarks
