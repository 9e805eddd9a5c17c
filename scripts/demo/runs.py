"""What a run of a recipe left on disk, and how it compares with another run."""

from __future__ import annotations

import io
import json
import shutil
import warnings
from collections.abc import Collection, Sequence
from contextlib import redirect_stdout
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from nemo_rng_dcp.cli.main import main

GENERATORS = ("python", "numpy", "torch")

Streams = dict[int, dict[str, str]]
"""By row: the digits of each generator's stream."""


def checkpoint(out: Path, step: int) -> Path:
    return out / "checkpoints" / f"step-{step:08d}"


def copy_checkpoint(run: Path, step: int, out: Path) -> Path:
    """Begin a run in ``out`` with a checkpoint of another one."""
    shutil.copytree(checkpoint(run, step), checkpoint(out, step))
    return out


def read_steps(out: Path, rank: int, kind: str = "losses") -> list[tuple[int, str]]:
    """Return a rank's steps and what it noted of each, in the order in which they were trained."""
    file = out / f"{kind}-rank{rank}.txt"
    lines = file.read_text().splitlines(keepends=True) if file.exists() else []
    pairs = [line.partition(" ") for line in lines if line.endswith("\n")]
    return [(int(step), text.strip()) for step, _, text in pairs]


def last_step(out: Path, rank: int, kind: str = "losses") -> int:
    """Return the step that a rank noted last, -1 if none."""
    return max((step for step, _ in read_steps(out, rank, kind)[-1:]), default=-1)


def first_difference(
    out: Path, reference: Path, rank: int, kind: str = "losses", since: int = 0
) -> int | None:
    """Return the first step from ``since`` on in which a rank's note is not the reference's."""
    expected = {step: text for step, text in read_steps(reference, rank, kind) if step >= since}
    found = read_steps(out, rank, kind)
    differing = [step for step, text in found if text != expected.get(step)]
    missing = expected.keys() - {step for step, _ in found}
    return min([*differing, *missing], default=None)


def equal_or_not(
    out: Path, reference: Path, rank: int, kind: str = "losses", since: int = 0
) -> str:
    """Say whether a rank's notes from a step on are the reference's, bit for bit."""
    step = first_difference(out, reference, rank, kind, since)
    return "equal" if step is None else f"differs from step {step}"


def read_streams(folder: Path, generators: Collection[str] = GENERATORS) -> Streams:
    """Return the streams in a checkpoint's entry ``rng``, as ``nemo-rng-dcp inspect`` shows them.

    Raises:
        LookupError: The checkpoint has no such entry.
    """
    with redirect_stdout(io.StringIO()) as shown:
        main(["inspect", "--json", str(folder)])
    for found in json.loads(shown.getvalue())["entries"]:
        if found["key"] == "rng":
            return {
                row["row"]: {name: row["fingerprints"][name] for name in generators}
                for row in found["streams"]
            }
    raise LookupError(f"{folder} has no streams at 'rng'")


def equal_tensors(a: Path, b: Path, prefix: str) -> bool:
    """Return whether two checkpoints have the same tensors, bit for bit, below a key."""
    first, second = read_tensors(a, prefix), read_tensors(b, prefix)
    return first.keys() == second.keys() and all(
        torch.equal(tensor, second[key]) for key, tensor in first.items()
    )


def read_tensors(folder: Path, prefix: str) -> dict[str, torch.Tensor]:
    """Return a checkpoint's tensors whose keys begin with ``prefix``, whole, in this process."""
    saved = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
    tensors = {
        key: torch.empty(tensor.size, dtype=tensor.properties.dtype)
        for key, tensor in saved.items()
        if key.startswith(prefix) and isinstance(tensor, TensorStorageMetadata)
    }
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        dcp.load(tensors, checkpoint_id=folder, no_dist=True)
    return tensors


def fates(resumed: Streams, reference: Streams) -> list[str]:
    """Return what became of each row of streams in a job of another size.

    Both checkpoints are of the same step, and a rank draws as often in a step of one job as in a
    step of the other. So a row that was continued has the very streams of the reference.
    """
    found = []
    for row, streams in sorted(resumed.items()):
        others = [*reference.values(), *(resumed[other] for other in resumed if other != row)]
        elsewhere = {digits for other in others for digits in other.values()}
        if streams == reference.get(row):
            found.append("continued")
        else:
            found.append("MIXED UP" if elsewhere & set(streams.values()) else "forked")
    return found + ["dropped"] * (len(reference) - len(resumed))


def expected_fates(rows: int, saved_rows: int) -> list[str]:
    """Return what the rules say."""
    kept = min(rows, saved_rows)
    return ["continued"] * kept + ["forked"] * (rows - kept) + ["dropped"] * (saved_rows - kept)


def table(titles: Sequence[str], columns: Sequence[Sequence[str]], width: int = 0) -> str:
    """Return columns side by side under their titles, "-" where one is shorter.

    All but the first are at least ``width`` characters wide.
    """
    height = max(len(column) for column in columns)
    lines = [list(titles)] + [
        [column[row] if row < len(column) else "-" for column in columns] for row in range(height)
    ]
    widths = [max(*(len(line[i]) for line in lines), width if i else 0) for i in range(len(titles))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )
