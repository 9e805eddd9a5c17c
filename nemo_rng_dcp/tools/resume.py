"""What a resume on another number of ranks or another mesh would do, without running it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

from nemo_rng_dcp.layout import row_major, source_row
from nemo_rng_dcp.rows import fingerprint, fork_seed
from nemo_rng_dcp.tools.findings import Streams, private_generators

CONTINUED, FORKED, DROPPED, REFUSED = "continued", "forked", "dropped", "refused"


@dataclass(frozen=True)
class Fate:
    """What becomes of one row's streams.

    Attributes:
        row: The row of the resumed job; of the checkpoint if it is dropped.
        ranks: The ranks of the resumed job that have this row.
        fate: ``continued``, ``forked``, ``dropped`` or, if a load would raise, ``refused``.
        source: The saved row that it is made from.
        digests: By generator what ``StatefulRNG.fingerprint()`` will say after the load; of forked
            streams only Python's, NumPy's and torch CPU's.
    """

    row: int
    ranks: tuple[int, ...]
    fate: str
    source: int
    digests: Mapping[str, str]


@dataclass(frozen=True)
class Resume:
    """What becomes of one RNG entry.

    Attributes:
        key: The dotted path of the entry.
        rows_saved: Rows in the checkpoint.
        rows: Rows of the resumed job.
        absent: Generators of the resumed job that the checkpoint lacks: they stay as they are.
        ignored: Tables of the checkpoint for which the resumed job has no generator.
        fates: One for each row of the resumed job, then one for each dropped row.
    """

    key: str
    rows_saved: int
    rows: int
    absent: list[str]
    ignored: list[str]
    fates: list[Fate]

    @property
    def needs_planner(self) -> bool:
        """Whether ``dcp.load`` needs ``RNGLoadPlanner``."""
        return self.rows != self.rows_saved or bool(self.absent)


def rows_of_ranks(
    world_size: int, mesh: Mapping[str, int] | None, along: Sequence[str] | None
) -> dict[int, tuple[int, ...]]:
    """Return the ranks that have each row, as ``StatefulRNG(mesh=mesh[along])`` gives them out.

    Args:
        world_size: Ranks of the job, >= 1.
        mesh: Sizes by name of the dimension, as for ``init_device_mesh``; ``None``: one row a rank.
        along: The dimensions along which streams differ; ``None``: all.

    Raises:
        ValueError: The mesh does not have as many ranks, or no such dimension.
    """
    mesh = dict(mesh or {"rank": world_size})
    if prod(mesh.values()) != world_size:
        text = " x ".join(map(str, mesh.values()))
        raise ValueError(f"a mesh of {text} has {prod(mesh.values())} ranks, not {world_size}")
    unknown = [name for name in along or () if name not in mesh]
    if unknown:
        raise ValueError(f"the mesh has no dimension {unknown[0]!r}, only {', '.join(mesh)}")
    names = [name for name in mesh if along is None or name in along]
    ranks: dict[int, list[int]] = {}
    for rank in range(world_size):
        coordinate, rest = {}, rank
        for name in reversed(mesh):
            rest, coordinate[name] = divmod(rest, mesh[name])
        row = row_major([coordinate[name] for name in names], [mesh[name] for name in names])
        ranks.setdefault(row, []).append(rank)
    return {row: tuple(those) for row, those in sorted(ranks.items())}


def predict(
    streams: Streams,
    ranks: Mapping[int, tuple[int, ...]],
    *,
    ranked: bool | None = None,
    generators: Sequence[str] | None = None,
) -> Resume:
    """Return what a load would do to an entry.

    Args:
        streams: The entry.
        ranks: The ranks that have each row, see :func:`rows_of_ranks`.
        ranked: What the resumed job gives ``StatefulRNG``; ``None``: what the saved one gave.
        generators: What the resumed job has; ``None``: Python, NumPy, torch and what was saved.
    """
    names = generators or dict.fromkeys([*private_generators(), *streams.generators])
    fates = [_fate(streams, row, len(ranks), those, ranked, names) for row, those in ranks.items()]
    for row in range(len(ranks), streams.count):
        fates.append(Fate(row, (), DROPPED, row, {}))
    return Resume(
        streams.key,
        streams.count,
        len(ranks),
        [name for name in names if name not in streams.generators],
        [name for name in streams.generators if name not in names],
        fates,
    )


def _fate(
    streams: Streams,
    row: int,
    rows: int,
    ranks: tuple[int, ...],
    ranked: bool | None,
    names: Sequence[str] | Mapping[str, None],
) -> Fate:
    source = source_row(row, streams.count)
    origin, states = streams.origins.get(source), streams.states.get(source, {})
    wanted = [name for name in names if name in streams.generators]
    if origin is None or any(name not in states for name in wanted):
        return Fate(row, ranks, REFUSED, source, {})
    if not origin.forks(row, bool(origin.ranked) if ranked is None else ranked):
        digests = {name: streams.digests[source][name] for name in wanted}
        return Fate(row, ranks, CONTINUED, source, digests)
    forked = {}
    for name, generator in private_generators().items():
        if name in wanted:
            generator.seed(fork_seed(name, row, origin.resizes_on(rows), states[name]))
            forked[name] = fingerprint(generator.read())
    return Fate(row, ranks, FORKED, source, forked)
