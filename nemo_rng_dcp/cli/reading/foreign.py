"""RNG state that other code stored, and what it is worth to a resume."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from nemo_rng_dcp.cli.reading.checkpoint import Checkpoint, ranks_that_wrote
from nemo_rng_dcp.cli.reading.index import Stored
from nemo_rng_dcp.cli.reading.keys import MEGATRON_SHARD, find_keys
from nemo_rng_dcp.cli.terminal import numbered

MEGATRON = (
    "Megatron's, one state for each pipeline and tensor rank, with its tracker's CUDA streams: "
    "`nemo-rng-dcp import` does not read it"
)


@dataclass
class ForeignState:
    """RNG state whose keys begin alike.

    Attributes:
        prefix: What the keys have in common, "" at the top level; ``*`` stands for the rank in
            rank-named keys.
        ranks: The ranks that the keys name; none where the keys are the same on every rank.
        contents: By key (without the prefix), what is stored.
        writers: By key, the rank that DCP took the value from, where the file's name says it.
        each_its_own: Whether each rank reads its own value, as after ``use_collectives=False``.
    """

    prefix: str
    ranks: set[int] = field(default_factory=set)
    contents: dict[str, Stored] = field(default_factory=dict)
    writers: dict[str, int] = field(default_factory=dict)
    each_its_own: bool = False

    def missing(self, writers: set[int]) -> set[int]:
        """Return the ranks that should have state of their own here, and have not."""
        return writers - self.ranks if self.ranks else set()

    def lost(self, writers: set[int]) -> bool:
        """Return whether a resume gives ranks other streams than they had."""
        if self.ranks or self.each_its_own:
            return bool(self.missing(writers))
        return len(writers) > 1 and self.prefix != MEGATRON_SHARD

    def notes(self, writers: set[int]) -> Iterator[str]:
        """Say what the state is worth; ``writers`` wrote the checkpoint's files."""
        where = self.prefix or "the top level"
        if self.ranks:
            yield (
                f"{where}: one key a rank, {len(self.ranks)} ranks. On another number of ranks a "
                "new rank finds no key of its own. `nemo-rng-dcp import` reads such keys."
            )
            if missing := sorted(self.missing(writers)):
                ranks = numbered("rank", missing)
                yield f"{where}: {ranks} wrote to this checkpoint, but no RNG state."
        elif self.prefix == MEGATRON_SHARD:
            yield f"found {self.prefix}{min(self.contents)}: {MEGATRON}."
        elif self.each_its_own:
            yield f"{where}: one state a rank, each in a .metadata of its own. New ranks find none."
        elif len(writers) > 1:
            kept = [f"{name or where} is rank {rank}'s" for name, rank in self.writers.items()]
            yield (
                f"{where}: one state for all ranks, though {len(writers)} or more wrote this "
                "checkpoint: DCP took equal keys for copies and kept one of each "
                f"({', '.join(kept[:6])}). The other ranks' streams are lost, and after a load all "
                "ranks draw the same numbers."
            )
        else:
            yield f"{where}: one rank's state. Loaded by several ranks, all draw the same numbers."
        if any(stored.dtype is None for stored in self.contents.values()):
            yield f"{where}: stored as pickles, which were not read."


def find_foreign(checkpoint: Checkpoint) -> list[ForeignState]:
    """Return the RNG state that no ``StatefulRNG`` stored, in the order of its keys."""
    found: dict[tuple[str, bool], ForeignState] = {}
    own = checkpoint.each_rank_reads_its_own
    for key, prefix, rank, rest in find_keys(checkpoint):
        state = ForeignState(prefix, each_its_own=own)
        state = found.setdefault((prefix, rank is not None), state)
        state.contents[rest] = checkpoint.keys[key]
        if rank is not None:
            state.ranks.add(rank)
        elif ranks := ranks_that_wrote(chunk.file for chunk in checkpoint.chunks(key)):
            state.writers[rest] = min(ranks)
    return list(found.values())
