"""What one call costs in one process without a process group."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

from nemo_rng_dcp import ResumableLoader, ScopedRNG, StatefulRNG, derive_seed
from scripts.bench.table import Row, Section, text
from scripts.bench.timing import Target, differences, interleaved
from scripts.bench.ways import plain_capture, plain_restore

Seconds = dict[str, list[float]]
"""By call: the seconds of every round."""


def measure(rounds: int, repeat: int) -> Seconds:
    """Time every call in turns.

    Args:
        rounds: How many values to return for each.
        repeat: Calls that one value is the mean of.
    """
    rng = StatefulRNG(seed=0)
    # A copy, as a load gives it: the table that state_dict() handed out is looked at once more.
    state = {key: table.clone() for key, table in rng.state_dict().items()}
    plain = plain_capture()
    samples: DataLoader[int] = DataLoader(range(10**9))  # type: ignore[arg-type]
    logical = StatefulRNG(seed=0, ranked=True, logical_ranks=2)
    calls: dict[str, Callable[[], object]] = {
        "plain_capture": plain_capture,
        "state_dict": rng.state_dict,
        "plain_restore": partial(capture_and_restore, plain),
        "load_state_dict": lambda: rng.load_state_dict(state),
        "fingerprint": rng.fingerprint,
        "scope": enter_scope,
        "batch": partial(next, iter(ResumableLoader(samples, rng))),
        "plain_batch": partial(next, iter(samples)),
        "as_rank": lambda: switch(logical),
        "micro_batch": micro_batch(),
        "checkpointed": micro_batch(use_reentrant=False),
        "recompute": micro_batch(use_reentrant=False, context_fn=rng.recompute),
        "derived_generator": lambda: torch.Generator().manual_seed(sample_seed()),
    }
    return interleaved(calls, rounds, repeat)


def capture_and_restore(state: dict[str, Any]) -> None:
    """Restore by hand, so that it could be undone."""
    plain_capture()
    plain_restore(state)


def sample_seed() -> int:
    return derive_seed(42, "augment", 3, 1234)


def enter_scope() -> None:
    with ScopedRNG(sample_seed()):
        pass


def switch(rng: StatefulRNG) -> None:
    with rng.as_rank(rng.ranks[-1]):
        pass


def micro_batch(**options: Any) -> Callable[[], object]:
    """Return the forward and the backward of a small model, 1 MB of weights, on 32 samples.

    Args:
        options: Of ``torch.utils.checkpoint.checkpoint``; none: without it.
    """
    model = torch.nn.Sequential(
        torch.nn.Linear(256, 512), torch.nn.Dropout(), torch.nn.Linear(512, 256)
    )
    batch = torch.rand(32, 256, requires_grad=True)
    forward = partial(checkpoint, model, **options) if options else model
    return lambda: forward(batch).sum().backward()


def beside_a_micro_batch(seconds: Seconds) -> Section:
    switched, recomputed = seconds["as_rank"], seconds["recompute"]
    limit = Target.at_most(150, 1e6 * statistics.median(switched), " us")
    rows = [
        Row("with rng.as_rank(r)", text(switched), text(seconds["micro_batch"]), limit),
        Row(
            "checkpoint(context_fn=rng.recompute)", text(recomputed), text(seconds["checkpointed"])
        ),
    ]
    return Section("a micro-batch", "without", rows)


def section(seconds: Seconds) -> Section:
    capture, restore = seconds["state_dict"], seconds["load_state_dict"]
    plain = seconds["plain_capture"], seconds["plain_restore"]
    batch, plain_batch = seconds["batch"], seconds["plain_batch"]
    added = statistics.median(differences(batch, plain_batch))
    rows = [
        Row("capture", text(capture), text(plain[0]), Target.ratio(2.5, capture, plain[0])),
        Row("check + restore", text(restore), text(plain[1]), Target.ratio(3, restore, plain[1])),
        Row(
            "a batch of ResumableLoader",
            text(batch),
            text(plain_batch),
            Target.at_most(100, added * 1e6, " us more"),
        ),
        Row("fingerprint()", text(seconds["fingerprint"])),
        Row("with ScopedRNG(derive_seed(...))", text(seconds["scope"])),
        Row("Generator().manual_seed(derive_seed(...))", text(seconds["derived_generator"])),
    ]
    return Section("one call", "plain way", rows)
